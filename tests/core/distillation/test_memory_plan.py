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
from ddil_core.distillation.memory_plan import Plan, plan_memory
from ddil_core.models.model import Model, load_model, outline
from ddil_core.models.network_shapes import network_shape
from ddil_core.models.system_specs import Files
from ddil_core.support.live_bytes import LiveBytes
from tests.core.distillation.test_dropout import DDIL, make
from tests.pipelines import build

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
SIZE = {"height": 64, "width": 96}
TRANSFORMERS = [
    ("FluxPipeline", "pd"),
    ("FluxPipeline", "dmd2"),
    ("SanaPipeline", "lcm"),
    ("PixArtSigmaPipeline", "dmd2"),
    ("StableDiffusion3Pipeline", "dmd2"),
]


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
    stage, peak = updated(kind, model, pool, **options)
    plan = plan_memory(network_shape(outline("tiny", Files(folder))), stage.config, stage.teacher.nfe)
    compare(plan, model, stage, peak, 0.05)


@pytest.mark.parametrize(("layout", "kind"), TRANSFORMERS)
def test_the_estimate_of_a_transformer_is_near_too_at_another_size(layout: str, kind: str, tmp_path: Path) -> None:
    """Within 12 %: the long captions take more than these networks."""
    build(layout, tmp_path / "words", distilled=True).save_pretrained(tmp_path / "teacher")
    model = load_model(str(tmp_path / "teacher"), "cpu", **SIZE)
    mean = torch.randn(12, *model.latent_shape)
    condition = model.encode(["a small red circle"] * 12).tensors
    pool = LatentPool(mean, 0.1 * mean.abs(), condition)
    stage, peak = updated(kind, model, pool, **({"w_embedding": None, "teacher_steps": 20} if kind == "lcm" else {}))
    shape = network_shape(outline("tiny", Files(tmp_path / "teacher"), **SIZE))
    assert shape.latent == model.latent_shape
    assert {name: tensor.shape[1:] for name, tensor in condition.items()} == shape.inputs
    compare(plan_memory(shape, stage.config, stage.teacher.nfe), model, stage, peak, 0.12)


def updated(kind: str, model: Model, pool: LatentPool, **options: Any) -> tuple[Any, int]:
    """A stage after two updates, and the most bytes that were alive beside the data and the teacher's networks."""
    model.nothing()  # its text encoder takes more than an update of such a network
    networks = (model.denoiser.net, model.pipeline.vae, model.pipeline.text_encoder)
    present = chain.from_iterable((*net.parameters(), *net.buffers()) for net in networks)
    with LiveBytes([*present, pool.mean, pool.std, *pool.condition.values()]) as live:
        stage = make(kind, model, pool, FEW, teacher_batch_size=4, **options)
        for step in range(2):
            stage.update(step)
    return stage, live.peak


def compare(plan: Plan, model: Model, stage: Any, peak: int, tolerance: float) -> None:
    teacher = weights_and_buffers(model.denoiser.net)
    assert plan.device["teacher"] == teacher
    there = {weight.data_ptr() for weight in (*model.denoiser.net.parameters(), *model.denoiser.net.buffers())}
    nets = [stage.net, *([stage.adapted] if stage.adapted else [])]  # a LoRA's first values are kept
    own = [tensor for net in nets for tensor in (*net.parameters(), *net.buffers()) if tensor.data_ptr() not in there]
    assert plan.device["student"] == total(own)
    assert plan.device["optimizer"] == total(moments(stage))
    expected = peak + teacher
    assert plan.total - plan.device["autoencoder"] == pytest.approx(expected, rel=tolerance)


def weights_and_buffers(net: torch.nn.Module) -> int:
    return total([*net.parameters(), *net.buffers()])


def total(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def moments(stage: Any) -> list[Tensor]:
    optimizers = [stage.optimizer, *([stage.critic_optimizer] if hasattr(stage, "critic") else [])]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [tensor for state in states for tensor in state.values() if tensor.dim()]


def test_adapters_alone_are_trained_and_share_the_teachers_weights(folder: Path, model: Model) -> None:
    net = with_lora(model.denoiser.net, LoraConfig(rank=4))
    adapters = sum(weight.numel() for name, weight in net.named_parameters() if "lora_" in name)
    shape, told = network_shape(outline("tiny", Files(folder))), {"batch_size": 2, "lora": {"rank": 4}}
    pd = plan_memory(shape, ProgressiveConfig.model_validate(told | {"stages": [{"steps": 2, "updates": 1}]}))
    dmd2 = plan_memory(shape, MatchingConfig.model_validate(told | {"updates": 1}))
    assert pd.device["optimizer"] == 8 * adapters
    assert (dmd2.device["critic"], dmd2.device["optimizer"]) == (4 * adapters, 16 * adapters)
    assert pd.device["student"] == dmd2.device["student"] == 2 * 4 * adapters  # trained, and their first values
    stages = [{"steps": 4, "updates": 1}, {"steps": 2, "updates": 1}]
    later = plan_memory(shape, ProgressiveConfig.model_validate(told | {"stages": stages}))
    # The second teacher has a LoRA in its weights.
    assert later.device["student"] == total(net.parameters()) + 4 * adapters
    divided = plan_memory(shape, MatchingConfig.model_validate(told | {"updates": 1, "shard": True}), processes=2)
    assert divided.device["student"] == (total(net.parameters()) + 4 * adapters) // 2
