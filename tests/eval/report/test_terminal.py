"""Tables on terminals of 80 and 120 columns: golden, no word broken, every cell shown."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from ddil_core.support.text import break_text
from ddil_eval.report.against import compare_results
from ddil_eval.report.against_tables import against_tables
from ddil_eval.report.records import read_records
from ddil_eval.report.rendering import notes_below, printed_cells
from ddil_eval.report.table_type import Table
from ddil_eval.report.tables import build
from ddil_eval.report.terminal import to_rich
from tests.records import measured, p_teacher, record, system

METRICS = {
    "fd_efflite0": measured(54.25, 1.5, "lower", "set"),
    "clip_score_shapes": measured(0.93164, 0.0025),
    "drawn_right": measured(0.90625, 0.0175),
}

NARROW = """\
                                                              fd_
  System                  Steps  Solver    Guidance    efflite0 ↓
  ───────────────────────────────────────────────────────────────
  PD                      4      ddim      1                 54.2
                                                     [52.8, 55.8]
  runs/a-very-long-name-  4      dpmpp_2m  7.5               54.2
  of-a-run                                           [52.8, 55.8]


                               clip_score_          drawn_             FID ↓
  System                          shapes ↑         right ↑    N   NFE  paper
  ──────────────────────────────────────────────────────────────────────────
  PD                                0.9316           0.906  256     4  13.97
                          [0.9291, 0.9341]  [0.889, 0.924]
  runs/a-very-long-name-            0.9316           0.906  256  2345
  of-a-run                [0.9291, 0.9341]  [0.889, 0.924]
"""

WIDE = """\
                                                              fd_       clip_score_          drawn_             FID ↓
  System                  Steps  Solver    Guidance    efflite0 ↓          shapes ↑         right ↑    N   NFE  paper
  ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  PD                      4      ddim      1                 54.2            0.9316           0.906  256     4  13.97
                                                     [52.8, 55.8]  [0.9291, 0.9341]  [0.889, 0.924]
  runs/a-very-long-name-  4      dpmpp_2m  7.5               54.2            0.9316           0.906  256  2345
  of-a-run                                           [52.8, 55.8]  [0.9291, 0.9341]  [0.889, 0.924]
"""


def systems(**changes: object) -> list[Table]:
    rows = [
        system("PD", 4, cell={"kind": "system", "name": "PD", "steps": 4, "paper": "PD + DDIL"}, guidance_scale=1.0),
        system("runs/a-very-long-name-of-a-run", 4, solver="dpmpp_2m", guidance_scale=7.5, nfe=2345.0),
    ]
    return build([row.model_copy(update={"metrics": METRICS} | changes) for row in rows])


def on_terminal(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as shown:
        console.print(to_rich(table))
    return [line.rstrip() for line in shown.get().splitlines()]


def body(lines: list[str]) -> str:
    """The lines of the table, without its caption and notes."""
    first = next(place for place, line in enumerate(lines) if not line) + 1
    last = max(place for place, line in enumerate(lines) if re.match(r"  \S|    .*\[", line))
    return "\n".join(lines[first : last + 1]) + "\n"


def test_a_table_of_systems_fits_80_columns() -> None:
    assert body(on_terminal(systems()[0], 80)) == NARROW


def test_a_table_of_systems_fits_120_columns() -> None:
    assert body(on_terminal(systems()[0], 120)) == WIDE


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_of_the_shipped_results_fit(root: Path, width: int) -> None:
    """No line is too long, and no caption, note, value or interval is cut or broken."""
    records = read_records(root / "results" / "shapes")
    nothing = compare_results(records, records, lambda *_: None, lambda *_: None, lambda _: False)
    tables = build(records) + against_tables(nothing)
    assert len(tables) > 20
    for table in tables:
        lines = on_terminal(table, width)
        assert max(map(len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        assert all(whole in text for whole in (f"{table.title}. {table.caption}", *notes_below(table)))
        measured_at = [place for place, column in enumerate(table.columns) if column.source != "setting"]
        numbers = {line for row in printed_cells(table) for place in measured_at for line in row[place]}
        assert all(number in "\n".join(lines) for number in numbers)


def test_no_name_steers_the_terminal() -> None:
    hostile = "\x1b]0;title\x07\x1b[2J\u202ex\r\n\x9b1A"
    rows = [system(hostile, 4, recipe=hostile, metrics={"m\x1b[1m": measured(1.0, 0.5)}) for _ in range(2)]
    for width in (40, 120):
        text = "\n".join(on_terminal(build(rows)[0], width))
        assert all(c.isprintable() for c in text.replace("\n", "")) and r"\x1b]0;title\x07" in text


@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 140, 200])
def test_no_word_is_broken_and_every_cell_is_there(width: int) -> None:
    """Every line of every cell stands whole in the text, at any width that the widest cell fits."""
    tables = [
        *systems(),
        *build([p_teacher(0.8), p_teacher(0.4, right=None)]),
        *build([record({"kind": "effect", "transitions": [0]}, nfe=None)]),
        *build([record({"kind": "difference", "name": "LCM-LoRA + DDIL − teacher, undistilled", "of": ["a", "b"]},
                       experiment="systems", systems={})]),
    ]  # fmt: skip
    assert len(tables) > 4
    for table in tables:
        lines = on_terminal(table, width)
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        shown = [cell for row in printed_cells(table) for place, cell in enumerate(row) if not
                 table.columns[place].in_caption]  # fmt: skip
        for part in {part for cell in shown for line in cell for part in line.split(", ")}:
            for word in re.findall(r"[^\s/_+−-]+[/_+−-]*", part):
                assert word in text


def test_a_caption_states_what_the_narrow_table_leaves_out() -> None:
    (table, *_) = systems()
    assert "Recipe" in "\n".join(on_terminal(table, 200)) and "Recipe" not in "\n".join(on_terminal(table, 80))
    assert "recipe shapes-64" in table.caption


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("teacher, undistilled", ["teacher,", "undistilled"]),
        ("runs/shapes-ddil/student", ["runs/shapes-", "ddil/student"]),
        ("lcm + ddil − lcm", ["lcm + ddil −", "lcm"]),
        ("abcdefghijklmnopqrst", ["abcdefghijklmnopqrst"]),
        ("", [""]),
        ("a", ["a"]),
    ],
)
def test_text_breaks_between_words_and_after_signs(text: str, lines: list[str]) -> None:
    assert break_text(text, 12).split("\n") == lines
    assert re.sub(r"\s", "", break_text(text, 12)) == re.sub(r"\s", "", text)


def test_scored_folders_claim_neither_prompts_nor_seeds_nor_guidance() -> None:
    unknown = {"protocol": {"experiment": "score", "reference": "real"}, "solver": "unknown", "grid": [],
               "guidance_scale": None, "nfe": None, "seeds": []}  # fmt: skip
    folder = system("photos", 4, cell={"kind": "system", "name": "photos"}, **unknown)
    pair = record({"kind": "difference", "name": "b − photos", "of": ["b", "photos"]},
                  experiment="systems", systems={}, **unknown)  # fmt: skip
    table, differences = build([folder, pair])
    assert table.title == "Folders" and table.caption.startswith("Folders of images against one reference. Bold marks")
    assert differences.caption.startswith("Paired differences between folders of images with the same ids. ")
    assert not any("same prompts" in each.caption for each in (table, differences))
    assert "seed unknown" in table.caption
    assert table.rows[0][:4] == ("photos", None, "unknown", "unknown")
    made = build([system("PD", 4)])[0]
    assert made.title == "Systems" and made.caption.startswith("Systems on the same prompts and seeds.")
