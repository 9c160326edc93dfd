"""The three sources: their shares, whatever the length of a trajectory."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ddil_core.data.pool import LatentPool
from ddil_core.distill.config import ConsistencyConfig, MatchingConfig
from ddil_core.distill.consistency import ConsistencyStage, GuidedByRow, student_network
from ddil_core.distill.matching import MatchingStage
from ddil_core.distill.sources import RolloutStage, Visited, trajectories
from ddil_core.models.model import Model
from ddil_core.parameterization import calibrate_reflection
from ddil_core.rollout import STUDENT, TEACHER


@pytest.mark.parametrize("lengths", [{TEACHER: 50, STUDENT: 4}, {TEACHER: 4, STUDENT: 4}, {TEACHER: 1, STUDENT: 7}])
@pytest.mark.parametrize("p_teacher", [0.0, 0.2, 0.85, 1.0])
@pytest.mark.parametrize("states", [3, 130])
def test_states_are_the_teachers_with_its_probability(lengths: dict[str, int], p_teacher: float, states: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [trajectories(states, p_teacher, lengths, generator) for _ in range(1000)]
    by_teacher = torch.tensor([float(counts[TEACHER] * lengths[TEACHER]) for counts in drawn])
    total = torch.tensor([float(sum(counts[actor] * n for actor, n in lengths.items())) for counts in drawn])
    assert bool((total >= states).all()) and float(total.mean()) < states + sum(lengths.values())
    off = by_teacher - p_teacher * total  # of mean 0, if the shares are right
    assert abs(float(off.mean())) <= 4 * float(off.std()) / 1000**0.5 + 1e-6


@pytest.mark.parametrize("method", ["lcm", "dmd2"])
def test_a_stage_draws_its_sources_in_their_shares(model: Model, pool: LatentPool, method: str) -> None:
    phases = [{"until": 0.5, "aggregated": 0.25, "p_teacher": 0.8}, {"until": 1, "aggregated": 0.75, "p_teacher": 0.4}]
    ddil = {"uses": 2, "collect_every": 100, "capacity": 2048, "phases": phases}
    bound = calibrate_reflection(pool.mean.float())
    stage: RolloutStage
    if method == "lcm":
        settings = ConsistencyConfig.model_validate(
            {"updates": 200, "batch_size": 16, "w_embedding": 16, "teacher_batch_size": 128, "ddil": ddil}
        )
        net = student_network(model.denoiser.net, settings)
        stage = ConsistencyStage(
            GuidedByRow(model.denoiser, model.nothing(), bound), pool, settings, Accelerator(cpu=True), net
        )
    else:
        told = {"updates": 100, "critic_updates": 1, "batch_size": 16, "teacher_steps": 4, "teacher_batch_size": 128}
        stage = MatchingStage(
            model.guided(3.0, bound), pool, MatchingConfig.model_validate(told | {"ddil": ddil}), Accelerator(cpu=True)
        )
    kept = {0: {TEACHER: 0, STUDENT: 0}, 1: {TEACHER: 0, STUDENT: 0}}
    target, phase = stage.target, 0

    def counted(seen: Visited) -> Tensor:
        kept[phase][seen.actor] += len(seen.row)
        return target(seen)

    stage.target = counted  # type: ignore[method-assign]
    for step in range(200):
        phase = int(step >= 100)
        states, aggregated = stage._draw(step)
        assert (len(states), aggregated) == (16, (4, 12)[phase])
    for number, (share, p) in enumerate(((0.25, 0.8), (0.75, 0.4))):
        by_teacher, by_student = kept[number][TEACHER], kept[number][STUDENT]
        wanted = 100 * 16 * share / 2
        longest = max(len(walker.steps) for walker in stage.walkers.values())
        assert by_teacher + by_student == pytest.approx(wanted, abs=2.5 * longest)
        assert abs(by_teacher - p * (by_teacher + by_student)) <= 2 * longest
