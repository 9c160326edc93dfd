"""Train the teacher of ``benchmarks.stranger_world``, and write its folders of captioned pictures.

    python -m benchmarks.stranger --out runs/stranger

This makes OUT/teacher, OUT/train (4,000 pictures), OUT/choose and OUT/test (1,000 each). It takes about 20 minutes on
one core. After an interruption, run the same command again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import stranger_world as world
from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.loop import Ema
from ddil_core.shapes.training.architecture import use_plain_attention
from ddil_core.shapes.training.train import run_stage

CAPTION_DROPOUT = 0.1


def pictures(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Return pictures, float32 [N, 3, 32, 32] in [-1, 1], and their captions."""
    rng = np.random.default_rng(seed)
    drawn = [world.picture(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(image) for image, _ in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, [caption for _, caption in drawn]


def train_autoencoder(pixels: Tensor, out: Path, steps: int) -> Any:
    torch.manual_seed(0)
    vae = world.autoencoder()

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = pixels[torch.randint(len(pixels), (16,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        loss = error.abs().mean() + 10 * error.square().mean() + 2e-6 * posterior.kl().mean()
        return {"loss": loss, "mse": error.square().mean()}

    run_stage("autoencoder", vae, losses, out=out, steps=steps, lr=2e-3, weight_decay=1e-4)
    return vae.eval()


def train_teacher(x0: Tensor, tokens: Tensor, no_caption: Tensor, out: Path, steps: int) -> nn.ModuleDict:
    """Train the U-Net and its text encoder on the squared error of ε. Return the averaged weights."""
    torch.manual_seed(1)
    words = world.tokenizer()
    model = nn.ModuleDict({"unet": world.unet(), "text_encoder": world.text_encoder(words)}).train()
    use_plain_attention(*model.values())
    ema, schedule = Ema(model, 0.999), Schedule.stable_diffusion()

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(x0), (32,), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < CAPTION_DROPOUT
        t = torch.randint(len(schedule), (len(rows),), generator=generator)
        eps = torch.randn(x0[rows].shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = model["text_encoder"](torch.where(dropped, no_caption, tokens[rows])).last_hidden_state
            predicted = model["unet"](schedule.add_noise(x0[rows], eps, t), t, text).sample
        return {"loss": (predicted.float() - eps).square().mean()}

    run_stage("teacher", model, losses, out=out, steps=steps, lr=1e-3, ema=ema)
    return ema.module


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/stranger"), show_default=True
)
@click.option("--autoencoder-steps", default=2000, show_default=True)
@click.option("--teacher-steps", default=6000, show_default=True)
def main(out: Path, autoencoder_steps: int, teacher_steps: int) -> None:
    """Train the teacher and write the pictures."""
    for seed, (name, count) in enumerate({"train": 4000, "choose": 1000, "test": 1000}.items()):
        if not (out / name / "metadata.jsonl").is_file():
            world.write_pictures(out / name, count, seed)
    pixels, captions = pictures(4000, 0)
    vae = train_autoencoder(pixels, out, autoencoder_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(250)])
    scale = float(1 / latents.std())
    words = world.tokenizer()
    tokens = words([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    model: Any = train_teacher(scale * latents, tokens[:-1], tokens[-1], out, teacher_steps)
    vae.register_to_config(scaling_factor=scale)
    world.save_teacher(out / "teacher", vae, model["unet"], model["text_encoder"], words)


if __name__ == "__main__":
    main()
