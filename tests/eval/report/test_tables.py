"""Records → tables: each measured cell has its place, missing cells stay empty, and settings do not mix."""

from __future__ import annotations

import itertools
from decimal import Decimal
from pathlib import Path

import pytest

from ddil_core.support import resources
from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric
from ddil_eval.report.table_type import Table
from ddil_eval.report.tables import build, groups
from tests.records import measured, p_teacher, record, system

FD = RecordedEstimate(value=12.5, low=12.0, high=13.0, n=256)
RIGHT = RecordedEstimate(value=0.75, low=0.71875, high=0.78125, n=256)


def by_name(records: list[Record]) -> dict[str, Table]:
    tables = build(records)
    assert len({table.group for table in tables}) == 1
    return {table.name: table for table in tables}


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "table5"])
def test_the_papers_numbers_are_unchanged(name: str, shared: Path) -> None:
    assert (resources.paper_results() / f"{name}.csv").read_bytes() == (
        shared / "reference" / f"{name}.csv"
    ).read_bytes()


def test_table_2_puts_measured_and_paper_side_by_side() -> None:
    table = by_name([p_teacher(0.8), p_teacher(0.2, nfe=14.4, n_done=250)])["table2"]
    assert [c.key for c in table.columns] == [
        "p_teacher", "fd_efflite0", "drawn_right", "n", "nfe", "paper_fid", "paper_clip",
    ]  # fmt: skip
    assert table.rows == (
        (0.8, FD, RIGHT, 256, 40.8, Decimal("23.14"), Decimal("0.319")),
        (0.6, None, None, None, None, Decimal("22.33"), Decimal("0.317")),
        (0.4, None, None, None, None, Decimal("21.95"), Decimal("0.313")),
        (0.2, FD, RIGHT, 250, 14.4, Decimal("21.92"), Decimal("0.307")),
    )
    assert table.missing == ("p_teacher = 0.6: no record", "p_teacher = 0.4: no record")
    assert "Fewer samples than requested: p_teacher = 0.2 (250 of 256)." in table.notes
    assert table.caption == (
        "At each transition the teacher acts with probability p_teacher, else the student. Teacher shapes, student "
        "runs/pd_4, data shapes val, recipe shapes-64, solver ddim, guidance 3, reflection clamp, seed 0, N requested 256; "
        "brackets contain 95% intervals."
    )


@pytest.mark.parametrize(
    ("name", "kind", "fid"),
    [("table3", "teacher_then_student", "23.60"), ("table4", "student_then_teacher", "21.64")],
)
def test_who_acts_first_decides_between_tables_3_and_4(name: str, kind: str, fid: str) -> None:
    tables = by_name([record({"kind": kind, "switch_t": 749})])
    assert [row[0] for row in tables[name].rows] == [749, 500, 250]
    assert tables[name].rows[0][1:3] == (FD, RIGHT)
    assert str(tables[name].rows[0][-2]) == fid
    other = {"table3": "table4", "table4": "table3"}[name]
    assert tables[other].missing == tuple(f"switch_t = {t}: no record" for t in (749, 500, 250))


def test_settings_beyond_the_papers_get_rows_with_no_paper_number() -> None:
    rows = by_name([p_teacher(0.5)])["table2"].rows
    assert [row[0] for row in rows] == [0.8, 0.6, 0.5, 0.4, 0.2]
    assert rows[2][-2:] == (None, None)


def test_a_metric_that_one_record_lacks_is_named() -> None:
    table = by_name([p_teacher(p) for p in (0.8, 0.6, 0.4)] + [p_teacher(0.2, right=None)])["table2"]
    assert table.rows[3][2] is None
    assert table.missing == ("p_teacher = 0.2: its record has no drawn_right",)


def test_pure_runs() -> None:
    table = by_name([record({"kind": "pure", "model": "student"}, nfe=4.0)])["pure"]
    assert table.rows == (("teacher", None, None, None, None), ("student", FD, RIGHT, 256, 4.0))
    assert table.missing == ("the pure teacher: no record",)


def test_the_factorial_has_all_strings_effects_and_pairs() -> None:
    strings = ["".join(letters) for letters in itertools.product("TS", repeat=4)]
    records = [record({"kind": "string", "string": s}, fd=float(i)) for i, s in enumerate(strings)]
    indices = [[0], [1], [2], [3], [0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    records += [record({"kind": "effect", "transitions": i}, fd=float(len(i)), nfe=None) for i in indices]
    tables = by_name(records)
    assert [row[0] for row in tables["strings"].rows] == strings
    assert [row[1].value for row in tables["strings"].rows] == list(range(16))  # type: ignore[union-attr]
    assert [row[0] for row in tables["main-effects"].rows] == ["999→749", "749→500", "500→250", "250→clean"]
    assert len(tables["interactions"].rows) == 6
    assert tables["interactions"].missing == ("effect of 500→250 × 250→clean: no record",)
    assert "nfe" not in tables["main-effects"].header()


def test_without_strings_there_is_no_factorial() -> None:
    assert set(by_name([p_teacher(0.8)])) == {"pure", "table2", "table3", "table4"}


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "gigagan"},
        {"protocol_hash": "1" * 64},
        {"n_asked": 512},
        {"seeds": [1]},
        {"guidance_scale": 2.0},
        {"systems": {"teacher": {"reference": "shapes", "weights_sha256": None}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_are_never_mixed_in_a_table(change: dict[str, object]) -> None:
    tables = [t for t in build([p_teacher(0.8), p_teacher(0.6, **change)]) if t.name == "table2"]
    assert len(tables) == 2 and tables[0].label != tables[1].label
    assert [sum(row[1] is not None for row in table.rows) for table in tables] == [1, 1]


def test_the_newest_record_is_shown_and_the_older_one_told() -> None:
    new = p_teacher(0.8, fd=11.0, created="2026-06-01T00:00:00+02:00")
    for records in ([p_teacher(0.8), new], [new, p_teacher(0.8)]):
        table = by_name(records)["table2"]
        assert table.rows[0][1].value == 11.0  # type: ignore[union-attr]
        assert "The table shows the newest records. Older records with other numbers, not shown: 1." in table.notes


def difference(kind: str, a: str, b: str, **changes: object) -> Record:
    cell = {"kind": kind, "name": f"{a} − {b}", "of": [a, b]}
    return record(cell, **({"experiment": "systems", "nfe": None, "systems": {}} | changes))


def test_systems_and_their_paired_differences() -> None:
    records = [system("teacher", 4), system("PD", 4, guidance_scale=None), system("teacher", 32)]
    records.append(difference("difference", "PD + DDIL", "PD"))
    tables = by_name(records)
    assert [row[:5] for row in tables["systems"].rows] == [
        ("PD", 4, "ddim", "none", "shapes-64"), ("teacher", 32, "ddim", "3", "shapes-64"),
        ("teacher", 4, "ddim", "3", "shapes-64"),
    ]  # fmt: skip
    assert tables["differences"].rows == (("PD + DDIL − PD", FD, RIGHT, 256),)
    assert [group.experiment for group in groups(records)] == ["systems"]


def test_a_comparison_has_its_protocols_rows_in_its_order_and_the_papers_numbers() -> None:
    rows: list[dict[str, object]] = [
        {"name": "SD", "steps": 50, "paper": "SD"},
        {"name": "DMD", "steps": 1, "paper": "DMD"},
        {"name": "ours", "steps": 4},
    ]
    protocol = {"systems": rows}
    records = [
        system("ours", 4, protocol=protocol),
        system("SD", 50, protocol=protocol, cell={"kind": "system", "name": "SD", "steps": 50, "paper": "SD"}),
    ]
    table = by_name(records)["systems"]
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        ("SD", 50, Decimal("13.45")), ("DMD", 1, Decimal("14.93")), ("ours", 4, None),
    ]  # fmt: skip
    assert table.rows[1][2:-1] == (None,) * 7  # nothing of an absent row is filled in
    assert table.missing == ("DMD: no record",)


def test_rows_of_different_recipes_are_in_different_tables_and_each_says_its_own() -> None:
    tables = build([system("a", 4, recipe="gigagan"), system("b", 4, recipe="bk-sdm")])
    recipe = [column.key for column in tables[0].columns].index("recipe")
    assert sorted((row[0], row[recipe]) for table in tables for row in table.rows) == [
        ("a", "gigagan"),
        ("b", "bk-sdm"),
    ]
    assert len(tables) == 2 and len({table.label for table in tables}) == 2
    assert sorted(table.caption.count("recipe gigagan") for table in tables) == [0, 1]


def with_p(value: float, half: float, p_value: float | None) -> dict[str, RecordedMetric]:
    estimate = RecordedEstimate(value=value, low=value - half, high=value + half, n=256, p_value=p_value)
    return {"fd_efflite0": RecordedMetric(estimate=estimate, direction="lower", kind="set")}


@pytest.mark.parametrize(
    ("value", "half", "p_value", "marked"),
    [
        (-2.0, 1.0, None, True),  # without a p-value the interval decides
        (-2.0, 3.0, None, False),
        (-2.0, 1.0, 0.2, False),  # with one the p-value does
        (-2.0, 3.0, 0.04, True),
        (-2.0, 3.0, 0.05, False),
    ],
)
def test_a_difference_is_marked_where_it_is_significant(
    value: float, half: float, p_value: float | None, marked: bool
) -> None:
    table = by_name([difference("difference", "a", "b", metrics=with_p(value, half, p_value))])["differences"]
    assert table.significant == (frozenset({(0, 1)}) if marked else frozenset())
    ends = ("", "_low", "_high", "_p", "_p_holm")
    assert table.header() == ["difference", *(f"fd_efflite0{end}" for end in ends), "n"]
    assert table.flat()[0][1:5] == [value, value - half, value + half, p_value]
    assert "A star marks a difference from 0 at the 5% level" in table.caption


@pytest.mark.parametrize(
    ("kind", "p_value", "best"), [("difference", 0.01, True), ("pair", 0.01, True), ("pair", 0.3, False)]
)
def test_the_best_of_a_column_is_marked_where_the_next_is_significantly_worse(
    kind: str, p_value: float, best: bool
) -> None:
    systems = [system(name, 4, fd=fd, right=None) for name, fd in (("a", 13.0), ("b", 12.9), ("c", 20.0))]
    records = [*systems, difference(kind, "a", "b", metrics=with_p(0.1, 0.05, p_value))]
    table = by_name(records)["systems"]
    place = [column.key for column in table.columns].index("fd_efflite0")
    assert table.best == (frozenset({(1, place)}) if best else frozenset())
    assert [t.name for t in build(records)] == ["systems", *(["differences"] if kind == "difference" else [])]


def test_the_difference_of_another_pair_of_the_same_name_says_nothing() -> None:
    systems = [system("a", steps, fd=fd, right=None) for steps, fd in ((4, 13.0), (2, 20.0))]
    records = [*systems, system("b", 4, fd=12.9, right=None)]
    records.append(difference("difference", "a", "b", metrics=with_p(7.1, 0.05, 0.01)))
    assert by_name(records)["systems"].best == frozenset()


def test_without_their_difference_intervals_that_do_not_overlap_decide() -> None:
    apart, near = ([system("a", 4, fd=12.0, right=None), system("b", 4, fd=fd, right=None)] for fd in (13.1, 12.9))
    assert len(by_name(apart)["systems"].best) == 1
    assert by_name(near)["systems"].best == frozenset()


def test_higher_is_better_where_it_is() -> None:
    records = [
        system("a", 4, fd=None, right=0.9),
        system("b", 4, fd=None, right=0.5),
        system("c", 4, fd=None, right=0.95),
    ]
    pair = {
        "drawn_right": RecordedMetric(
            estimate=RecordedEstimate(value=0.05, low=0.01, high=0.09, n=256), direction="higher", kind="mean"
        )
    }
    table = by_name([*records, difference("pair", "c", "a", metrics=pair)])["systems"]
    place = [column.key for column in table.columns].index("drawn_right")
    assert table.best == frozenset({(2, place)})


def test_records_of_other_experiments_make_no_table() -> None:
    assert build([p_teacher(0.8, experiment="coco")]) == []


def test_an_effect_may_be_negative() -> None:
    metrics = {"fd_efflite0": measured(-0.5, 0.25, "lower", "set")}
    table = by_name([record({"kind": "effect", "transitions": [0]}, metrics=metrics, nfe=None)])["main-effects"]
    assert table.rows == (("999→749", metrics["fd_efflite0"].estimate, 256),)
