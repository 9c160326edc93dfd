"""The analysis of made-up units: effects by hand, one correction for all tests, and sentences that say what is there."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import validate
from ddil_eval.report.comparisons import holm
from ddil_eval.study.analysis import SHARE, Effect, axes_of, effects_of
from ddil_eval.study.config import StudyConfig
from ddil_eval.study.curves import draw_curves
from ddil_eval.study.matrix import Unit, units_of
from ddil_eval.study.outputs import write_outputs
from ddil_eval.study.records import UnitRecord

STUDY: dict[str, Any] = {
    "title": "A made-up study",
    "methods": {"PD": {"method": "pd", "stages": [{"steps": 4, "updates": 10}]}},
    "sources": {"data": None, "teacher": {"phases": [{"until": 1, "aggregated": 1, "p_teacher": 1}]}},
    "shares": [0.25, 1],
    "factors": {"guidance_scale": [1.0, 3.0]},
    "seeds": 12,
    "measure": {"tested": ["end_distance"]},
}
CONFIG = validate(StudyConfig, STUDY, "the study")


def measured(unit: Unit) -> dict[str, float]:
    """With guidance 3, states of the teacher bring the end 10 % nearer; without guidance they change nothing."""
    shared, own = np.random.default_rng(unit.seed), np.random.default_rng([unit.seed, int(unit.key, 16)])
    guided = dict(unit.cell.condition.factors)["guidance_scale"] == "3"
    nearer = 0.9 if guided and unit.cell.share else 1.0
    return {
        "end_distance": float(0.1 * nearer * np.exp(shared.normal(0, 0.2) + own.normal(0, 0.01))),
        "energy_distance": float(own.normal(0, 1)),
        "disagreement_data": float(np.exp(0.1 * (unit.cell.share or 0))),
    }


@pytest.fixture(scope="module")
def done() -> dict[Unit, UnitRecord]:
    return records_of(CONFIG)


def records_of(config: StudyConfig) -> dict[Unit, UnitRecord]:
    common: dict[str, Any] = {"config": {}, "teacher_sha256": None, "seconds": 1.0, "versions": {}, "commit": None}
    return {
        unit: UnitRecord(
            unit=unit.words(), key=unit.key, seed=unit.seed, study=dict(unit.study), created="now", teacher_nfe=100,
            students={4: measured(unit)}, **common,
        )
        for unit in units_of(config)
    }  # fmt: skip


def find(effects: list[Effect], measure: str, guidance: str, share: float) -> Effect:
    (found,) = (
        e for e in effects if (e.measure, e.share) == (measure, share) and e.place.condition.factors[0][1] == guidance
    )
    return found


def test_the_matrix_is_the_product_of_its_parts() -> None:
    units = units_of(CONFIG)
    assert len(units) == 2 * 3 * 12 == len({unit.key for unit in units}) == len({unit.name for unit in units})
    assert [unit.seed for unit in units[:7]] == [0] * 6 + [1]
    first, quarter, whole = units[:3]
    assert (first.config.ddil, first.cell.source, first.config.seed) == (None, "data", 0)
    assert [unit.config.ddil.phases[0].aggregated for unit in (quarter, whole) if unit.config.ddil] == [0.25, 1.0]
    assert quarter.words() == "PD, guidance_scale 1, teacher 0.25, seed 0"


def test_effects_are_paired_by_seed_and_corrected_together(done: Mapping[Unit, UnitRecord]) -> None:
    effects = effects_of(CONFIG, done)
    effect = find(effects, "end_distance", "3", 1.0)
    columns = [
        [
            done[unit].students[4]["end_distance"]
            for unit in done
            if unit.cell.words() == f"PD, guidance_scale 3, {cell}"
        ]
        for cell in ("teacher 1", "data")
    ]
    differences = np.log(columns[0]) - np.log(columns[1])
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert effect.change == pytest.approx(tuple(np.expm1([differences.mean(), interval.low, interval.high])))
    assert effect.estimate.p_value == 2**-11 and effect.better
    tested = [e for e in effects if e.measure == "end_distance"]
    assert len(tested) == 4 and all(e.p_holm is None for e in effects if e not in tested)
    corrected = holm({place: float(e.estimate.p_value or 0) for place, e in enumerate(tested)})
    assert [e.p_holm for e in tested] == [corrected[place] for place in range(4)]
    assert not find(effects, "energy_distance", "1", 1.0).relative  # some of its values are negative
    assert effect.difficulty == pytest.approx(np.mean(columns[1]))


def test_the_page_says_what_was_found(done: Mapping[Unit, UnitRecord], tmp_path: Path) -> None:
    write_outputs(CONFIG, len(done), done, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "72 of 72 units are done" in page and "of 4 tests, 2 find that rollout states help, 0 that they harm" in page
    said = r"Teacher states \(share [\d.]+\) bring the end of the trajectory [\d.]+ % \[.+\] nearer to the teacher's \(p = 0.00"
    assert re.search(said, page)
    assert "**guidance_scale 1, 4 steps** (difficulty 0.1" in page and "None of 2 tests decides" in page
    assert "With teacher states (share 1), disagreement data rises by 11 % [11, 11]." in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "effects.csv").read_text())))
    assert len(rows) == 12 and {row["p"] == "" for row in rows if row["measure"] != "end_distance"} == {True}
    assert r"\begin{tabular}" in (tmp_path / "table-end_distance.tex").read_text()
    assert len((tmp_path / "values.csv").read_text().splitlines()) == 1 + 72
    assert (tmp_path / "effects.png").stat().st_size > 10_000


def test_three_numbers_make_a_curve(done: Mapping[Unit, UnitRecord], tmp_path: Path) -> None:
    """Shares do, and the numbers of a factor; two numbers, names and switches do not."""
    effects = effects_of(CONFIG, done)
    named = {"weak": {"guidance_range": [1, 1]}, "strong": {"guidance_range": [3, 3]}, "none": {"guidance_range": None}}
    few = {"guidance_scale": [1.0, 3.0], "student.width": [64, 128, 256], "guidance": named}
    assert axes_of(validate(StudyConfig, STUDY | {"factors": few}, "the study"), effects) == ["student.width"]
    factors = {"guidance_scale": [1.0, 1.5, 3.0]}
    config = validate(StudyConfig, STUDY | {"shares": [0.25, 0.5, 1], "factors": factors}, "the study")
    assert axes_of(config, effects) == [SHARE, "guidance_scale"]
    records = records_of(config)
    write_outputs(config, len(records), records, tmp_path)
    page = (tmp_path / "README.md").read_text()
    for axis in axes_of(config, effects):
        assert f"`effects-by-{axis}.png`: each effect over the {axis}" in page
    shares, guidance = (Image.open(tmp_path / f"effects-by-{axis}.png").size for axis in axes_of(config, effects))
    assert shares[0] > 1.5 * guidance[0]  # a panel for each guidance scale, against one with a curve for each share


def test_more_than_four_panels_of_a_measure_fill_several_rows(tmp_path: Path) -> None:
    factors = {"guidance_scale": [1.0, 2.0, 3.0, 4.0, 5.0]}
    config = validate(StudyConfig, STUDY | {"shares": [0.25, 0.5, 1], "factors": factors}, "the study")
    draw_curves(config, effects_of(config, records_of(config)), SHARE, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:  # inches of two rows and three columns, and of the legend
        assert picture.size == (round(150 * (3 * 3.2 + 2.2)), round(150 * (2 * 2.9 + 0.6)))
        pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape
    rows, columns = (slice(0, height // 2), slice(height // 2, None)), [slice(x, x + 350) for x in (120, 620, 1090)]
    drawn = [[bool((pixels[row, column] < 200).any()) for column in columns] for row in rows]
    assert drawn == [[True, True, True], [True, True, False]] and width == 1770  # five panels, and no sixth


def test_names_keep_their_letters_and_are_no_formulas(tmp_path: Path) -> None:
    phases = STUDY["sources"]["teacher"]
    sources = {"data": None, "DDIL": phases, "$\\x$ of_ddil": phases}
    config = validate(StudyConfig, STUDY | {"sources": sources, "shares": [0.25, 0.5, 1]}, "the study")
    records = records_of(config)
    write_outputs(config, len(records), records, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "DDIL states (share" in page and "Ddil" not in page
    assert (tmp_path / "effects-by-share.png").is_file() and (tmp_path / "effects.png").is_file()


def test_nothing_is_drawn_of_a_measure_that_no_student_has(done: Mapping[Unit, UnitRecord], tmp_path: Path) -> None:
    measure = {"kinds": ["points"], "tested": ["end_disagreement_student"]}
    config = validate(StudyConfig, STUDY | {"shares": [0.25, 0.5, 1], "measure": measure}, "the study")
    write_outputs(config, len(done), done, tmp_path)
    assert (tmp_path / "README.md").is_file() and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "nothing"}, "the baseline 'nothing' is no source"),
        ({"seeds": 1}, "2 to 40 seeds"),
        ({"seeds": [3, 3]}, "2 to 40 seeds|different whole numbers"),
        ({"shares": [0.5, 0.5]}, "a share stands twice"),
        ({"factors": {"guidance_scale": []}}, "has no values"),
        ({"budgets": "updates"}, "budgets"),
        ({"measure": {"kinds": ["images"]}}, "belong together"),
        ({"measure": {"tested": []}}, "tested"),
        (
            {"factors": {"student.width": [64], "size": {"small": {"student": {"width": 8}}}}},
            "the factors 'student.width' and 'size' both set 'student.width'",
        ),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongCommand, match=said):
        validate(StudyConfig, STUDY | change, "the study")


def test_a_condition_that_does_not_fit_its_method_is_named() -> None:
    config = validate(StudyConfig, STUDY | {"factors": {"guidance": [1]}}, "the study")
    with pytest.raises(WrongCommand, match=r"the condition 'PD, guidance 1'.*guidance"):
        units_of(config)
