"""The page in a browser: no error, no request, and its filters, sorting, plots and keys work."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.render.html import render
from exporter.report import Report
from tests.exporter.render.reports import BIG, HOSTILE, LATENCY, SMALL, layer, report

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")]

NAMES = "#layer-table tbody tr:not([hidden]) td:first-child"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Opened:
    """A page with everything that went wrong in it."""

    def __init__(self, browser: Any, folder: Path, shown: Report, **options: Any) -> None:
        path = folder / "report.html"
        path.write_text(render(shown, {"latency": LATENCY}), encoding="utf-8")
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append("dialog"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        assert self.faults == []
        assert self.requests == [path.as_uri()]

    def names(self) -> list[str]:
        """Layers that the table shows, in its order."""
        return self.page.locator(NAMES).all_text_contents()

    def selected(self) -> list[str]:
        """The selected layer, by the table."""
        return self.page.locator("#layer-table tr[aria-current=true] td:first-child").all_text_contents()


@pytest.fixture
def small(browser: Any, tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(browser, tmp_path, SMALL)
    yield opened
    assert opened.faults == []
    opened.page.close()


def test_sorting(small: Opened) -> None:
    button = small.page.get_by_role("button", name="network dB")
    button.click()
    assert small.names() == ["b", "c.linear", "float", "a"]
    assert small.page.locator("th[aria-sort=ascending]").all_text_contents() == ["network dB"]
    button.click()
    assert small.names() == ["a", "float", "c.linear", "b"]
    small.page.get_by_role("button", name="weight dB").click()
    assert small.names()[-1] == "float"  # it has no such figure
    small.page.get_by_role("button", name="weight dB").click()
    assert small.names()[-1] == "float"
    small.page.get_by_role("button", name="layer", exact=True).click()
    assert small.names() == ["a", "b", "c.linear", "float"]


def test_filters(small: Opened) -> None:
    page = small.page
    page.keyboard.press("/")
    page.keyboard.type("LIN")
    assert small.names() == ["c.linear"]
    assert page.locator("#shown").text_content() == "1 of 4 layers"
    page.locator("#filter-name").fill("")
    page.locator("#filter-cause").select_option("clipping")
    assert small.names() == ["b"]
    page.locator("#filter-cause").select_option("")
    page.locator("#filter-kernel").select_option("QLinearConv")
    assert small.names() == ["a", "b"]
    page.locator("#filter-kernel").select_option("")
    page.locator("#filter-below").fill("26")
    assert small.names() == ["b", "c.linear"]
    page.keyboard.press("Enter")  # a form that is sent would load the page again
    assert small.names() == ["b", "c.linear"]


def test_a_click_selects(small: Opened) -> None:
    page = small.page
    page.locator("#layer-table tbody tr").nth(1).click()
    assert small.selected() == ["b"]
    detail = page.locator("#detail")
    assert "2 % of the input's values lie outside its range" in str(detail.text_content())
    assert detail.locator("canvas").count() == 3
    page.locator("#worst a", has_text="c.linear").click()
    assert small.selected() == ["c.linear"]
    page.keyboard.press("Escape")
    assert small.selected() == []
    assert detail.is_hidden()
    page.locator("#layer-table tbody tr").nth(1).click()
    page.locator("#close").click()
    assert detail.is_hidden()


def test_the_chart_answers_the_mouse(small: Opened) -> None:
    page = small.page
    plot = page.locator("#chart .u-over")
    width = plot.bounding_box()["width"]
    plot.hover(position={"x": width * 0.97, "y": 50})
    assert "float" in str(page.locator("#chart .u-legend").text_content())
    scrolled = page.evaluate("scrollY")
    plot.click(position={"x": width * 0.03, "y": 50})
    assert small.selected() == ["a"]
    assert page.evaluate("scrollY") == scrolled  # the chart stays where it is


def test_the_keyboard_alone_is_enough(small: Opened) -> None:
    page = small.page
    page.locator("#chart").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert small.selected() == ["b"]
    page.keyboard.press("ArrowLeft")
    assert small.selected() == ["a"]
    page.locator("#layer-table tbody tr").first.focus()
    page.keyboard.press("ArrowDown")
    assert small.selected() == ["b"]
    page.keyboard.press("End")
    assert small.selected() == ["float"]
    page.keyboard.press("Home")
    assert small.selected() == ["a"]


def test_a_selected_layer_that_is_filtered_out_comes_back(small: Opened) -> None:
    page = small.page
    page.locator("#filter-name").fill("float")
    page.locator("#worst a", has_text="c.linear").click()
    assert small.selected() == ["c.linear"]
    assert len(small.names()) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes(browser: Any, tmp_path: Path, scheme: str) -> None:
    opened = Opened(browser, tmp_path, SMALL, color_scheme=scheme)
    paper = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}
    assert opened.page.evaluate(paper) == colours[scheme]
    other = {"light": "dark", "dark": "light"}[scheme]
    button = opened.page.locator("#theme")
    assert button.text_content() == other.title()
    canvases = opened.page.locator("canvas").count()
    button.click()
    assert opened.page.evaluate(paper) == colours[other]
    assert button.text_content() == scheme.title()
    assert opened.page.locator("canvas").count() == canvases  # drawn again, in the place of the old ones
    assert opened.faults == []
    opened.page.close()


def test_it_fits_a_telephone(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path, BIG, viewport={"width": 390, "height": 800})
    width = opened.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    opened.page.close()


def test_500_layers(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path, BIG)
    opened.page.get_by_role("button", name="network dB").click()
    opened.page.locator("#filter-name").fill("layers.49")
    assert len(opened.names()) == 10
    assert opened.faults == []
    opened.page.close()


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path, report(layer(HOSTILE, 10.0), layer("b", 20.0)))
    opened.page.locator("#layer-table tbody tr").first.click()
    assert opened.selected() == [HOSTILE]
    assert opened.page.locator("img").count() == 0
    assert opened.faults == []
    opened.page.close()


def test_a_report_of_nothing(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path, Report({}, {}, {}, {}))
    assert "done, no gates set" in str(opened.page.locator("#verdict").text_content())
    opened.page.close()
