"""The report's page without a browser: its links, its sentences, its pictures, and that no text gets out of its place."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_eval.report import tables
from ddil_eval.report.front import front
from ddil_eval.report.page.charts import name_lines
from ddil_eval.report.page.figures import charts_of, quality_and_cost
from ddil_eval.report.page.findings import best_sentence, headline, in_words
from ddil_eval.report.page.galleries import galleries
from ddil_eval.report.page.missing import gaps
from ddil_eval.report.page.titles import titles
from ddil_eval.report.page.write import write_page
from ddil_eval.report.records import Direction, RecordedEstimate, RecordedModel, read_records, save_record
from ddil_eval.report.strips import FOLDER, INDEX, read_strips, write_strips
from tests.eval.report.pages import CAPTIONS, HOSTILE, drift_of_groups, everything
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
    names = re.findall(r"<h2[^>]*>(.+?)</h2>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(names) == len(set(names)) > 5
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


def test_strips_of_several_runs_are_shown_once_each_and_named_apart(tmp_path: Path) -> None:
    """Figures beside strips are not shown again."""
    images = np.zeros((1, 2, 4, 5, 3), dtype=np.uint8)
    for run in ("a", "b"):
        write_strips(images, ["1"], ["a disc"], ["reference", "PD"], tmp_path / "prompt-inversion" / run, "inverted")
        (tmp_path / "prompt-inversion" / run / "inverted").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "prompt-inversion" / run / "inverted" / "0000-1.png")
    first, second = galleries(tmp_path, [])
    assert len(first.rows) == len(second.rows) == 1
    assert first.text.endswith(" These are in prompt-inversion/a/strips/inverted.")
    assert second.text.endswith(" These are in prompt-inversion/b/strips/inverted.")


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
    points: list[tuple[float, float]], direction: Direction, expected: set[int]
) -> None:
    found = [(cost, RecordedEstimate(value=value, low=value, high=value, n=1)) for cost, value in points]
    assert front(found, direction) == expected
    doubted = RecordedEstimate(value=0, low=0, high=0, n=1, note="too few images")
    assert front([*found, (0, doubted)], direction) == expected


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


def test_groups_of_students_are_told_of(tmp_path: Path) -> None:
    """The titles name the groups and their steps; the sentences have the ratios, their change and the tests."""
    records = drift_of_groups(["PD", "DDIL"]) + drift_of_groups(["PD", "DDIL"], [999])
    built = tables.build(records)
    longer, shorter = tables.groups(records)
    assert titles([longer, shorter]) == {
        longer.name: "Drift of DDIL and PD, 4 steps",
        shorter.name: "Drift of DDIL and PD, 1 step",
    }
    own = {table.name: table for table in built if table.group == longer.name}
    assert headline(own) == [
        "Over all transitions, the covariate-shift ratio of DDIL is 1.200 [1.150, 1.250] and that of PD is "
        "1.100 [1.050, 1.150]; 1 is no covariate shift.",
        "DDIL − PD: the ratio changes by −20.0 % [−34.5, −2.3].",
        "0 of 20 tests of differences of groups are significant after Holm's correction.",
    ]
    assert in_words(own["drift-group-difference"]) == [
        "DDIL − PD, t = 999, t = 749.5, t = 500, t = 250, all transitions: no significant change of log_shift_ratio, "
        "disagreement_data, log_rollout_ratio, disagreement_teacher."
    ]
    ratio, disagreement, *forests = charts_of(own)
    assert [label for label, *_ in ratio.legend] == [label for label, *_ in disagreement.legend] == ["DDIL", "PD"]
    assert [chart.title.split()[0] for chart in forests] == [
        "log_shift_ratio", "disagreement_data", "log_rollout_ratio", "disagreement_teacher",
    ]  # fmt: skip
    assert [row[0] for row in forests[0].rows] == ["t = 999", "t = 749.5", "t = 500", "t = 250", "all transitions"]
    assert forests[0].text.startswith("Drift: two groups, DDIL − PD. ")


def test_an_analysis_without_a_factorial_says_what_each_reaches_alone() -> None:
    alone = [
        record({"kind": "pure", "model": model}, right=right) for model, right in (("teacher", 0.9), ("student", 0.7))
    ]
    own = {table.name: table for table in tables.build(alone)}
    assert headline(own) == [
        "The student alone has a drawn_right of 0.700 [0.669, 0.731], and the teacher alone of 0.900 [0.869, 0.931]."
    ]


def test_a_long_name_is_shown_whole() -> None:
    """It breaks between words, after the sign of a difference, and within a word that is longer than a line."""
    assert name_lines("PD + DDIL, 4 steps") == ["PD + DDIL, 4 steps"]
    assert name_lines("PD + DDIL, 4 steps − PD, 4 steps") == ["PD + DDIL, 4 steps −", "PD, 4 steps"]
    rank = "PD + DDIL of rank {}, 100 updates, 4 steps"
    assert name_lines(rank.format(4)) == ["PD + DDIL of rank 4, 100", "updates, 4 steps"]
    assert len(name_lines(f"{rank.format(4)} − {rank.format(64)}")) == 4
    assert "".join(name_lines("a" * 60)) == "a" * 60
    rows = [system(rank.format(of), 4, metrics={"fd": measured(9, 0.5, "lower", "set")}) for of in (4, 64)]
    (table,) = tables.build(rows)
    chart = charts_of({table.name: table})[-1]
    assert [value["row"].replace("\n", " ") for value in chart.spec["data"]["values"]] == [
        rank.format(4), rank.format(64)
    ]  # fmt: skip


def test_a_title_says_what_tells_its_group_apart() -> None:
    """Two analyses of one student, students of one name, more groups than a title holds, and rows of two worlds."""
    drift = {"kind": "drift", "t": 999}
    asked = [{"num_prompts": 256, "teacher_steps": steps} for steps in (16, 32)]
    found = [record(drift, experiment="drift", protocol=one, protocol_hash=f"{one}") for one in asked]
    assert set(titles(tables.groups(found)).values()) == {
        "Drift of pd_4, teacher steps 16", "Drift of pd_4, teacher steps 32",
    }  # fmt: skip
    students = [{"student": RecordedModel(reference=f"{run}/4-steps", weights_sha256=None)} for run in "ab"]
    found = [record(drift, experiment="drift", systems=one) for one in students]
    assert set(titles(tables.groups(found)).values()) == {
        "Drift of 4-steps, student a/4-steps", "Drift of 4-steps, student b/4-steps",
    }  # fmt: skip
    (both,) = tables.groups(
        [record(drift, experiment="drift", systems={"first": students[0]["student"], "second": students[1]["student"]})]
    )
    assert titles([both]) == {both.name: "Drift of a/4-steps and b/4-steps"}
    (many,) = tables.groups(drift_of_groups(["A", "B", "C", "D"]))
    assert titles([many]) == {many.name: "Drift of 4 groups, 4 steps"}
    worlds = [system("PD", 4, data={"reference": name, "hash": name}) for name in ("shapes", "coco")]
    worlds.append(system("PD", 4, data={"reference": "coco", "hash": "other"}))
    groups = tables.groups(worlds)
    assert {group.records[0].data["hash"]: titles(groups)[group.name] for group in groups} == {
        group.records[0].data["hash"]: f"Systems, data {group.records[0].data['reference']}, folder {group.name}"
        for group in groups
    }


def test_two_students_are_told_of() -> None:
    """Without a ratio over all transitions, and with one that is too large to say, the tests alone are counted."""
    kind = {"kind": "drift-difference"}
    change = {"log_shift_ratio": measured(0.5, 0.1, "lower")}
    vast = {"log_shift_ratio": measured(200, 0.1, "lower")}
    for cell, metrics, said in (
        (
            kind | {"t": "all"},
            change,
            ["The first student less the second: the ratio changes by +64.9 % [49.2, 82.2]."],
        ),
        (kind | {"t": "all"}, vast, []),
        (kind | {"t": 999}, change, []),
    ):
        (table,) = tables.build([record(cell, experiment="drift", metrics=metrics)])
        counted = "1 of 1 test of differences of students is significant after Holm's correction: 0 better and 1 worse."
        assert headline({table.name: table}) == [*said, counted]


def test_the_front_is_numbered_by_rising_cost() -> None:
    """Each number stands at its point, and its name below the chart."""
    rows = [system(name, cost, metrics={"fd": measured(value, 0.5, "lower", "set")}) for name, cost, value in FRONT]
    (table,) = tables.build(rows)
    (chart,) = quality_and_cost({table.name: table})
    assert chart.numbered == ("LCM", "PD", "teacher")
    drawn = {value["name"]: value["number"] for value in chart.spec["data"]["values"]}
    assert drawn == {"teacher": "3", "PD": "2", "LCM": "1", "DMD2": ""}
    assert chart.header[-1] == "Number on the front" and {row[0]: row[-1] for row in chart.rows} == drawn


FRONT = (("teacher", 32, 9.0), ("PD", 4, 10.0), ("LCM", 2, 11.0), ("DMD2", 4, 12.0))
"""Systems with their NFE and their distance. DMD2 is not on the front."""


def test_the_commands_name_what_is_missing(tmp_path: Path) -> None:
    save_record(system("PD", 4), tmp_path)
    page_of(tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    commands = re.findall(r"<code>(ddil eval [^<]+)</code>", text)
    assert commands[-1].endswith("--save-images") and any(line.startswith("ddil eval drift ") for line in commands)


def test_missing_transitions_of_groups_come_from_their_protocol(tmp_path: Path) -> None:
    """No options name groups of students."""
    first, *_ = drift_of_groups(["PD", "DDIL"])
    (group,) = tables.groups([first])
    (table,) = tables.build([first])
    lacking = replace(table, missing=("t = 500: no record",))
    gap = gaps([group], [lacking], tmp_path, {"strips": False, "images": False})[0]
    assert gap.commands == (f"ddil eval run PROTOCOL.yaml --out {tmp_path}",)
