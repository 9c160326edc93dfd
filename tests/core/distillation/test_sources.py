"""The three sources: their shares, whatever the length of a trajectory and the size of a batch."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.denoiser import GuidedDenoiser
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.diffusion.rollout import STUDENT, TEACHER
from ddil_core.distillation.collectors import SeparateCollector, TransitionBatch, trajectories
from ddil_core.distillation.consistency import ConsistencyStage, student_network
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.matching import MatchingStage
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.sources import MixedSource, whole_numbers
from ddil_core.models.model import Model
from tests.core.closed_form import distance
from tests.core.distillation.test_dropout import make


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


def test_a_share_of_a_batch_is_whole_or_lies_between_two_numbers() -> None:
    assert whole_numbers(0.25 * 32) == (8, 8) and whole_numbers(0.0) == (0, 0)
    assert whole_numbers(0.25 * 7) == (1, 2) and whole_numbers(0.25 * 1) == (0, 1)
    for size in range(1, 200):
        for share in range(101):
            low, high = whole_numbers(share / 100 * size)
            assert (low == high) == (share * size % 100 == 0) and low == share * size // 100
    assert whole_numbers(0.29 * 100) == (29, 29)  # 28.999999999999996


@pytest.mark.parametrize("share", [0.25, 0.5, 0.85])
@pytest.mark.parametrize("size", [1, 7, 10, 32])
def test_a_batch_of_any_size_has_its_share_on_the_mean(model: Model, pool: LatentPool, size: int, share: float) -> None:
    draws = 4000
    trainer = make("pd", model, pool, batch_size=size, updates=1)
    counts = torch.tensor([trainer.source.aggregated_count(share, step) for step in range(draws)], dtype=torch.float64)
    low, high = whole_numbers(share * size)
    assert set(counts.tolist()) == {low, high}
    up = share * size - low  # the probability with which it is rounded up
    assert float(counts.mean()) == pytest.approx(share * size, abs=4.5 * (up * (1 - up) / draws) ** 0.5 + 1e-9)


@pytest.mark.parametrize(("kind", "size"), [("pd", 7), ("lcm", 7), ("dmd2", 1)])
def test_small_batches_are_whole_and_use_what_is_collected_for_them(
    model: Model, pool: LatentPool, kind: str, size: int
) -> None:
    """Two phases whose shares are not whole; a collection is for exactly what the updates before the next one take."""
    phases = [{"until": 0.5, "aggregated": 0.25, "p_teacher": 0.8}, {"until": 1, "aggregated": 0.5, "p_teacher": 0.4}]
    ddil = {"collect_every": 10, "capacity": 128, "phases": phases}
    more = {"updates": 12, "critic_updates": 1} if kind == "dmd2" else {"updates": 24}
    trainer = make(kind, model, pool, batch_size=size, teacher_steps=4, ddil=ddil, **more)
    plain = make(kind, model, pool, batch_size=size, teacher_steps=4, ddil=ddil, teacher_batch_size=3, **more)
    taken = 0
    for step in range(24):
        states, aggregated = trainer.source.draw(step)
        assert len(states) == size and aggregated == trainer.source.aggregated_count((0.25, 0.5)[step >= 12], step)
        again, _ = plain.source.draw(step)
        assert torch.equal(states.row, again.row) and torch.equal(states.transition, again.transition)
        assert distance(states.z, again.z) < 1e-5
        taken += aggregated
    assert trainer.source.dataset is not None
    left = 4 if kind == "pd" else 4 + 4  # of a last trajectory, or of one of each actor
    assert taken <= trainer.source.dataset.collected <= taken + left


@pytest.mark.parametrize("method", ["lcm", "dmd2"])
def test_a_stage_draws_its_sources_in_their_shares(model: Model, pool: LatentPool, method: str) -> None:
    phases = [{"until": 0.5, "aggregated": 0.25, "p_teacher": 0.8}, {"until": 1, "aggregated": 0.75, "p_teacher": 0.4}]
    ddil = {"uses": 2, "collect_every": 100, "capacity": 2048, "phases": phases}
    bound = calibrate_reflection(pool.mean.float())
    stage: ConsistencyStage | MatchingStage
    if method == "lcm":
        settings = ConsistencyConfig.model_validate(
            {"updates": 200, "batch_size": 16, "w_embedding": 16, "teacher_batch_size": 128, "ddil": ddil}
        )
        net = student_network(model.denoiser.net, settings)
        stage = ConsistencyStage(
            GuidedDenoiser(model.denoiser, model.nothing(), reflection=bound),
            pool,
            settings,
            Accelerator(cpu=True),
            net,
        )
    else:
        told = {"updates": 100, "critic_updates": 1, "batch_size": 16, "teacher_steps": 4, "teacher_batch_size": 128}
        stage = MatchingStage(
            model.guided(3.0, bound), pool, MatchingConfig.model_validate(told | {"ddil": ddil}), Accelerator(cpu=True)
        )
    kept = {0: {TEACHER: 0, STUDENT: 0}, 1: {TEACHER: 0, STUDENT: 0}}
    source = stage.source
    assert isinstance(source, MixedSource)
    collector = source.collector
    assert isinstance(collector, SeparateCollector)
    label, phase = collector.labeler.label_transitions, 0

    def counted(batch: TransitionBatch) -> Tensor:
        kept[phase][batch.actor] += len(batch.row)
        return label(batch)

    collector.labeler.label_transitions = counted  # type: ignore[method-assign]
    for step in range(200):
        phase = int(step >= 100)
        states, aggregated = source.draw(step)
        assert (len(states), aggregated) == (16, (4, 12)[phase])
    for number, (share, p) in enumerate(((0.25, 0.8), (0.75, 0.4))):
        by_teacher, by_student = kept[number][TEACHER], kept[number][STUDENT]
        wanted = 100 * 16 * share / 2
        longest = max(len(sole.actor.steps) for sole in collector.actors.values())
        assert by_teacher + by_student == pytest.approx(wanted, abs=2.5 * longest)
        assert abs(by_teacher - p * (by_teacher + by_student)) <= 2 * longest
