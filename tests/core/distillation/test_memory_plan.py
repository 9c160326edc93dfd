"""The estimate of a distillation's memory, against the tensors that are alive in the updates of its stages."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_core.data.pool import LatentPool
from ddil_core.distillation.adapters import with_lora
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.lora_config import LoraConfig
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.memory_plan import plan_memory
from ddil_core.models.model import Model
from ddil_core.models.network_shapes import network_shape
from ddil_core.support.live_bytes import LiveBytes
from tests.core.distillation.test_dropout import DDIL, make

FEW = DDIL | {"capacity": 128}
LORA = {"lora": {"rank": 4, "alpha": 4}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pd": ("pd", {"gradient_checkpointing": True, "gradient_accumulation": 2}),
    "lcm": ("lcm", {"student_dtype": "bfloat16"}),
    "dmd2": ("dmd2", {}),
    "pd-lora": ("pd", LORA),
    "lcm-lora": ("lcm-lora", {}),
    "lcm-lora-bfloat16": ("lcm-lora", {"student_dtype": "bfloat16"}),
    "dmd2-lora": ("dmd2", LORA),
}


def test_live_bytes_count_a_storage_once_and_until_it_is_freed() -> None:
    there = torch.zeros(100)
    with LiveBytes([there]) as live:
        kept = there + 1
        part = kept[:10].view(5, 2) * 2
        assert live.live == 400 + 40
        del kept
        assert (live.live, live.peak) == (40, 440)
        there.add_(part.sum())  # the sum is freed at once, and what was there does not count
        assert (live.live, live.peak) == (40, 440)


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_the_estimate_is_near_the_measured_peak(
    folder: Path, model: Model, pool: LatentPool, kind: str, options: dict[str, Any]
) -> None:
    """Within 5 %; weights and moments exactly. The data and the teacher's networks are there before.

    A LoRA's frozen base is the teacher's, and counts once, unless it has another dtype.
    """
    networks = (model.denoiser.net, model.pipeline.vae, model.pipeline.text_encoder)
    present = chain.from_iterable((*net.parameters(), *net.buffers()) for net in networks)
    with LiveBytes([*present, pool.mean, pool.std, *pool.condition.values()]) as live:
        stage = make(kind, model, pool, FEW, teacher_batch_size=4, **options)
        for step in range(2):
            stage.update(step)
    plan = plan_memory(network_shape(str(folder)), stage.config, stage.teacher.nfe)
    teacher = total(model.denoiser.net.parameters())
    assert plan.device["teacher"] == teacher
    there = {weight.data_ptr() for weight in model.denoiser.net.parameters()}
    nets = [stage.net, *([stage.adapted] if stage.adapted else [])]  # a LoRA's first values are kept
    own = [weight for net in nets for weight in net.parameters() if weight.data_ptr() not in there]
    assert plan.device["student"] == total(own)
    assert plan.device["optimizer"] == total(moments(stage))
    assert plan.total - plan.device["autoencoder"] == pytest.approx(live.peak + teacher, rel=0.05)


def total(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def moments(stage: Any) -> list[Tensor]:
    optimizers = [stage.optimizer, *([stage.critic_optimizer] if hasattr(stage, "critic") else [])]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [tensor for state in states for tensor in state.values() if tensor.dim()]


def test_adapters_alone_are_trained_and_share_the_teachers_weights(folder: Path, model: Model) -> None:
    net = with_lora(model.denoiser.net, LoraConfig(rank=4))
    adapters = sum(weight.numel() for name, weight in net.named_parameters() if "lora_" in name)
    shape, told = network_shape(str(folder)), {"batch_size": 2, "lora": {"rank": 4}}
    pd = plan_memory(shape, ProgressiveConfig.model_validate(told | {"stages": [{"steps": 2, "updates": 1}]}))
    dmd2 = plan_memory(shape, MatchingConfig.model_validate(told | {"updates": 1}))
    assert pd.device["optimizer"] == 8 * adapters
    assert (dmd2.device["critic"], dmd2.device["optimizer"]) == (4 * adapters, 16 * adapters)
    assert pd.device["student"] == dmd2.device["student"] == 2 * 4 * adapters  # trained, and their first values
    stages = [{"steps": 4, "updates": 1}, {"steps": 2, "updates": 1}]
    later = plan_memory(shape, ProgressiveConfig.model_validate(told | {"stages": stages}))
    assert (
        later.device["student"] == total(net.parameters()) + 4 * adapters
    )  # the second teacher has a LoRA in its weights
    divided = plan_memory(shape, MatchingConfig.model_validate(told | {"updates": 1, "shard": True}), processes=2)
    assert divided.device["student"] == (total(net.parameters()) + 4 * adapters) // 2
