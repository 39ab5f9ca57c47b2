"""The report in a real browser: the drawing opens, closes, searches and switches, on a phone and by keyboard."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.jobs.report import report
from surgeon.passes import Lower, Moeify, SwapActivation
from surgeon.render.report import report_html
from surgeon.surgery.pipeline import Pipeline
from tests import small_models

pytestmark = [
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None,
        reason="needs chromium and chromedriver",
    ),
]
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    model, inputs = small_models.hugging_face("bert")
    Pipeline([SwapActivation(), Moeify(experts=4), Lower()]).run(model, inputs=inputs).save(place / "bert")
    page = place / "report.html"
    page.write_text(report_html(report([str(place / "bert")])), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, file: Path) -> Any:
    size(browser, 1200)
    browser.get(file.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def size(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def find(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def labels(page: Any) -> list[str]:
    return [str(box.get_attribute("aria-label")) for box in find(page, ".canvas .box")]


def focused(page: Any) -> str:
    return str(page.execute_script("return document.activeElement.getAttribute('aria-label')"))


def press(page: Any, key: str) -> None:
    page.switch_to.active_element.send_keys(key)


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_no_width_scrolls_sideways(page: Any, width: int) -> None:
    size(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert find(page, ".canvas .box")


def test_the_graph_before_and_after_a_pass(page: Any) -> None:
    find(page, "[data-act=all]")[0].click()
    find(page, "[data-stage='0']")[0].click()
    before = labels(page)
    assert any(", gelu " in label for label in before)
    assert not any("added" in label for label in before)
    find(page, "[data-stage='1']")[0].click()
    assert [button.get_attribute("aria-pressed") for button in find(page, "[data-stage]")].index("true") == 1
    after = labels(page)
    assert sum(", relu " in label and label.endswith("added") for label in after) == 2
    assert not any(label.endswith("removed") for label in after)
    find(page, ".gone")[0].click()
    assert sum(", gelu " in label and label.endswith("removed") for label in labels(page)) == 2


def test_a_module_opens_and_closes(page: Any) -> None:
    find(page, "[data-act=none]")[0].click()
    closed = len(labels(page))
    module = find(page, ".canvas .module")[0]
    assert module.get_attribute("aria-expanded") == "false"
    module.click()
    assert len(labels(page)) > closed
    press(page, "\ue007")  # the module that was clicked has the focus
    assert len(labels(page)) == closed


def test_search_opens_what_it_finds(page: Any) -> None:
    find(page, "[data-act=none]")[0].click()
    search = find(page, "input[type=search]")[0]
    search.send_keys("dynamic_k")
    assert find(page, ".found")[0].text.startswith("2 found")
    search.send_keys("\ue007")
    (match,) = find(page, ".canvas .match")
    assert "dynamic_k_ffn" in str(match.get_attribute("aria-label"))
    assert find(page, ".found")[0].text == "1 of 2"
    assert "dynamic_k_ffn(" in find(page, ".node-detail")[0].text
    search.send_keys("x" * 20)
    assert find(page, ".found")[0].text == "0 found"


def test_the_keyboard_is_enough(page: Any) -> None:
    find(page, "[data-act=none]")[0].click()
    page.execute_script("document.querySelector('.canvas .box[tabindex=\"0\"]').focus()")
    first = focused(page)
    press(page, "\ue015")  # down
    assert focused(page) != first
    press(page, "\ue013")  # up
    assert focused(page) == first
    count = len(labels(page))
    while "ops" not in focused(page):
        press(page, "\ue015")
    press(page, "\ue007")
    assert len(labels(page)) > count


def test_light_and_dark(page: Any) -> None:
    def back() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    seen = [back()]
    for _ in range(2):
        find(page, "#theme")[0].click()
        seen.append(back())
    assert len({seen[1], seen[2]}) == 2


def test_zoom_keeps_the_drawing(page: Any) -> None:
    def width() -> float:
        return float(find(page, ".canvas svg")[0].get_attribute("width"))

    before = width()
    find(page, "[data-act=in]")[0].click()
    assert width() == pytest.approx(1.25 * before)
    find(page, "[data-act=fit]")[0].click()
    assert width() <= page.execute_script("return document.querySelector('.canvas').clientWidth")


def test_a_module_that_holds_almost_everything_is_open_at_first(browser: Any, tmp_path: Path) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(60):
                x = torch.sin(x)
            return x + self.ffn(x)

    model = nn.Sequential(OrderedDict(body=Body(), head=nn.Linear(8, 2))).eval()
    Pipeline([Moeify(experts=4)]).run(model, inputs=torch.randn(2, 3, 8)).save(tmp_path / "a")
    (tmp_path / "a.html").write_text(report_html(report([str(tmp_path / "a")])), encoding="utf-8")
    size(browser, 1200)
    browser.get((tmp_path / "a.html").as_uri())
    assert sum(", sin " in label for label in labels(browser)) == 60


def test_on_a_phone_tables_and_facts_can_be_read(page: Any) -> None:
    size(page, 360)
    widths = [table.size["width"] for table in find(page, ".scroll table")]
    assert widths
    assert min(widths) >= 600
    term, value = find(page, "dl.facts dt")[0], find(page, "dl.facts dd")[0]
    assert value.location["y"] > term.location["y"]
