"""The report's page without a browser: its links, its sentences, its pictures, and that no text gets out of its place."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_eval.report import tables
from ddil_eval.report.front import front
from ddil_eval.report.page.findings import best_sentence, in_words
from ddil_eval.report.page.galleries import galleries
from ddil_eval.report.page.write import write_page
from ddil_eval.report.records import read_records, save_record
from ddil_eval.report.strips import FOLDER, INDEX, read_strips, write_strips
from tests.eval.report.pages import CAPTIONS, HOSTILE, everything
from tests.records import measured, record, system


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and the JSON of its data blocks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[object] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1] == ("script", {"type": "application/json"}) and data.strip():
            self.blocks.append(json.loads(data))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


def page_of(folder: Path, path: Path) -> Page:
    records = read_records(folder)
    return Page(write_page(records, tables.build(records), folder, path))


def test_the_page_is_one_file_in_which_each_link_leads_somewhere(tmp_path: Path) -> None:
    everything(tmp_path / "results")
    page = page_of(tmp_path / "results", tmp_path / "page.html")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = page.attributes("href")
    assert {link for link in links if link.startswith("#r-")} and {link.removeprefix("#") for link in links} <= set(ids)
    assert all(source.startswith("data:image/webp;base64,") for source in page.attributes("src"))
    # the library, the page's own script and data blocks: what HOSTILE holds is text
    assert [tag for tag, attributes in page.elements if tag == "script" and not attributes] == ["script", "script"]
    assert {tag for tag, _ in page.elements} & {"iframe", "link", "object", "form"} == set()
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    specs = [block for block in page.blocks if isinstance(block, dict)]
    assert HOSTILE in {value["name"] for spec in specs for value in spec["data"]["values"]}
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "unsafe" not in policy and policy.startswith("default-src 'none'; img-src data:;")


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    save_record(system("PD", 4), tmp_path / "results")
    first, second = (tmp_path / name for name in ("a.html", "b.html"))
    for path in (first, second):
        page_of(tmp_path / "results", path)
    assert first.read_bytes() == second.read_bytes()


def test_prompts_are_ordered_by_what_changed_most(tmp_path: Path) -> None:
    everything(tmp_path)
    strips, kept = galleries(tmp_path, read_records(tmp_path), ["PD", "LCM"])
    assert strips.columns == ("student alone", HOSTILE) and [row.prompt for row in strips.rows] == list(CAPTIONS)
    assert kept.columns == ("PD", "LCM")
    orders = dict(kept.orders)
    assert orders["worst drawn_right: PD"][0] == 1 and orders["worst drawn_right: LCM"][0] == 2
    assert orders["most changed drawn_right: LCM − PD"] == (1, 2, 0)  # changes of 0.75, 0.7 and 0.1
    (_, scores), _ = kept.rows[1].cells
    assert scores == ("drawn_right 0.2",)


def test_damaged_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    everything(tmp_path)
    (tmp_path / FOLDER / "figure2" / "000001.png").write_bytes(b"no image")
    (tmp_path / "images" / "PD" / "index.jsonl").write_text('{"id": "1", "file": "../../x.png", "prompt": "p"}\n')
    strips, kept = galleries(tmp_path, read_records(tmp_path))
    assert len(strips.rows) == 2 and strips.left_out == 1
    assert kept.columns == ("LCM",)


def test_strips_come_back_as_they_were_written(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    scores = {"clip": np.array([[np.nan, 1.0, 2.0], [np.nan, 3.0, 4.0]])}
    folder = write_strips(images, ["a", "b"], CAPTIONS[:2], ["x", "y", "z"], tmp_path, "figure2", scores)
    first, second = read_strips(folder)
    assert second.prompt == HOSTILE and first.scores == {"clip": [None, 1.0, 2.0]}
    strip = np.asarray(Image.open(folder / second.file))
    assert (strip.reshape(4, 3, 5, 3).transpose(1, 0, 2, 3) == images[1]).all()
    with (folder / INDEX).open("a") as index:
        index.write('{"id": "c", "file": "../c.png", "prompt": "", "columns": ["x"]}\n{"id": 7}\nno JSON\n')
    assert [line.id for line in read_strips(folder)] == ["a", "b"]


@pytest.mark.parametrize(
    ("points", "direction", "expected"),
    [
        ([(1, 5.0), (2, 4.0), (2, 6.0), (4, 4.0)], "lower", {0, 1}),
        ([(1, 5.0), (2, 4.0), (2, 6.0), (4, 4.0)], "higher", {0, 2}),
        ([(1, 5.0), (1, 5.0)], "lower", {0, 1}),
        ([], "lower", set()),
    ],
)
def test_the_front_holds_what_nothing_beats(
    points: list[tuple[float, float]], direction: str, expected: set[int]
) -> None:
    assert front(points, direction) == expected  # type: ignore[arg-type]


def test_sentences_are_filled_from_the_records() -> None:
    metrics = [{"fd": measured(value, 0.5, "lower", "set")} for value in (12.0, 9.0)]
    rows = [system("teacher", 32, metrics=metrics[0], nfe=64.0), system("PD", 4, metrics=metrics[1])]
    table = next(table for table in tables.build(rows) if table.name == "systems")
    assert best_sentence(table) == (
        "Of 2 systems, PD has the best fd, 9.00 [8.50, 9.50] at an NFE of 4. "
        "The costliest, teacher with an NFE of 64, has 12.00 [11.50, 12.50]."
    )
    effects = [
        record(
            {"kind": "effect", "transitions": [k]}, fd=None, right=None, metrics={"fd": measured(value, 0.5, "lower")}
        )
        for k, value in enumerate((-3.0, 0.1))
    ]
    table = next(table for table in tables.build(effects) if table.name == "main-effects")
    assert in_words(table) == ["999→749: better fd (−3.00 [−3.50, −2.50]).", "749→500: no significant change of fd."]


def test_the_commands_name_what_is_missing(tmp_path: Path) -> None:
    save_record(system("PD", 4), tmp_path)
    page_of(tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    commands = re.findall(r"<code>(ddil eval [^<]+)</code>", text)
    assert commands[-1].endswith("--save-images") and any(line.startswith("ddil eval drift ") for line in commands)
