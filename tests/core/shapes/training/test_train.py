"""The training script's stages: killed and resumed they end with the same weights, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.loop import fit
from ddil_core.models.model import load_model
from ddil_core.shapes.scene import draw_scene
from ddil_core.shapes.scorer import WEIGHTS as SCORER
from ddil_core.shapes.training import architecture, flow, latents, train
from ddil_core.shapes.training.card import caption_preferred, measure_card, write_card
from ddil_core.shapes.training.stage import learning_rate

CPU = torch.device("cpu")
STEPS = 3


class Killed(Exception):
    """What a test ends a training with."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return architecture.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pool_of(tokenizer: CLIPTokenizer, count: int = 12) -> latents.TrainingPool:
    generator = torch.Generator().manual_seed(0)
    shape = (count, architecture.LATENT_CHANNELS, architecture.LATENT_SIZE, architecture.LATENT_SIZE)
    captions = [draw_scene(np.random.default_rng(i)).meaning.caption for i in range(count)]
    return latents.TrainingPool(
        mean=(2.5 * torch.randn(shape, generator=generator)).half(),
        std=torch.full(shape, 0.1).half(),
        tokens=tokenizer(captions, padding="max_length", return_tensors="pt").input_ids,
    )


def fresh_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(1)
    return architecture.text_encoder(tokenizer)


Stage = Callable[[Path, CLIPTokenizer], nn.Module]

STAGES: dict[str, Stage] = {
    "autoencoder": lambda out, tokenizer: train.train_autoencoder(out, CPU, STEPS, batch_size=2),
    "text encoder": lambda out, tokenizer: train.train_text_encoder(
        pool_of(tokenizer), tokenizer, out, CPU, STEPS, batch_size=4
    ),
    "teacher": lambda out, tokenizer: train.train_teacher(
        pool_of(tokenizer), tokenizer, out, CPU, STEPS, batch_size=4, text_encoder=fresh_text_encoder(tokenizer)
    ),
    "flow": lambda out, tokenizer: flow.train_flow(
        pool_of(tokenizer), flow.projected(fresh_text_encoder(tokenizer)), tokenizer, out, CPU, STEPS, batch_size=4
    ),
    "scorer": lambda out, tokenizer: train.train_scorer(tokenizer, out, CPU, STEPS, batch_size=4),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_with_the_same_weights(
    name: str, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES[name]
    whole = stage(tmp_path / "whole", tokenizer).state_dict()
    start = {key: value.clone() for key, value in whole.items()}
    done: list[int] = []

    def fragile(update: Callable[[int], Any], stateful: Any, **settings: Any) -> None:
        """The loop, saving after every update, killed once as it begins its third."""

        def killing(step: int) -> Any:
            if step == 2 and done == [0, 1]:
                raise Killed
            done.append(step)
            return update(step)

        fit(killing, stateful, **(settings | {"save_every": 1}))

    monkeypatch.setattr("ddil_core.shapes.training.stage.fit", fragile)
    with pytest.raises(Killed):
        stage(tmp_path / "killed", tokenizer)
    done.append(-1)
    resumed = stage(tmp_path / "killed", tokenizer).state_dict()
    assert done == [0, 1, -1, 2]  # no update was made twice
    assert resumed.keys() == start.keys()
    assert [key for key in start if not torch.equal(start[key], resumed[key])] == []


def test_a_stage_learns(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """Weights move, and the log says what the loss was."""
    torch.manual_seed(train.SEED)
    before = architecture.autoencoder().state_dict()
    after = train.train_autoencoder(tmp_path, CPU, 2, batch_size=2).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (line["stage"], line["step"]) == ("autoencoder", 2)
    assert line["loss"] > line["mse"] > 0


def test_plain_attention_computes_what_the_fused_one_does(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    unet, text_encoder = architecture.unet().eval(), architecture.text_encoder(tokenizer).eval()
    tokens = tokenizer(
        ["a small red circle on a grey background", ""], padding="max_length", return_tensors="pt"
    ).input_ids
    z = torch.randn(2, architecture.LATENT_CHANNELS, architecture.LATENT_SIZE, architecture.LATENT_SIZE)
    found = []
    with torch.no_grad():
        for change in (lambda *networks: None, architecture.use_plain_attention):
            change(unet, text_encoder)
            states = text_encoder(tokens).last_hidden_state
            found.append((states, unet(z, torch.tensor([10, 900]), states).sample))
    assert text_encoder.config._attn_implementation == "eager"
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor"}
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)


def test_the_teacher_s_first_eighth_sees_only_high_noise(
    tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def at(schedule: Schedule, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(int(t.min()))
        return original(schedule, t, like)

    original = Schedule.at
    monkeypatch.setattr(Schedule, "at", at)
    text_encoder = fresh_text_encoder(tokenizer)
    train.train_teacher(pool_of(tokenizer), tokenizer, tmp_path, CPU, 16, batch_size=32, text_encoder=text_encoder)
    assert min(seen[:2]) >= train.HIGH_NOISE > max(seen[2:])


def test_the_learning_rate_rises_then_falls_along_a_cosine() -> None:
    assert learning_rate(0, 1000, 2.0, warmup=100) == pytest.approx(0.02)
    assert learning_rate(500, 1000, 2.0, warmup=100) == pytest.approx(1.0)
    assert learning_rate(1000, 1000, 2.0, warmup=100) == pytest.approx(0.0)
    rates = [learning_rate(step, 1000, 2.0, warmup=100) for step in range(100, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_the_pool_gives_latents_of_unit_variance(tokenizer: CLIPTokenizer) -> None:
    pool = pool_of(tokenizer)
    x0, tokens = pool.draw(64, torch.Generator().manual_seed(1))
    again, _ = pool.draw(64, torch.Generator().manual_seed(1))
    assert torch.equal(x0, again)
    assert (x0.shape[1:], x0.dtype) == (pool.mean.shape[1:], torch.float32)
    assert x0.std().item() == pytest.approx(1.0, abs=0.05)
    assert all((pool.tokens == row).all(dim=1).any() for row in tokens)


def test_the_export_is_a_pipeline_and_its_card_is_measured(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """Untrained networks through the script's last part: half precision, sampled as it says, a card with every share."""
    torch.manual_seed(0)
    networks = nn.ModuleDict({"unet": architecture.unet(), "text_encoder": architecture.text_encoder(tokenizer)})
    train.export_teacher(architecture.autoencoder(), networks, tokenizer, 0.5, tmp_path / "teacher")
    assert not list(tmp_path.rglob("*.bin")) and len(list(tmp_path.rglob("*.safetensors"))) == 3
    model = load_model(str(tmp_path / "teacher"))
    assert model.sampling.guidance_scale == train.GUIDANCE_SCALE and model.sampling.steps is None
    assert model.pipeline.vae.config.scaling_factor == 0.5
    assert model.denoiser.prediction == "v_prediction"
    found = measure_card(model, count=2)
    assert found["rendered"]["exact"] == 1.0
    assert 0 < found["autoencoder_psnr_db"] < 30
    assert all(0 <= share <= 1 for share in found["teacher_32_steps"].values())
    write_card(tmp_path, found, {"teacher steps": 3})
    assert json.loads((tmp_path / "card.json").read_text()) == {"measured": found, "training": {"teacher steps": 3}}
    card = (tmp_path / "README.md").read_text()
    assert card.count("\n| ") == 7 and "| rendered images | 100.0% |" in card and "Training: teacher steps 3." in card


def test_the_command_trains_from_nothing_and_then_further(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Both ways through the whole command, each stage for two updates; done again, nothing is trained again."""
    sizes = ["--teacher-steps", 2, "--pool", 128, "--captions", 2, "--device", "cpu"]
    others = ["--autoencoder-steps", 2, "--scorer-steps", 2, "--text-encoder-steps", 2]
    new, more = tmp_path / "new", tmp_path / "more"
    further = ["--out", more, "--init", new / "weights", "--further", *sizes]
    for arguments, stages in (
        (["--out", new, *others, *sizes], ["autoencoder", "scorer", "text encoder", "teacher"]),
        (further, ["teacher"]),
        (further, ["teacher"]),
    ):
        found = cli(*arguments, command=train.main)
        assert found.exit_code == 0, found.output
        assert stages == [json.loads(line)["stage"] for line in (arguments[1] / "log.jsonl").read_text().splitlines()]
        card = json.loads((arguments[1] / "weights" / "card.json").read_text())
        assert card["measured"]["captions"] == 2 and card["training"]["teacher steps"] == 2
    assert card["training"]["text encoder and U-Net"] == "trained further from the weights before"
    before, after = (load_model(str(folder / "weights" / "teacher")).pipeline for folder in (new, more))
    assert dict(before.unet.config) == dict(after.unet.config) | {"_name_or_path": before.unet.config._name_or_path}
    assert before.vae.config.scaling_factor == after.vae.config.scaling_factor
    same, moved = before.vae.state_dict(), after.vae.state_dict()
    assert all(torch.equal(same[key], moved[key]) for key in same)
    untaught, taught = before.unet.state_dict(), after.unet.state_dict()
    assert any(not torch.equal(untaught[key], taught[key]) for key in untaught)


def test_the_scorer_can_be_trained_alone(cli: Callable[..., Result], tmp_path: Path) -> None:
    arguments = ["--out", tmp_path, "--only-scorer", "--scorer-steps", 2, "--device", "cpu"]
    found = cli(*arguments, command=train.main)
    assert (found.exit_code, found.stdout) == (0, f"The scorer is in {tmp_path / 'weights' / 'scorer'}\n")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["scorer"]
    untaught = caption_preferred(tmp_path / "weights" / "scorer", 100)
    assert 0.2 < untaught < 0.8 < caption_preferred(SCORER, 100)


def test_the_scorer_alone_is_trained_anew(cli: Callable[..., Result], tmp_path: Path) -> None:
    for others in (["--measure"], ["--init", tmp_path]):
        found = cli("--only-scorer", *others, "--out", tmp_path, command=train.main)
        assert found.exit_code == 2
        assert found.stderr.endswith("Error: --only-scorer trains anew: leave out --measure, --init and --further\n")


def test_training_further_needs_weights(cli: Callable[..., Result], tmp_path: Path) -> None:
    found = cli("--further", "--out", tmp_path, command=train.main)
    assert found.exit_code == 2
    assert found.stderr.endswith("Error: --further needs --init with the weights to train further\n")
