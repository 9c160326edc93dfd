"""Photograph the shapes world's report for the docs: ``python docs/make_screenshots.py``. It needs Chromium."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
PAGE = HERE.parent / "results" / "shapes" / "report" / "index.html"
SIZES = {"phone": (360, 1100), "desktop": (1280, 1180)}


def main() -> None:
    """Write a picture of the page's top for each size and colour scheme."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(PAGE.as_uri())
                page.wait_for_selector("html[data-drawn]", state="attached")
                page.screenshot(path=HERE / "images" / f"report-{size}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
