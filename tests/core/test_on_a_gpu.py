"""Whole ways through the code on a GPU: the numbers are the CPU's, and the host waits no more often than it must.

The pretended GPU proves the same on a machine without one: that all tensors lie where they should, and that no copy is
read before it has come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ddil_core.data.pool import LatentPool
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.rollout import rollout_latents
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.distillation.distill import distill
from ddil_core.models.generate import begin_images, resolve_sampling, sample
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import Bounds
from ddil_core.models.turns import rollout, take_turns
from ddil_core.support.devices import sent
from ddil_core.support.errors import DdilError
from tests.core.distillation import test_dropout
from tests.core.distillation.test_dropout import KINDS, make
from tests.core.distillation.test_run import CONFIG, UNET
from tests.pipelines import edited, save_pipeline
from tests.pretend_gpu import PretendedGpu
from tests.transformers import BUILDERS

LCM = "LatentConsistencyModelPipeline"
PROMPTS = ["a small red circle", "a large blue square", "two green triangles"]
pytestmark = pytest.mark.usefixtures("a_gpu")


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Torch raises at whatever waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def waiting_for_prompts(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing waits but the encoding of prompts: diffusers copies tokens, on the stream of that work alone.

    On a real GPU torch raises there too.
    """
    encode = Model.encode

    def encoded(*told: Any, **more: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default" if PretendedGpu.current is None else "error")
        try:
            return encode(*told, **more)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with patch.context() as patched, nothing_waits():
        patched.setattr(Model, "encode", encoded)
        yield


def without_waits(reference: Path, patch: pytest.MonkeyPatch, bounds: Bounds | None = None, **settings: Any) -> None:
    """Draw two batches. Nothing of the second waits before its images are read.

    The first one brings the text encoders to the GPU.
    """
    there = load_model(str(reference), "cuda")
    if bounds is not None:
        there.sampling = replace(there.sampling, bounds=bounds)
    sampling, samples = resolve_sampling(there, **settings), [Sample(prompt) for prompt in PROMPTS]
    first = begin_images(there, samples, PROMPTS, sampling, 0, 4)
    with waiting_for_prompts(patch):
        second = begin_images(there, samples[::-1], PROMPTS[::-1], sampling, 0, 4)
    a, b = first(), second()
    assert np.array_equal(a, b[::-1]) and a.std() > 0


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_sampling_waits_for_a_batch_only_at_its_images(
    folder: Path, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_waits(folder, monkeypatch, steps=4, solver=solver)


def test_reflection_does_not_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = Bounds((0.0,) * 8, (2.0,) * 8, 0.995)
    without_waits(folder, monkeypatch, bounds, steps=2, reflection="dynamic")


def test_an_autoencoder_with_a_mean_for_each_channel_does_not_wait(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centred = edited(folder, tmp_path / "centred", "vae/config.json", latents_mean=[0.1] * 8, latents_std=[1.5] * 8)
    without_waits(centred, monkeypatch, steps=2)


@pytest.mark.parametrize("layout", [*BUILDERS, "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", LCM])
def test_no_layout_waits(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_waits(save_pipeline(tmp_path, None, seed=1, layout=layout), monkeypatch, steps=2)


def test_a_broken_batch_is_named_at_its_images(folder: Path) -> None:
    """Until then the host goes on."""
    there = load_model(str(folder), "cuda")
    sampling, samples = resolve_sampling(there, 2), [Sample(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        next(there.denoiser.net.parameters()).fill_(float("nan"))
    images = begin_images(there, samples, PROMPTS, sampling, 0, 4)
    with pytest.raises(DdilError, match="the latents of the model .* after step 1 of 2"):
        images()


@pytest.mark.parametrize("batch_size", [2, 3])
def test_images_of_a_gpu_are_the_cpus(folder: Path, model: Model, batch_size: int) -> None:
    drawn = sample(load_model(str(folder), "cuda"), PROMPTS, steps=4, batch_size=batch_size, seed=1)
    expected = sample(model, PROMPTS, steps=4, batch_size=batch_size, seed=1)
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_a_rollout_waits_once(folder: Path) -> None:
    """To see whether all states were finite: not at its batches, its actors or its transitions."""
    there = load_model(str(folder), "cuda")
    actors, _ = take_turns(there, there, 8)
    z = sent(initial_noise([Sample(prompt) for prompt in PROMPTS], there.latent_shape, 0), there.device)
    told, strings = there.encode(PROMPTS), [{"TTSS", "STST", "SSSS"}] * len(PROMPTS)
    rollout_latents(actors, z, told, strings, batch_size=2)
    if PretendedGpu.current is not None:
        PretendedGpu.current.waits.clear()
        rollout_latents(actors, z, told, strings, batch_size=2, keep=("S", "ST"))
        assert len(PretendedGpu.current.waits) == 1


def test_rollouts_of_a_gpu_are_the_cpus(folder: Path, model: Model) -> None:
    there = load_model(str(folder), "cuda")
    drawn, expected = (rollout(m, m, PROMPTS, ["TTSS", "SSTT"], teacher_steps=8, batch_size=4) for m in (there, model))
    assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_updates_on_a_gpu_are_the_cpus(
    folder: Path, model: Model, pool: LatentPool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients of updates with collections between them."""
    logs = []
    for one in (load_model(str(folder), "cuda"), model):
        monkeypatch.setattr(test_dropout, "CPU", Accelerator(cpu=one is model))
        stage = make(kind, one, pool, True, teacher_batch_size=4)
        logs.append(
            [torch.cat([torch.as_tensor(v).flatten().cpu() for v in stage.update(k).values()]) for k in range(5)]
        )
        AcceleratorState._reset_state(reset_partial_state=True)
    for found, expected in zip(*logs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_student_of_a_gpu_is_the_cpus(folder: Path, tmp_path: Path) -> None:
    """A whole distillation by two stages with DDIL."""
    weights = {}
    for device in ("cuda", "cpu"):
        distill(str(folder), "shapes", CONFIG, tmp_path / device, device=device)
        weights[device] = load_file(tmp_path / device / "student" / UNET)
        AcceleratorState._reset_state(reset_partial_state=True)
    before = load_file(folder / UNET)
    flat = {name: torch.cat([each[key].flatten() for key in before]) for name, each in weights.items()}
    start = torch.cat([tensor.flatten() for tensor in before.values()])
    moved = float((flat["cpu"] - start).norm())
    assert float((flat["cuda"] - flat["cpu"]).norm()) < 0.01 * moved
