"""The evaluations of the teacher that the configuration foretells are those that the updates make."""

from __future__ import annotations

from typing import Any

import pytest

from ddil_core.data.pool import LatentPool
from ddil_core.distillation.cost import evaluations, most_updates, updates_of, with_cost_of
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.phases import PhaseConfig
from ddil_core.distillation.stage import Stage
from ddil_core.models.model import Model
from tests.core.distillation import test_consistency, test_matching, test_progressive

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


def test_a_budget_gives_the_updates_that_it_allows(model: Model, pool: LatentPool) -> None:
    data, ddil = (stage("dmd2", model, pool, ddil=ddil).config for ddil in (False, True))
    make_costs: Any = METHODS["dmd2"].costs
    budget = {key: cost(40) for key, cost in make_costs(data, model).items()}
    costs = make_costs(ddil, model)
    fitted = with_cost_of(ddil, costs, budget)
    updates = updates_of(fitted, "updates")
    assert updates < 40 and costs["updates"](updates) <= budget["updates"] < costs["updates"](updates + 1)
    assert most_updates(lambda updates: 3 * updates, 10) == 3 and most_updates(lambda updates: 3, 2) == 0
