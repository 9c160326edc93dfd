"""The evaluations of the teacher that the configuration foretells are those that the updates make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.conversion import ConversionStage
from ddil_core.distillation.cost import (
    evaluations,
    matching_costs,
    most_updates,
    progressive_costs,
    updates_of,
    with_cost_of,
)
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.phases import PhaseConfig
from ddil_core.distillation.regression import encode_pairs
from ddil_core.distillation.stage import Stage
from ddil_core.models.model import Model, load_model
from tests.core.distillation import test_consistency, test_matching, test_progressive
from tests.pipelines import TEACHER, save_pipeline

SHARE = (PhaseConfig(until=0.5, aggregated=0.3, p_teacher=0.6), PhaseConfig(until=1, aggregated=1, p_teacher=0.3))
"""A share of 0.3 is no whole number of rows, and a share of 1 leaves no data."""


def stage(method: str, model: Model, pool: LatentPool, ddil: bool) -> Stage:
    if method == "pd":
        return test_progressive.stage(model, pool, updates=10, phases=SHARE if ddil else None, uses=2)
    make: Any = {"lcm": test_consistency.stage, "dmd2": test_matching.stage}[method]
    more = {"teacher_steps": 10} if method == "lcm" else {}
    return make(model, pool, ddil=ddil, **more)  # type: ignore[no-any-return]


@pytest.mark.parametrize("ddil", [False, True], ids=["data", "ddil"])
@pytest.mark.parametrize("method", ["pd", "lcm", "dmd2"])
def test_the_evaluations_are_those_of_the_updates(method: str, ddil: bool, model: Model, pool: LatentPool) -> None:
    trainer = stage(method, model, pool, ddil)
    make_costs = METHODS[method].costs
    assert make_costs is not None
    costs = make_costs(trainer.config, model)
    with test_progressive.rows_through(model.denoiser.net) as rows:
        for step in range(trainer.updates):
            trainer.update(step)
    assert evaluations(trainer.config, costs) == sum(rows) > 0


def test_a_conversion_is_counted(tmp_path: Path) -> None:
    teacher = load_model(str(save_pipeline(tmp_path, TEACHER, seed=1, prediction="epsilon")))
    latents = encode_pool(teacher, open_data("shapes"), 8, tmp_path / "data.safetensors")
    content = {"stages": [{"steps": 2, "updates": 1}], "batch_size": 4, "convert": {"updates": 3}}
    config = ProgressiveConfig.model_validate(content)
    assert config.convert is not None
    plain = GuidedDenoiser(teacher.denoiser)
    trainer = ConversionStage(plain, teacher.nothing(), latents, config.convert, config, Accelerator(cpu=True))
    with test_progressive.rows_through(teacher.denoiser.net) as rows:
        for step in range(3):
            trainer.update(step)
    assert progressive_costs(config, teacher)["convert.updates"](3) == sum(rows) == 12
    assert "convert.updates" not in progressive_costs(config, load_model("gaussians"))  # it predicts v


def test_a_regressions_pairs_and_a_fit_are_counted(model: Model, pool: LatentPool, tmp_path: Path) -> None:
    told = {"updates": 2, "batch_size": 4, "timesteps": [999], "guidance_scale": 3.0}
    regression = {"pairs": 8, "teacher_steps": 3, "updates": 1}
    with_pairs, without = (MatchingConfig.model_validate(told | {"regression": r}) for r in (regression, None))
    path = tmp_path / "pairs.safetensors"
    with test_progressive.rows_through(model.denoiser.net) as rows:
        encode_pairs(model.guided(3.0), pool, with_pairs, path, Accelerator(cpu=True))
    difference = matching_costs(with_pairs, model)["updates"](2) - matching_costs(without, model)["updates"](2)
    assert difference == sum(rows) == 8 * 3 * 2
    fitted = MatchingConfig.model_validate(told | {"student": {"updates": 5}})
    assert matching_costs(fitted, model)["student.updates"](5) == 5 * 4


def test_a_budget_gives_the_updates_that_it_allows(model: Model, pool: LatentPool) -> None:
    data, ddil = (stage("dmd2", model, pool, ddil=ddil).config for ddil in (False, True))
    make_costs: Any = METHODS["dmd2"].costs
    budget = {key: cost(40) for key, cost in make_costs(data, model).items()}
    costs = make_costs(ddil, model)
    fitted = with_cost_of(ddil, costs, budget)
    updates = updates_of(fitted, "updates")
    assert updates < 40 and costs["updates"](updates) <= budget["updates"] < costs["updates"](updates + 1)
    assert most_updates(lambda updates: 3 * updates, 10) == 3 and most_updates(lambda updates: 3, 2) == 0
