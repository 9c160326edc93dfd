"""The report's page in headless Chromium: every chart is drawn, nothing overflows, and axe finds nothing serious."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddil_eval.report import tables
from ddil_eval.report.page.write import write_page
from ddil_eval.report.records import read_records
from tests.eval.report.pages import everything

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: install the dev extra")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: install the dev extra")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SIZES = {"phone": (360, 800), "desktop": (1280, 900)}
OVERFLOWING = """
() => [...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect();
    const inside = element.closest(".scroll, pre, .sheets .shots, .hidden, .skip");
    return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) && !inside;
}).map(element => element.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Path]:
    """The page of the measured results, and that of a folder with everything, whose texts try to run."""
    folders = {"shapes": root / "results" / "shapes", "hostile": everything(tmp_path_factory.mktemp("hostile"))}
    out = tmp_path_factory.mktemp("pages")
    for name, folder in folders.items():
        records = read_records(folder)
        write_page(records, tables.build(records), folder, out / f"{name}.html")
    return {name: out / f"{name}.html" for name in folders}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["shapes", "hostile"])
def test_the_page_draws_everything_and_fits(browser: Any, pages: dict[str, Path], name: str, size: str) -> None:
    width, height = SIZES[size]
    scheme = "dark" if size == "phone" else "light"
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    faults, requests = list[str](), list[str]()
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[name].as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    charts = page.locator(".chart").count()
    assert charts > 20 and page.locator(".chart svg .mark-symbol path").count() > charts
    assert page.evaluate("document.documentElement.scrollWidth") == width and page.evaluate(OVERFLOWING) == []
    assert page.evaluate("window.hacked") is None
    if name == "hostile":  # it has every part of the page, and is small: axe looks at each element
        found = axe.Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] != "minor"] == []
    assert faults == [] and [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_the_page_is_small(pages: dict[str, Path]) -> None:
    assert pages["shapes"].stat().st_size < 5_000_000


def test_numbers_lead_to_their_records_and_pictures_are_filtered(browser: Any, pages: dict[str, Path]) -> None:
    """By keyboard: a number opens its record; the filter and the order change the pictures."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(pages["hostile"].as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    link = page.locator("td a").first
    target = link.get_attribute("href")
    assert not page.locator(target).evaluate("record => record.open")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("target => document.querySelector(target).open", arg=target)

    gallery = page.locator(".gallery").nth(1)
    prompts = gallery.locator(".prompt span")
    gallery.locator(".order").select_option(label="most changed drawn_right: PD − LCM")
    assert "window.hacked" in prompts.first.inner_text()
    gallery.locator(".filter").fill("BLUE star")
    assert prompts.all_inner_texts() == ["a large blue star"]
    page.locator(".chart svg .mark-symbol path").first.hover()
    assert page.locator("#vg-tooltip-element.visible").inner_text().strip()
    page.close()
