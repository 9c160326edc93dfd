"""What a distillation costs in evaluations of its teachers, counted from the configuration alone.

An evaluation is one row of the network. A guided teacher evaluates two rows for each state. The teacher of a later
stage of progressive distillation is the student of the stage before, and counts too. Evaluations of students do not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from ddil_core.diffusion.rollout import STUDENT, TEACHER
from ddil_core.distillation.collectors import trajectories
from ddil_core.distillation.config import MethodConfig, ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.context import COLLECTION, stage_generator
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.sources import aggregated_uses
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import override

Costs = dict[str, Callable[[int], int]]
"""For each stage, by the key of its number of updates: the evaluations of its teacher for a number of updates."""
C = TypeVar("C", bound=MethodConfig)

DATA, BOTH = "data", "both"
"""Names in a count: rows of forward-diffused data, and trajectories in which the actors take turns."""


def progressive_costs(config: ProgressiveConfig, model: Model) -> Costs:
    """Return the costs of progressive distillation. Each state costs the two steps that give its target.

    A rollout costs no more: where the teacher acts, its steps are the target already.
    """
    costs = fit_costs(config)
    if config.convert is not None and model.denoiser.prediction == "epsilon":
        costs["convert.updates"] = lambda updates: updates * config.batch_size
    first = model.guided(config.guidance_scale).nfe

    def cost(index: int, updates: int) -> int:
        steps = config.stages[index].steps
        counts = count_states(config, index, updates, {BOTH: steps}, lambda n, p, g: {BOTH: math.ceil(n / steps)})
        return 2 * (counts[DATA] + steps * counts[BOTH]) * (first if index == 0 else 1)

    return costs | {f"stages.{index}.updates": partial(cost, index) for index in range(len(config.stages))}


def consistency_costs(config: ConsistencyConfig, model: Model) -> Costs:
    """Return the costs of consistency distillation. Each state costs one guided step."""
    lengths = {TEACHER: config.teacher_steps, STUDENT: config.student_steps}

    def cost(updates: int) -> int:
        counts = count_states(config, config.method, updates, lengths, lambda n, p, g: trajectories(n, p, lengths, g))
        return 2 * (counts[DATA] + sum(length * counts[name] for name, length in lengths.items()))

    return fit_costs(config) | {"updates": cost}


def matching_costs(config: MatchingConfig, model: Model) -> Costs:
    """Return the costs of DMD2: a real score for each row of the generator, and with DDIL the teacher's rollouts."""
    times = len(config.timesteps)
    lengths = dict.fromkeys((TEACHER, STUDENT), times)
    nfe = model.guided(config.guidance_scale).nfe
    rollout = config.teacher_steps // times * (times - 1)  # no training state lies behind the last transition
    pairs = 0 if config.regression is None else config.regression.pairs * config.regression.teacher_steps

    def cost(updates: int) -> int:
        draws = updates * (1 + config.critic_updates)
        counts = count_states(config, "dmd2", draws, lengths, lambda n, p, g: trajectories(n, p, lengths, g))
        return (updates * config.batch_size + counts[TEACHER] * rollout + pairs) * nfe

    return fit_costs(config) | {"updates": cost}


def fit_costs(config: MethodConfig) -> Costs:
    """Return the cost of the fit of a student's network to a teacher that is a formula."""
    if config.student is None:
        return {}
    return {"student.updates": lambda updates: updates * config.batch_size}


def count_states(
    config: MethodConfig,
    index: int | str,
    draws: int,
    lengths: Mapping[str, int],
    roll: Callable[[int, float, torch.Generator], Mapping[str, int]],
) -> Counter[str]:
    """Return how many rows of data (``DATA``) and how many trajectories of each kind a stage takes.

    Args:
        config: The configuration of the method.
        index: The number or name of the stage.
        draws: How many batches the stage draws.
        lengths: The number of states of a trajectory, by kind.
        roll: ``roll(states, p_teacher, generator)`` returns the trajectories that a collection rolls out, by kind.
    """
    ddil, counts, pending = config.ddil, Counter[str](), 0
    if ddil is None:
        return Counter({DATA: draws * config.batch_size})
    for step in range(draws):
        p_teacher, taken, uses = aggregated_uses(config, index, draws, step, pending)
        if uses:
            generator = stage_generator(config.seed, index, step, COLLECTION)
            rolled = roll(math.ceil(uses / ddil.uses), p_teacher, generator)
            counts.update(rolled)
            pending += ddil.uses * sum(lengths[kind] * count for kind, count in rolled.items())
        pending -= taken
        counts[DATA] += config.batch_size - taken
    return counts


def updates_of(config: MethodConfig, key: str) -> int:
    """Return the number of updates that a dotted key of ``Costs`` names."""
    place: object = config
    for name in key.split("."):
        place = place[int(name)] if isinstance(place, tuple) else getattr(place, name)
    assert isinstance(place, int)
    return place


def evaluations(config: MethodConfig, costs: Costs) -> int:
    """Return the evaluations of the teachers of all stages."""
    return sum(cost(updates_of(config, key)) for key, cost in costs.items())


def with_cost_of(config: C, costs: Costs, budget: Mapping[str, int]) -> C:
    """Return a configuration whose stages have as many updates as a budget of evaluations allows.

    Args:
        config: The configuration.
        costs: The costs of its stages.
        budget: The evaluations that each stage may cost, by the keys of ``costs``.

    Raises:
        WrongCommand: a budget allows no update.
    """
    settings = []
    for key, cost in costs.items():
        updates = most_updates(cost, budget[key])
        if not updates:
            raise WrongCommand(
                f"{key}: one update costs {cost(1):,} evaluations of the teacher, more than the budget of "
                f"{budget[key]:,}; give the baseline more updates"
            )
        settings.append(f"{key}={updates}")
    return type(config).model_validate(override(config.model_dump(mode="json"), settings))


def most_updates(cost: Callable[[int], int], budget: int) -> int:
    """Return the most updates whose cost is within a budget, for a cost that rises with the updates."""
    low, high = 0, 1
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
