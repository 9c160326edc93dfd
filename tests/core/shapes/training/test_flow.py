"""The flow teacher's training: what the transformer reads, what it learns, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import SHIPPED
from ddil_core.shapes.training import architecture, flow
from ddil_core.shapes.training.latents import TrainingPool

CPU = torch.device("cpu")
CAPTIONS = ["a small red circle left of a large blue star on a grey background", "a large green star"]
SAMPLES = [Sample(caption) for caption in CAPTIONS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return architecture.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    return architecture.text_encoder(tokenizer).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes after two updates."""
    folder = tmp_path_factory.mktemp("flow")
    words = ["--out", str(folder), "--steps", "2", "--pool", "128", "--captions", "2", "--device", "cpu"]
    found = CliRunner().invoke(flow.main, words, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return folder


@pytest.fixture(scope="module")
def model(out: Path) -> Model:
    return load_model(str(out / "weights" / "teacher"))


def test_the_text_states_are_those_of_the_encoder(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    expected = encoder(tokens, output_hidden_states=True)
    states, pooled = flow.condition(flow.projected(encoder), tokens)
    for half in states.chunk(2, dim=-1):
        torch.testing.assert_close(half, flow.STATE_SCALE * expected.hidden_states[-1], rtol=1e-5, atol=1e-7)
    for half in pooled.chunk(2, dim=-1):
        torch.testing.assert_close(half, expected.pooler_output, rtol=1e-5, atol=1e-6)


class Exact(nn.Module):
    """The velocity towards the only image of a pool, in closed form."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0, self.factor, self.times = x0, nn.Parameter(torch.ones(())), list[float]()

    def forward(self, hidden_states: Tensor, timestep: Tensor, **condition: Tensor) -> SimpleNamespace:
        self.times += timestep.tolist()
        s = (timestep / 1000).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.factor * (hidden_states - self.x0) / s)


def test_the_exact_velocity_has_no_loss(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times are logit-normal with SD3's shift: the middle one is 1000 · 3/4."""
    x0 = torch.randn(1, architecture.LATENT_CHANNELS, architecture.LATENT_SIZE, architecture.LATENT_SIZE).half()
    tokens = tokenizer(CAPTIONS[:1], padding="max_length", return_tensors="pt").input_ids
    pool = TrainingPool(x0, torch.zeros_like(x0), tokens, scaling_factor=0.5)
    exact = Exact(0.5 * x0.float())
    monkeypatch.setattr(flow, "transformer", lambda: exact)
    flow.train_flow(pool, flow.projected(encoder), tokenizer, tmp_path, CPU, 4, batch_size=256)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["stage"], line["step"]) == ("flow", 4) and 0 <= line["loss"] < 1e-6
    assert torch.tensor(exact.times).median().item() == pytest.approx(750, abs=40)


def test_an_untrained_transformer_gives_zeros_and_can_learn() -> None:
    network = flow.transformer()
    shape = (2, architecture.LATENT_CHANNELS, architecture.LATENT_SIZE, architecture.LATENT_SIZE)
    width = 2 * architecture.TEXT_WIDTH
    inputs = {"encoder_hidden_states": torch.randn(2, 20, width), "pooled_projections": torch.randn(2, width)}
    found = network(hidden_states=torch.randn(shape), timestep=torch.tensor([1.0, 999.0]), **inputs).sample
    assert found.shape == shape and not found.any()
    (found - 1).square().mean().backward()
    assert network.proj_out.weight.grad.abs().max() > 0


def test_the_command_writes_a_teacher_with_the_shipped_frame(out: Path, model: Model) -> None:
    assert [json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()] == ["flow"]
    card = json.loads((out / "weights" / "card.json").read_text())
    assert card["measured"]["captions"] == 2 and card["training"]["updates"] == 2
    assert (out / "weights" / "README.md").read_text().count("| teacher, 32 Euler steps |") == 1
    assert (model.sampling.solver, model.sampling.steps) == ("flow_euler", None)
    assert (model.sampling.guidance_scale, model.denoiser.schedule.shift) == (flow.GUIDANCE_SCALE, flow.SHIFT)
    weights = "vae/diffusion_pytorch_model.safetensors"  # git stores equal files once
    assert (SHIPPED["shapes"].folder / weights).read_bytes() == (out / "weights" / "teacher" / weights).read_bytes()


def test_the_teacher_is_diffusers_own_pipeline(model: Model) -> None:
    """Latents, and the pictures that they become. There are no T5 tokens: the transformer was made without T5."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(model.files.folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    for weight in pipeline.transformer.parameters():  # after two updates the network still gives almost 0
        nn.init.normal_(weight, std=0.05)
    model.denoiser.net.load_state_dict(pipeline.transformer.state_dict())
    assert model.encode(CAPTIONS).tensors["encoder_hidden_states"].shape[1] == architecture.MAX_TOKENS
    z = initial_noise(SAMPLES, model.latent_shape, 0)
    ours = sample_latents(model, SAMPLES, CAPTIONS, resolve_sampling(model, steps=4), 0)
    call = {"num_inference_steps": 4, "guidance_scale": flow.GUIDANCE_SCALE, "max_sequence_length": 0}
    theirs = pipeline(CAPTIONS, latents=z, output_type="latent", **call).images
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    pictures = pipeline(CAPTIONS, latents=z, output_type="np", **call).images
    assert np.abs(model.decode(ours) / 255 - pictures).max() <= 1 / 255
