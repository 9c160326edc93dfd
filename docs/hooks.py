"""Adapt the pages for the documentation site, before mkdocs renders them.

The pages are also read in the repository, where links lead to source files. The site has no source files, and shows
the text of such links. Some pages of the site are files outside of ``docs``, such as README.md: the site gets their
images too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "overview.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "results/shapes/README.md",
}
"""The pages of the site that are files outside of ``docs``."""

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Give headings the anchors that GitHub gives them, so that a link works in both places."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = _slug
    return config


def _slug(heading: str, separator: str) -> str:
    return re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", separator)


def on_files(files: Any, config: Any) -> Any:
    """Add the images outside of ``docs`` to the site, under their paths in the repository."""
    from mkdocs.structure.files import File

    pages = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    for path in images_outside([*ROOT_PAGES.values(), *pages]):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def images_outside(pages: Iterable[str]) -> list[str]:
    """Return the images of pages that are files outside of ``docs``, by their paths in the repository."""
    found = [
        _path(page, link["target"])
        for page in pages
        for link in _LINK.finditer((ROOT / page).read_text(encoding="utf-8"))
        if link["image"] and "://" not in link["target"]
    ]
    return list(dict.fromkeys(path for path in found if not path.startswith("docs/")))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page with links that work on the site."""
    place = page.file.src_uri
    source = ROOT_PAGES.get(place, f"docs/{place}")
    if place in ROOT_PAGES:
        markdown = (ROOT / source).read_text(encoding="utf-8")
    return _LINK.sub(lambda link: _link(link, source, place), markdown)


def _path(source: str, target: str) -> str:
    """Return the path in the repository that a link of the file ``source`` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _link(link: re.Match[str], source: str, place: str) -> str:
    """Rewrite one link of the file ``source``, which is the page ``place`` of the site."""
    text, target, anchor = link["text"], link["target"], link["anchor"] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return link[0]
    path = _path(source, target)
    page = next((name for name, file in ROOT_PAGES.items() if file == path), None)
    if page is None and path.startswith("docs/"):
        page = path.removeprefix("docs/")
    if page is None and link["image"]:
        page = path
    if page is None:
        return text
    return f"{link['image']}[{text}]({posixpath.relpath(page, posixpath.dirname(place) or '.')}{anchor})"
