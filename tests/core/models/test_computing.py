"""Number formats, fixed batches and compiled networks: each draws what plain float32 draws, within its rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddil_core.diffusion.noise import Sample, initial_noise, solver_noise
from ddil_core.models import compiling
from ddil_core.models.generate import resolve_sampling, sample, sample_latents
from ddil_core.models.model import Model, load_model
from ddil_core.shapes.training.architecture import LATENT_SIZE
from ddil_core.support.compute import Compute
from ddil_core.support.devices import sent
from ddil_core.support.errors import DdilError, WrongCommand
from tests.core.closed_form import distance, normal
from tests.pipelines import build, tiny_autoencoder, tiny_unet

PROMPTS = ["a small red circle", "a blue star", "", "a large square", "a green circle"]


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_draws_what_float32_draws_within_its_rounding(
    model: Model, folder: Path, dtype: str, most: float
) -> None:
    low = load_model(str(folder), compute=Compute(dtype))
    assert low.denoiser.net.dtype is Compute(dtype).torch_dtype
    samples = [Sample(prompt) for prompt in PROMPTS]
    plain, rounded = (sample_latents(m, samples, PROMPTS, resolve_sampling(m, 4), 3) for m in (model, low))
    assert rounded.dtype is torch.float32  # latents and solvers stay in float32
    assert 0 < distance(rounded, plain) < most


def test_a_setting_without_effect_is_refused(folder: Path) -> None:
    with pytest.raises(WrongCommand, match="leave out --tf32"):
        load_model(str(folder), "cpu", compute=Compute(tf32=True))


def test_a_fixed_batch_is_filled_up_and_draws_the_same_images(model: Model) -> None:
    fixed = replace(model, compute=Compute(compile=True))  # its networks are the plain ones
    rows, decoded = set[int](), set[int]()
    hooks = [
        model.denoiser.net.register_forward_pre_hook(lambda _, args: rows.add(len(args[0]))),
        model.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.add(len(args[0]))),
    ]
    images = sample(fixed, PROMPTS, steps=2, batch_size=3, seed=5)
    for hook in hooks:
        hook.remove()
    assert rows == {6}  # two passes of guidance for each of three rows, also in the last batch
    assert decoded == {3}  # a compiled decoder is not compiled again for the last two images
    plain = sample(model, PROMPTS, steps=2, batch_size=3, seed=5)
    assert images.shape == plain.shape
    assert np.abs(images.astype(int) - plain).max() <= 1


def test_parts_of_a_fixed_size_decode_the_same_images(model: Model) -> None:
    z, fixed, sizes = normal(5, *model.latent_shape), replace(model, compute=Compute(compile=True)), list[int]()
    whole = model.decode(z, 5)
    hook = model.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    images = fixed.begin_decode(z, 2)()
    hook.remove()
    assert sizes == [2, 2, 2]
    assert np.abs(images.astype(int) - whole).max() <= 1


def test_the_noise_of_a_solver_is_that_of_its_steps_one_by_one() -> None:
    samples, shape = [Sample("a"), Sample("b", 1)], (3, 5, 1)
    drawn = solver_noise(samples, shape, 7, 4)
    generators = [item.generator(7, "solver") for item in samples]
    expected = [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(4)]
    assert torch.equal(drawn, torch.stack(expected))


def test_a_condition_is_prepared_once_for_a_trajectory_and_never_with_gradients(model: Model) -> None:
    guided, condition, z = model.guided(3.0), model.encode(PROMPTS[:2]), normal(2, *model.latent_shape)
    t = torch.tensor([500, 500])
    with torch.no_grad():
        first, again = guided(z, t, condition), guided(z, t, condition)
        assert guided._inputs(condition) is guided._inputs(condition)
        other = guided(z, t, model.encode(PROMPTS[1:3]))
    assert torch.equal(first, again) and not torch.equal(first, other)
    leaf = {name: tensor.clone().requires_grad_() for name, tensor in condition.tensors.items()}
    for _ in range(2):  # the second backward pass needs a graph of its own
        x0 = guided(z, t, replace(condition, tensors=leaf))
        x0.sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.abs().sum() > 0) for tensor in leaf.values())


def test_a_machine_that_cannot_compile_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: object, **settings: object) -> object:
        raise RuntimeError("no working\nC++ compiler")

    compiling.require_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", fails)
    expected = (
        r"^nothing can be compiled on this machine \(no working C\+\+ compiler\); install a C\+\+ compiler such as "
        r"g\+\+, with Python's headers, or leave out --compile$"
    )
    with pytest.raises(DdilError, match=expected):
        compiling.compile_module(nn.Linear(1, 1), torch.device("cpu"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A pipeline of one block up and one down: the compiler writes few kernels, each of which takes it a second."""
    pipeline = build("StableDiffusionPipeline", tmp_path / "words", prediction="v_prediction")
    denoising = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    coding = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    pipeline.register_modules(
        unet=tiny_unet(block_out_channels=(8,), **denoising),
        vae=tiny_autoencoder(block_out_channels=(8,), **coding, sample_size=LATENT_SIZE),
    )
    pipeline.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_networks_draw_what_plain_ones_draw(small: Path) -> None:
    plain_model, compiled = (load_model(str(small), compute=Compute(compile=told)) for told in (False, True))
    samples = [Sample(prompt) for prompt in PROMPTS[:2]]
    plain, fast = (
        sample_latents(m, samples, PROMPTS[:2], resolve_sampling(m, 2, guidance_scale=1.0), 3, 2)
        for m in (plain_model, compiled)
    )
    assert distance(fast, plain) < 1e-4
    assert np.abs(compiled.decode(plain).astype(int) - plain_model.decode(plain)).max() <= 1
    assert compiled.denoiser.net.state_dict().keys() == plain_model.denoiser.net.state_dict().keys()


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_decodes_behind_the_host_what_it_decodes_at_once(folder: Path) -> None:
    on_gpu = load_model(str(folder), "cuda")
    z = sent(initial_noise([Sample(prompt) for prompt in PROMPTS], on_gpu.latent_shape, 0), on_gpu.device)
    begun = [on_gpu.begin_decode(part, 2) for part in (z, z.flip(0))]
    first, second = (images() for images in begun)
    assert np.array_equal(first, on_gpu.decode(z, 2)) and np.array_equal(first, second[::-1])


@pytest.mark.gpu
@pytest.mark.slow
def test_captured_graphs_draw_what_eager_networks_draw(folder: Path) -> None:
    eager, captured = (load_model(str(folder), "cuda", compute=Compute(compile=c)) for c in (False, True))
    drawn = [sample(m, PROMPTS, steps=4, batch_size=2, seed=1) for m in (eager, captured)]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 2
