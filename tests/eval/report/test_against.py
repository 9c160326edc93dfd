"""Two results folders side by side: which cells meet, which values may be compared, what the tests say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ddil_eval.report.against import Against, compare_results
from ddil_eval.report.against_tables import against_tables, summary, worst_sentence
from ddil_eval.report.records import Record, RecordedModel
from ddil_eval.statistics.estimate import estimate_mean
from ddil_eval.statistics.independent import independent_difference
from tests.records import measured, p_teacher, record, system


def compared(new: Sequence[Record], old: Sequence[Record], scores: dict[int, np.ndarray] | None = None) -> Against:
    kept = scores or {}
    find = lambda record, metric: kept.get(id(record)) if metric == "clip" else None  # noqa: E731
    return compare_results(new, old, find, find, lambda metric: False)


def of(name: str, **metrics: Any) -> Record:
    return system(name, 4, metrics=metrics)


def test_each_value_is_judged_by_its_direction_after_holms_correction() -> None:
    new = [of("a", fd=measured(60, 1, "lower", "set"), clip=measured(0.95, 0.01)), of("b", clip=measured(0.91, 0.05))]
    old = [of("a", fd=measured(50, 1, "lower", "set"), clip=measured(0.90, 0.01)), of("b", clip=measured(0.90, 0.05))]
    found = compared(new, old)
    assert [(c.metric, c.result) for c in found.comparisons] == [
        ("fd", "worse"), ("clip", "better"), ("clip", "not significant"),
    ]  # fmt: skip
    values = [(m.metrics[name].estimate, o.metrics[name].estimate, degrees) for m, o, name, degrees in (
        (new[0], old[0], "fd", 19), (new[0], old[0], "clip", 255), (new[1], old[1], "clip", 255))]  # fmt: skip
    expected = [independent_difference(*row).p_value or 0.0 for row in values]
    assert [c.difference and c.difference.p_value for c in found.comparisons] == pytest.approx(expected)
    smallest, middle, largest = sorted(expected)
    assert sorted(c.corrected or 0.0 for c in found.comparisons) == pytest.approx([3 * smallest, 2 * middle, largest])
    assert found.worst is found.comparisons[0]
    assert (worst_sentence(found) or "").startswith("a is significantly worse in fd: 50 → 60, difference +10 [8.59, 1")


def test_scores_of_the_same_prompts_make_the_test_paired() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=256)
    after = before + generator.normal(0.1, 0.1, size=256)
    new, old = (of("a", clip=measured(float(s.mean()), 0.12)) for s in (after, before))
    paired = compared([new], [old], {id(new): after, id(old): before}).comparisons[0]
    expected = estimate_mean(np.stack([after, before], axis=1), np.array([1.0, -1.0]))
    assert paired.paired and paired.result == "better" and paired.difference is not None
    assert (paired.difference.low, paired.difference.p_value) == (expected.low, expected.p_value)
    assert compared([new], [old]).comparisons[0].result == "not significant"  # the intervals alone show nothing
    elsewhere = old.model_copy(update={"data": old.data | {"prompt_ids_sha256": "d" * 64}})
    apart = compared([new], [elsewhere], {id(new): after, id(elsewhere): before}).comparisons[0]
    assert not apart.paired


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"recipe": "coco"}, "mean", "recipe coco → shapes-64"),
        ({"recipe": "shapes-64 (256 → 500)"}, "mean", None),
        ({"n": 128}, "set", "N 128 → 256, on which the value depends"),
        ({"n": 128}, "mean", None),
        ({"data": {"reference": "other"}}, "set", "other reference images"),
        ({"data": {"reference": "other"}}, "mean", None),
        ({"note": "too few images"}, "mean", "the old value is not reliable: too few images"),
        ({"network": {"name": "clip", "version": 2}}, "mean", "another network or version of the metric"),
        ({"systems": {"model": RecordedModel(reference="x", weights_sha256="e" * 64)}}, "set", None),
    ],
)
def test_what_forbids_a_comparison(changes: dict[str, Any], kind: str, why: str | None) -> None:
    first = measured(1.0, 0.1, kind=kind).model_copy(update={"network": {"name": "clip", "version": 1}})
    estimate = first.estimate.model_copy(update={k: v for k, v in changes.items() if k in ("n", "note")})
    second = first.model_copy(update={"estimate": estimate} | {k: v for k, v in changes.items() if k == "network"})
    fields = {key: value for key, value in changes.items() if key in ("recipe", "data", "systems")}
    found = compared([of("a", clip=first)], [system("a", 4, metrics={"clip": second}, **fields)])
    (comparison,) = found.comparisons
    assert comparison.why_not == why and (comparison.difference is None) == (why is not None)
    assert len(summary(found)["not_compared"]) == (why is not None)


def test_cells_meet_by_experiment_and_entries_and_the_rest_is_named() -> None:
    pair = record({"kind": "difference", "name": "a − b", "of": ["a", "b"]}, experiment="systems")
    new = [p_teacher(0.8), p_teacher(0.4), system("PD", 4, cell={"kind": "system", "name": "PD", "paper": "x"}), pair]
    old = [p_teacher(0.8, fd=None), system("LCM", 4), system("PD", 4, cell={"kind": "system", "name": "PD"}), pair]
    found = compared(new, old)
    assert {c.new.kind for c in found.comparisons} == {"p_teacher", "system"} and found.left_out == 1
    said = summary(found)
    assert (said["only_in_new"], said["only_in_old"]) == (["p_teacher = 0.4"], ["LCM"])
    assert said["metrics_in_one"] == ["p_teacher = 0.8: only the new has fd_efflite0"]


def test_few_training_seeds_leave_few_degrees_of_freedom() -> None:
    cells = [{"kind": "drift-group", "name": "PD", "t": 749, "training_seeds": n} for n in (3, 5)]
    spread = record(cells[0] | {"kind": "drift-group-spread"}, experiment="drift")
    new, old = (record(cells[0], experiment="drift", fd=None, right=value) for value in (0.5, 0.9))
    found = compared([new, spread], [old, record(cells[1], experiment="drift"), spread])
    (comparison,) = found.comparisons
    expected = independent_difference(new.metrics["drawn_right"].estimate, old.metrics["drawn_right"].estimate, 2)
    assert comparison.corrected == expected.p_value and found.left_out == 1
    assert summary(found)["only_in_old"] == ["drift-group, name = PD, t = 749, training_seeds = 5"]


def test_the_degrees_of_freedom_of_a_record_are_those_of_its_test() -> None:
    """Half-widths 3 and 4 are those of standard errors: their difference has the half-width 5."""
    cell = {"kind": "system", "name": "PD", "steps": 4, "training_seeds": 5}
    values = [measured(value, half) for value, half in ((0.0, 3.0), (8.0, 4.0))]
    told = [
        value.model_copy(update={"estimate": value.estimate.model_copy(update={"degrees": degrees})})
        for value, degrees in zip(values, (30.5, 12.25), strict=True)
    ]
    p_values = []
    for new, old in (told, [told[0], values[1]], values):
        found = compared(
            [system("", 4, cell=cell, metrics={"clip": new})], [system("", 4, cell=cell, metrics={"clip": old})]
        )
        p_values.append(found.comparisons[0].difference.p_value)  # type: ignore[union-attr]
    expected = [2 * stats.t.sf(stats.t.ppf(0.975, degrees) * 8 / 5, degrees) for degrees in (12.25, 4, 4)]
    assert p_values == pytest.approx(expected)
    assert p_values[0] < p_values[1] / 2


def test_two_students_of_one_folder_meet_by_the_fewest_changes() -> None:
    models = [{"student": RecordedModel(reference=f"runs/{n}", weights_sha256=n * 64)} for n in "ab"]
    new = [p_teacher(0.8, fd=value, systems=m) for m, value in zip(models, (1.0, 2.0), strict=True)]
    old = [p_teacher(0.8, fd=value, systems=m) for m, value in zip(models[::-1], (2.5, 1.5), strict=True)]
    found = compared(new, old)
    table = against_tables(found)[0]
    assert [(row[0], row[3].value) for row in table.rows if row[3]] == [  # type: ignore[union-attr]
        ("p_teacher = 0.8 (runs/a)", -0.5), ("p_teacher = 0.8 (runs/b)", -0.5),
    ]  # fmt: skip
    assert found.comparisons and all(c.corrected == 1.0 for c in found.comparisons if c.metric == "drawn_right")


def test_tables_say_what_changed_and_mark_significant_differences() -> None:
    old = [system(name, 4, solver="lcm", versions={"torch": "2.10"}) for name in ("a", "b")]
    new = [system("a", 4, fd=20.0), system("b", 4)]
    table = against_tables(compared(new, old))[0]
    assert table.title == "systems: fd_efflite0" and table.significant == {(0, 3)}
    assert [row[4] for row in table.rows] == ["worse", "not significant"]
    assert table.notes[-1] == "Changed settings (solver lcm → ddim; torch 2.10 → 2.11.0): all cells."
    assert table.header()[7:12] == [
        "difference", "difference_low", "difference_high", "difference_p", "difference_p_holm",
    ]  # fmt: skip
