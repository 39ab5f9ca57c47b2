// The drawing of a graph: modules as boxes that open and close, ops as leaves, laid out in layers by dagre.
//
// Data: {stages: [name], nodes: [[name, path, op, call, shape, reads, first, last, added, removed]]}. A node is there in
// the stages from first to last; added says whether the pass before its first stage made it, removed whether the pass
// behind its last stage took it away. reads: names.
"use strict";

const NAME = 0, PATH = 1, OP = 2, CALL = 3, SHAPE = 4, READS = 5, FIRST = 6, LAST = 7, ADDED = 8, REMOVED = 9;
const ROW = 18, PAD = 10, CHAR = 7.2, FIRST_VIEW = 36, FEW = 12, MANY = 60;
const SVG = "http://www.w3.org/2000/svg";

class Drawing {
  constructor(root, data) {
    this.root = root;
    this.data = data;
    this.canvas = root.querySelector(".canvas");
    this.detail = root.querySelector(".node-detail");
    this.count = root.querySelector(".found");
    this.stage = data.stages.length - 1;
    this.withRemoved = false;
    this.zoom = 1;
    this.open = new Set([""]);
    this.forms = new Map();
    this.matches = [];
    this.match = -1;
    this.listen();
    this.show(this.stage);
  }

  // --- what is there in a stage ---------------------------------------------------------------------------------

  show(stage) {
    this.stage = stage;
    this.tree = this.treeOf(stage);
    if (!this.opened) this.openSome();
    this.opened = true;
    this.draw();
    this.root.querySelectorAll("[data-stage]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.stage) === stage));
    });
    this.root.querySelector(".gone").disabled = stage === 0;
  }

  // A node's mark in this stage: "added", "removed" or "".
  mark(node) {
    if (node[LAST] < this.stage) return "removed";
    return node[FIRST] === this.stage && node[ADDED] ? "added" : "";
  }

  treeOf(stage) {
    const there = this.data.nodes.filter(
      (node) =>
        (node[FIRST] <= stage && stage <= node[LAST]) ||
        (this.withRemoved && node[REMOVED] && node[LAST] === stage - 1)
    );
    const root = { path: "", label: "", modules: new Map(), leaves: [], parent: null, count: 0, added: 0, removed: 0 };
    const byPath = new Map([["", root]]);
    const moduleAt = (path) => {
      if (byPath.has(path)) return byPath.get(path);
      const parent = moduleAt(above(path));
      const made = {
        path, label: path.slice(path.lastIndexOf(".") + 1), modules: new Map(), leaves: [], parent, count: 0, added: 0, removed: 0,
      };
      parent.modules.set(path, made);
      byPath.set(path, made);
      return made;
    };
    const current = new Map(), gone = new Map();
    for (const node of there) {
      const module = moduleAt(node[PATH]);
      const mark = this.mark(node);
      const leaf = { node, module, mark, id: "leaf " + mark + " " + node[NAME] };
      module.leaves.push(leaf);
      (mark === "removed" ? gone : current).set(node[NAME], leaf);
      for (let at = module; at; at = at.parent) {
        at.count += 1;
        if (mark) at[mark] += 1;
      }
    }
    // What is read and is no node of the graph: an input of the model.
    const edges = [];
    const inputs = new Map();
    for (const leaf of [...current.values(), ...gone.values()]) {
      for (const name of leaf.node[READS]) {
        let source = leaf.mark === "removed" ? gone.get(name) || current.get(name) : current.get(name);
        if (!source) {
          if (leaf.mark === "removed") continue;
          if (!inputs.has(name)) {
            const made = { node: [name, "", "input", name, "", [], 0, stage, 0, 0], module: root, mark: "", id: "input " + name };
            root.leaves.push(made);
            inputs.set(name, made);
          }
          source = inputs.get(name);
        }
        edges.push([source, leaf]);
      }
    }
    this.byPath = byPath;
    this.edges = edges;
    return root;
  }

  openSome() {
    let boxes = this.openFrom(this.tree, this.tree.modules.size + this.tree.leaves.length);
    // Where one module holds almost everything, its box alone says nothing.
    for (let most = this.tree; boxes < FEW && most; ) {
      most = [...most.modules.values()].sort((a, b) => b.count - a.count)[0];
      if (!most || this.open.has(most.path)) continue;
      this.open.add(most.path);
      boxes = this.openFrom(most, boxes + most.modules.size + most.leaves.length - 1);
    }
  }

  // Opens modules below one, from the outside to the inside, while there is room. Returns how many boxes there are then.
  openFrom(module, boxes) {
    let level = [module];
    while (level.length) {
      const next = [];
      for (const module of level) {
        for (const child of module.modules.values()) {
          const more = child.modules.size + child.leaves.length - 1;
          if (boxes + more > FIRST_VIEW) continue;
          boxes += more;
          this.open.add(child.path);
          next.push(child);
        }
      }
      level = next;
    }
    return boxes;
  }

  // --- layout ---------------------------------------------------------------------------------------------------

  // Every module that is open is laid out by itself, innermost first; in the module around it, it is a box of its size.
  layOut() {
    const inside = new Map();
    const boxOf = (leaf) => {
      let shown = leaf, at = leaf.module;
      for (let up = at; up; up = up.parent) if (!this.open.has(up.path)) shown = up;
      return shown;
    };
    const around = (box) => (box.node ? box.module : box.parent);
    for (const [from, to] of this.edges) {
      let a = boxOf(from), b = boxOf(to);
      if (a === b) continue;
      const chain = new Map();
      for (let box = a; box; box = around(box)) chain.set(around(box), box);
      while (b && !chain.has(around(b))) b = around(b);
      if (!b) continue;
      const common = around(b);
      a = chain.get(common);
      if (!common || a === b) continue;
      if (!inside.has(common)) inside.set(common, new Map());
      const edges = inside.get(common);
      if (!edges.has(a)) edges.set(a, new Set());
      edges.get(a).add(b);
    }
    const place = (module) => {
      const boxes = [...module.modules.values(), ...module.leaves];
      const ids = new Map(boxes.map((box, at) => [box, at]));
      for (const box of boxes) {
        if (!box.node && this.open.has(box.path)) place(box);
        else [box.width, box.height] = sizeOf(box);
      }
      const edges = [...(inside.get(module) || [])].flatMap(([from, targets]) =>
        [...targets].map((to) => [ids.get(from), ids.get(to)])
      );
      const found = this.placed(boxes.map(({ width, height }) => [width, height]), edges);
      boxes.forEach((box, at) => ([box.x, box.y] = found.corners[at]));
      module.lines = found.lines;
      const title = module.parent ? module.label.length * CHAR + 60 : 0;
      module.width = Math.max(found.width, title);
      module.height = found.height + (module.parent ? ROW : 0);
    };
    place(this.tree);
  }

  // Where boxes of these sizes with these edges go. Repeated layers look alike, so each form is laid out once.
  placed(sizes, edges) {
    const form = JSON.stringify([sizes, edges]);
    if (this.forms.has(form)) return this.forms.get(form);
    const graph = new dagre.graphlib.Graph();
    // The tighter rankings of dagre take too long where there are many boxes.
    const ranker = sizes.length > MANY ? "longest-path" : "network-simplex";
    graph.setGraph({ nodesep: 14, ranksep: 24, marginx: PAD, marginy: PAD, ranker });
    graph.setDefaultEdgeLabel(() => ({}));
    sizes.forEach(([width, height], at) => graph.setNode(String(at), { width, height }));
    for (const [from, to] of edges) graph.setEdge(String(from), String(to));
    dagre.layout(graph);
    const { width, height } = graph.graph();
    const found = {
      corners: sizes.map(([w, h], at) => [graph.node(String(at)).x - w / 2, graph.node(String(at)).y - h / 2]),
      lines: graph.edges().map((edge) => graph.edge(edge).points),
      width: width || 0,
      height: height || 0,
    };
    this.forms.set(form, found);
    return found;
  }

  // --- drawing --------------------------------------------------------------------------------------------------

  draw(focus) {
    this.layOut();
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", "Graph " + this.data.stages[this.stage]);
    this.boxes = [];
    this.drawModule(svg, this.tree, 0, 0);
    this.svg = svg;
    this.canvas.replaceChildren(svg);
    this.scale();
    this.boxes.sort((a, b) => a.top - b.top || a.left - b.left);
    if (this.boxes.length) this.boxes[0].element.setAttribute("tabindex", "0");
    const wanted = focus && this.boxes.find(({ box }) => (box.node ? box.id : box.path) === focus);
    if (wanted) this.focus(wanted);
  }

  drawModule(into, module, left, top) {
    const y = top + (module.parent ? ROW : 0);
    for (const points of module.lines) {
      const line = element("path", { class: "edge", d: curve(points, left, y) });
      into.append(line);
    }
    for (const box of [...module.modules.values(), ...module.leaves]) this.drawBox(into, box, left + box.x, y + box.y);
  }

  drawBox(into, box, left, top) {
    const isOpen = !box.node && this.open.has(box.path);
    const mark = box.node ? box.mark : box.added && box.removed ? "changed" : box.added ? "added" : box.removed ? "removed" : "";
    const kind = box.node ? (box.id.startsWith("input ") ? "input" : "leaf") : isOpen ? "module open" : "module";
    const group = element("g", { class: `box ${kind} ${mark}`, tabindex: "-1", role: box.node ? "img" : "button" });
    group.setAttribute("aria-label", this.words(box));
    if (!box.node) group.setAttribute("aria-expanded", String(isOpen));
    group.append(element("rect", { x: left, y: top, width: box.width, height: box.height, rx: box.node ? 3 : 6 }));
    if (box.node) {
      group.append(text(wordOf(box), left + box.width / 2, top + 13, "middle", "name"));
      if (box.node[SHAPE]) group.append(text(box.node[SHAPE], left + box.width / 2, top + 27, "middle", "shape"));
    } else {
      group.append(text((isOpen ? "− " : "+ ") + box.label, left + 8, top + 14, "start", "name"));
      if (!isOpen) group.append(text(summary(box), left + 8, top + 29, "start", "shape"));
    }
    into.append(group);
    this.boxes.push({ box, element: group, left, top });
    const entry = this.boxes[this.boxes.length - 1];
    group.addEventListener("click", (event) => {
      event.stopPropagation();
      if (box.node) this.focus(entry);
      else this.toggle(box);
    });
    group.addEventListener("mouseenter", () => this.tell(box));
    group.addEventListener("focus", () => this.tell(box));
    if (isOpen) this.drawModule(into, box, left, top);
  }

  words(box) {
    if (!box.node) return `${box.path}, ${summary(box)}`;
    return `${box.node[NAME]}, ${box.node[OP]} ${box.node[SHAPE]}${box.mark ? ", " + box.mark : ""}`;
  }

  tell(box) {
    const rows = box.node
      ? [["node", box.node[NAME]], ["module", box.node[PATH] || "(the model)"], ["runs", box.node[CALL]],
         ["shape", box.node[SHAPE] || "no tensor"], ["change", box.mark || "none"]]
      : [["module", box.path], ["holds", summary(box)]];
    this.detail.replaceChildren(
      ...rows.flatMap(([term, value]) => {
        const dt = document.createElement("dt"), dd = document.createElement("dd");
        dt.textContent = term;
        dd.textContent = value;
        return [dt, dd];
      })
    );
  }

  toggle(box) {
    if (this.open.has(box.path)) this.open.delete(box.path);
    else this.open.add(box.path);
    this.draw(box.path);
  }

  scale() {
    const width = this.tree.width || 1, height = this.tree.height || 1;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", width * this.zoom);
    this.svg.setAttribute("height", height * this.zoom);
  }

  focus(entry) {
    for (const other of this.boxes) other.element.setAttribute("tabindex", "-1");
    entry.element.setAttribute("tabindex", "0");
    entry.element.focus({ preventScroll: true });
    const [x, y] = [entry.left * this.zoom, entry.top * this.zoom];
    const { clientWidth: w, clientHeight: h, scrollLeft: l, scrollTop: t } = this.canvas;
    const [bw, bh] = [Math.min(entry.box.width * this.zoom, w), Math.min(entry.box.height * this.zoom, h)];
    if (x < l || x + bw > l + w) this.canvas.scrollLeft = x + bw / 2 - w / 2;
    if (y < t || y + bh > t + h) this.canvas.scrollTop = y + bh / 2 - h / 2;
  }

  // --- what the reader does -------------------------------------------------------------------------------------

  listen() {
    const act = {
      in: () => this.zoomBy(1.25),
      out: () => this.zoomBy(0.8),
      fit: () => this.fit(),
      all: () => this.openAll(),
      none: () => this.closeAll(),
    };
    for (const button of this.root.querySelectorAll("[data-act]"))
      button.addEventListener("click", act[button.dataset.act]);
    for (const button of this.root.querySelectorAll("[data-stage]"))
      button.addEventListener("click", () => this.show(Number(button.dataset.stage)));
    this.root.querySelector(".gone").addEventListener("change", (event) => {
      this.withRemoved = event.target.checked;
      this.show(this.stage);
    });
    const search = this.root.querySelector("input[type=search]");
    search.addEventListener("input", () => this.find(search.value));
    search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        this.next(event.shiftKey ? -1 : 1);
      }
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        this.zoomBy(event.deltaY < 0 ? 1.1 : 1 / 1.1);
      },
      { passive: false }
    );
  }

  key(event) {
    const at = this.boxes.findIndex(({ element }) => element === document.activeElement);
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (step && at >= 0) {
      event.preventDefault();
      this.focus(this.boxes[Math.min(this.boxes.length - 1, Math.max(0, at + step))]);
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      event.preventDefault();
      if (!this.boxes[at].box.node) this.toggle(this.boxes[at].box);
    } else if (event.key === "+") this.zoomBy(1.25);
    else if (event.key === "-") this.zoomBy(0.8);
    else if (event.key === "0") this.fit();
  }

  zoomBy(factor) {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    const [x, y] = [(this.canvas.scrollLeft + w / 2) / this.zoom, (this.canvas.scrollTop + h / 2) / this.zoom];
    this.zoom = Math.min(4, Math.max(0.05, this.zoom * factor));
    this.scale();
    this.canvas.scrollLeft = x * this.zoom - w / 2;
    this.canvas.scrollTop = y * this.zoom - h / 2;
  }

  fit() {
    this.zoom = Math.min(1, this.canvas.clientWidth / this.tree.width, this.canvas.clientHeight / this.tree.height);
    this.scale();
  }

  openAll() {
    // Of all stages, so that what another stage has is open there too.
    for (const node of this.data.nodes) for (let path = node[PATH]; path; path = above(path)) this.open.add(path);
    this.draw();
  }

  closeAll() {
    this.open = new Set([""]);
    this.draw();
  }

  find(wanted) {
    const words = wanted.trim().toLowerCase();
    this.match = -1;
    this.matches = [];
    if (words) {
      const seen = new Set();
      for (const module of this.byPath.values()) {
        if (module.path.toLowerCase().includes(words)) this.matches.push(module);
        for (const leaf of module.leaves)
          if (!seen.has(leaf) && (leaf.node[NAME] + " " + leaf.node[OP]).toLowerCase().includes(words))
            this.matches.push(leaf);
      }
    }
    this.count.textContent = words ? `${this.matches.length} found` + (this.matches.length ? ", Enter for the next" : "") : "";
  }

  next(step) {
    if (!this.matches.length) return;
    this.match = (this.match + step + this.matches.length) % this.matches.length;
    const found = this.matches[this.match];
    for (let up = found.node ? found.module : found.parent; up; up = up.parent) this.open.add(up.path);
    const search = document.activeElement;
    this.draw(found.node ? found.id : found.path);
    for (const { element } of this.boxes) element.classList.remove("match");
    const entry = this.boxes.find(({ box }) => box === found);
    if (entry) entry.element.classList.add("match");
    if (search) search.focus({ preventScroll: true });
    this.count.textContent = `${this.match + 1} of ${this.matches.length}`;
  }
}

// The module around another one.
function above(path) {
  return path.slice(0, Math.max(0, path.lastIndexOf(".")));
}

// An op by what it runs, an input of the model by its name.
function wordOf(leaf) {
  return leaf.id.startsWith("input ") ? leaf.node[NAME] : leaf.node[OP];
}

function sizeOf(box) {
  if (box.node) {
    const letters = Math.max(wordOf(box).length, box.node[SHAPE].length * 0.9, 3);
    return [letters * CHAR + 14, box.node[SHAPE] ? 34 : 20];
  }
  return [Math.max(box.label.length + 2, summary(box).length * 0.9) * CHAR + 18, 38];
}

function summary(box) {
  const changes = [box.added && `+${box.added}`, box.removed && `−${box.removed}`].filter(Boolean).join(" ");
  return `${box.count} op${box.count === 1 ? "" : "s"}${changes ? " " + changes : ""}`;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(words, x, y, anchor, kind) {
  const made = element("text", { x, y, "text-anchor": anchor, class: kind });
  made.textContent = words;
  return made;
}

// A smooth line through the points of dagre.
function curve(points, left, top) {
  const at = points.map(({ x, y }) => [x + left, y + top]);
  let path = `M${at[0]}`;
  for (let i = 1; i < at.length - 1; i++) {
    const middle = [(at[i][0] + at[i + 1][0]) / 2, (at[i][1] + at[i + 1][1]) / 2];
    path += ` Q${at[i]} ${i === at.length - 2 ? at[at.length - 1] : middle}`;
  }
  return at.length < 3 ? path + ` L${at[at.length - 1]}` : path;
}
