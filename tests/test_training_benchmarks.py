"""The benchmarks of training: the public script's update is the same mathematics, and evaluations are counted right."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks import ddil_overhead, processes, training
from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.diffusion.parameterization import Prediction
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.phases import PhaseConfig

TINY = partial(training.stable_diffusion, (32, 32), 4, 16)


def setup(prediction: Prediction) -> training.Setup:
    """A tiny network whose updates take a moment."""
    return training.Setup(training.Network(TINY, prediction, (4, 4, 4), (3, 16), 4), 4, mixed=False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_public_scripts_updates_are_ours(prediction: Prediction) -> None:
    """The same losses, update after update, and the same operations."""
    stage = setup(prediction).lcm()
    script, ours = training.PublicScript(setup(prediction), stage), training.Ours(stage)
    for _ in range(4):
        assert float(script.update()) == pytest.approx(float(ours.update()), rel=1e-3)
    assert training.operations(script.round) == pytest.approx(training.operations(ours.round), rel=0.01)


@pytest.mark.parametrize("uses", [0, 1, 2])
def test_evaluations_are_those_of_the_formula(uses: int) -> None:
    """With the student alone in rollouts of 4 states: 3 of its evaluations, and 4 targets of 2 evaluations each."""
    tiny, updates = setup("v_prediction"), 6
    phases = [{"until": 1, "aggregated": 0.5, "p_teacher": 0}]
    told = tiny.settings(stages=[{"steps": 4, "updates": 1}], ddil={"phases": phases}, batch_size=8)
    config = ProgressiveConfig.model_validate(told)
    teacher = GuidedDenoiser(tiny.teacher().network)
    each = ddil_overhead.contender(
        uses, teacher, tiny.pool, config, PhaseConfig.model_validate(phases[0]), updates, tiny.accelerator
    )
    data, aggregated = (8 * updates, 0) if uses == 0 else (4 * updates, 4 * updates)
    collected = aggregated // max(uses, 1)
    each.block(updates)
    assert each.evaluations == 3 * 8 * updates + 2 * data + 2 * collected + 3 * collected // 4


def test_an_overhead_is_that_of_both_phases() -> None:
    rows = [("later", phase, "DDIL, 1 use", overhead) for phase, overhead in ((1, 0.01), (2, 0.06))]
    frame = pd.DataFrame(rows, columns=["stage", "phase", "method", "overhead"])
    (claim,) = ddil_overhead.summary(frame)
    assert claim.ours == pytest.approx(1 + 0.6 * 0.01 + 0.4 * 0.06) and claim.met


def test_two_processes_are_compared_with_one() -> None:
    columns = ["work", "contender", "median_s", "ratio"]
    rows = [("distill", processes.ONE, 2.0, 1.0), ("distill", processes.TWO, 2.3, 1.15)]
    (claim,) = processes.summary(pd.DataFrame(rows, columns=columns))
    assert (claim.ours, claim.peer, claim.quotient, claim.met) == (2.3, 2.0, 1.15, False)


@pytest.mark.parametrize("benchmark", [training, ddil_overhead, processes])
def test_each_says_what_it_does(benchmark: object) -> None:
    found = CliRunner().invoke(benchmark.main, ["--help"])  # type: ignore[attr-defined]
    assert found.exit_code == 0 and "--csv" in found.output
