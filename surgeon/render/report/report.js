// Starts the drawings, and switches between light and dark.
"use strict";

document.documentElement.classList.add("scripted");
for (const root of document.querySelectorAll(".drawing")) {
  const data = JSON.parse(document.getElementById(root.dataset.graph).textContent);
  root.drawing = new Drawing(root, data);
}
const themes = ["auto", "light", "dark"];
const toggle = document.getElementById("theme");
toggle?.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || "auto";
  const next = themes[(themes.indexOf(now) + 1) % themes.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  toggle.textContent = `Theme: ${next}`;
});
