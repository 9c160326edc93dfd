"""Adapt the pages for the documentation site, before mkdocs renders them.

The pages are also read in the repository, where links lead to source files. The site has no source files, and shows
the text of such links. Two pages of the site are files at the root of the repository: README.md and CONTRIBUTING.md.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""The pages of the site that are files at the root of the repository."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
_IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>docs/[^)\s]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page with links that work on the site."""
    source = page.file.src_uri
    base = "docs"
    if source in ROOT_PAGES:
        markdown, base = (ROOT / ROOT_PAGES[source]).read_text(encoding="utf-8"), "."
        markdown = _IMAGE.sub(lambda m: f"![{m['text']}]({m['target'].removeprefix('docs/')})", markdown)
    return _LINK.sub(lambda m: _link(m, base), markdown)


def _link(match: re.Match[str], base: str) -> str:
    """Rewrite one link; ``base`` is the folder that its target starts from."""
    text, target, anchor = match["text"], match["target"], match["anchor"] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return match[0]
    path = posixpath.normpath(posixpath.join(base, target))
    page = next((name for name, file in ROOT_PAGES.items() if file == path), None)
    if page is not None:
        return f"[{text}]({page}{anchor})"
    if path.startswith("docs/"):
        return f"[{text}]({path.removeprefix('docs/')}{anchor})"
    return text
