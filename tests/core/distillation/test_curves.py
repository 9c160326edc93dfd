"""Shares and probabilities that move over a phase: their values and means are those of the straight line."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ddil_core.data.pool import LatentPool
from ddil_core.distillation.checks import most_states
from ddil_core.distillation.config import Collection, ProgressiveConfig
from ddil_core.distillation.cost import evaluations, progressive_costs
from ddil_core.distillation.phases import PAPER_PHASES, DdilConfig, Line, PhaseConfig, curve_mean
from ddil_core.distillation.sources import aggregated_rows, aggregated_uses
from ddil_core.models.model import Model
from ddil_core.support.commented import commented
from ddil_core.support.errors import WrongCommand
from ddil_core.support.plain_yaml import load_plain
from ddil_core.support.protocol import validate
from tests.core.distillation import test_progressive

FALLING = {"start": 1.0, "end": 0.0}
"""piFlow's ``teacher_ratio``: from the teacher alone to the student alone."""


def config(*phases: dict[str, Any], **more: Any) -> ProgressiveConfig:
    ddil = {"collect_every": 10, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5} | p for p in phases]}
    stages = {"stages": [{"steps": 4, "updates": 40}], "batch_size": 8}
    return ProgressiveConfig.model_validate(stages | {"ddil": ddil | more})


def test_a_line_at_given_updates_and_its_mean() -> None:
    line = Line(start=0.9, end=0.1)
    values = [curve_mean(line, [step], 100, 141) for step in (100, 110, 120, 140)]
    assert values == pytest.approx([0.9, 0.7, 0.5, 0.1], abs=1e-12)
    for first, end in ((0, 7), (100, 141), (3, 5)):
        assert curve_mean(line, range(first, end), first, end) == pytest.approx(0.5, abs=1e-12)
    assert curve_mean(line, [5], 5, 6) == 0.5  # a phase of one batch
    assert curve_mean(0.85, range(7), 0, 7) == 0.85  # exactly, as before


def test_the_teachers_probability_falls_from_collection_to_collection() -> None:
    told = config({"p_teacher": FALLING})
    found, pending = {}, 0
    for step in range(40):
        p_teacher, count, uses = aggregated_uses(told, 0, 40, step, pending)
        if uses:
            found[step] = p_teacher
        pending += uses - count
    assert found == pytest.approx({step: 1 - (step + 4.5) / 39 for step in (0, 10, 20, 30)})
    assert sum(found.values()) / 4 == pytest.approx(0.5)


def test_the_share_of_a_batch_rises_over_its_phase_alone() -> None:
    told = config({"until": 0.5, "aggregated": 0.25}, {"aggregated": {"start": 0.0, "end": 1.0}})
    counts = [aggregated_uses(told, 0, 82, step, 10**6)[1] for step in range(82)]
    assert counts[:41] == [2] * 41
    share = [step / 40 for step in range(41)]
    assert counts[41] == 0 and counts[51] == 2 and counts[61] == 4 and counts[81] == 8
    assert counts[41:] == [aggregated_rows(told, 0, value, step) for step, value in enumerate(share, 41)]
    assert sum(counts[41:]) == pytest.approx(8 * 41 * 0.5, abs=4 * (41 * 0.25) ** 0.5)


def test_a_stage_takes_what_its_curves_foretell(model: Model, pool: LatentPool) -> None:
    """The batches have their shares, and the teacher is evaluated as often as the configuration says beforehand."""
    phases = (
        PhaseConfig(until=0.5, aggregated=Line(start=0.1, end=0.9), p_teacher=Line.model_validate(FALLING)),
        PhaseConfig(until=1, aggregated=1, p_teacher=0.0),  # only rollouts of the student
    )
    trainer = test_progressive.stage(model, pool, updates=10, phases=phases, uses=2)
    with test_progressive.rows_through(model.denoiser.net) as rows:
        shares = [float(trainer.update(step)["aggregated_fraction"]) for step in range(10)]
    size = trainer.config.batch_size
    assert shares[5:] == [1.0] * 5
    assert all(abs(share - (0.1 + 0.2 * step)) < 1 / size for step, share in enumerate(shares[:5]))
    costs = progressive_costs(trainer.config, model)
    assert evaluations(trainer.config, costs) == sum(rows) > 0


def test_the_capacity_suffices_for_the_largest_share() -> None:
    stage = Collection("a stage", 40, (50, 4))
    for told, same in (
        ({"aggregated": {"start": 0.1, "end": 0.8}}, {"aggregated": 0.8}),
        ({"p_teacher": {"start": 0, "end": 1}}, {}),
    ):
        ddil, flat = config(told).ddil, config(same).ddil
        assert ddil is not None and flat is not None
        assert most_states(ddil, stage, 8) == most_states(flat, stage, 8)


def test_configurations_without_curves_are_written_as_before() -> None:
    dumped = DdilConfig().model_dump(mode="json")["phases"]
    assert dumped[0] == {"until": 0.6, "aggregated": 0.25, "p_teacher": 0.85}
    assert PhaseConfig.model_validate({"until": 1, "aggregated": 1, "p_teacher": 0}).model_dump() == {
        "until": 1.0,
        "aggregated": 1.0,
        "p_teacher": 0.0,
    }
    assert DdilConfig().phases == PAPER_PHASES


def test_a_printed_curve_is_read_again() -> None:
    told = config({"p_teacher": FALLING, "aggregated": {"start": 0.2, "end": 0.4}})
    assert ProgressiveConfig.model_validate(load_plain(commented(told))) == told
    assert ProgressiveConfig.model_validate(told.model_dump(mode="json")) == told


def test_a_curve_that_does_not_fit_is_one_sentence() -> None:
    wanted = "it takes a number from 0 to 1 or a mapping of the keys start and end"
    for value, key in itertools.product((1.5, {"start": 2, "end": 0}, {"from": 1}, True), ("aggregated", "p_teacher")):
        phase = {"until": 1, "aggregated": 0.5, "p_teacher": 0.5} | {key: value}
        with pytest.raises(WrongCommand) as error:
            validate(DdilConfig, {"phases": [phase]}, "p.yaml")
        shown = "true" if value is True else repr(value)
        assert str(error.value) == f"p.yaml has a value that does not fit at 'phases.0.{key}': {wanted}, not {shown}"
