"""Write the page: one file with its style, its scripts, its data and its pictures. A browser fetches nothing for it.

The charts are drawn by Vega-Lite, which ``vl-convert`` carries. It was chosen because it draws SVG with roles and
labels for screen readers, weighs 0.9 MB, and runs under a Content-Security-Policy without ``unsafe-eval``.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ddil_core.support.files import write_text
from ddil_eval.report.page.charts import Chart
from ddil_eval.report.page.sections import SECTIONS, Results, Section
from ddil_eval.report.records import Record
from ddil_eval.report.table_type import Table

VEGA_LITE = "6.4"
"""The version of Vega-Lite that draws the charts."""


def write_page(records: Sequence[Record], tables: Sequence[Table], results: Path, path: Path) -> Path:
    """Write the report of a results folder as one HTML file, and return the file. Equal results give equal bytes.

    Args:
        records: The records.
        tables: Their tables (see ``tables.build``).
        results: The results folder, whose pictures the page shows.
        path: The file.

    Raises:
        DdilError: The file cannot be written.
    """
    found = Results(results, records, tables)
    sections = [section for make in SECTIONS for section in make(found)]
    write_text(path, render(sections, results.resolve().name))
    return path


def render(sections: Sequence[Section], name: str) -> str:
    """Return the page of these sections. ``name`` stands in its title."""
    has_charts = any(section.content.get("charts") for section in sections)
    style, script = Markup(_part("page.css")), Markup(_part("page.js"))
    library = Markup(vega() if has_charts else "")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)} {_hash(library)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_part), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["groupby_text"] = _by_text
    template = environment.get_template("page.html.j2")
    return template.render(name=name, sections=sections, style=style, script=script, library=library, policy=policy)


@cache
def vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that can stand inside an HTML page."""
    import vl_convert

    script = vl_convert.javascript_bundle(None, vl_version=VEGA_LITE)  # type: ignore[arg-type]  # its stub lacks None
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def _by_text(charts: Sequence[Chart]) -> list[tuple[str, list[Chart]]]:
    """Return the charts in runs of one text, so that the page says it once."""
    return [(text, list(run)) for text, run in itertools.groupby(charts, key=lambda chart: chart.text)]


def _part(name: str) -> str:
    """Return a file of this package."""
    return (files("ddil_eval.report.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source of a Content-Security-Policy that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
