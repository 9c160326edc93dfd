"""Train the whole shapes world from nothing: ``python -m ddil_core.shapes.train --out DIR``.

Three stages, each resumable at any update: the autoencoder, the teacher (U-Net and text encoder, v-prediction with
caption dropout for guidance), and the two-tower scorer. What is finished is kept; what was interrupted goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddil_core.progress import progress
from ddil_core.schedule import Schedule
from ddil_core.shapes import architecture
from ddil_core.shapes.data import draw_batch
from ddil_core.train import Ema, Logs, fit

SEED = 0
CAPTION_DROPOUT = 0.1


def cosine(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """A learning rate that rises over ``warmup`` steps and falls to 0 along a half cosine."""
    rise = min(1.0, (step + 1) / warmup)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def train_autoencoder(out: Path, device: torch.device, steps: int, batch_size: int = 32, lr: float = 2e-3) -> nn.Module:
    """Reconstruction (L1 and squared error) with a light KL term; returns the averaged weights."""
    torch.manual_seed(SEED)
    vae = architecture.autoencoder().to(device)
    ema = Ema(vae, 0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def update(step: int) -> Logs:
        set_learning_rate(optimizer, cosine(step, steps, lr))
        generator = torch.Generator(device).manual_seed(step)
        pixels = draw_batch(batch_size, step, seed=SEED).pixels().to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - pixels
        kl = posterior.kl().float().mean()
        loss = error.abs().mean() + 10 * error.square().mean() + 2e-6 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update(vae)
        return {"loss": loss.detach(), "mse": error.detach().square().mean(), "kl": kl.detach()}

    fit(
        update,
        {"vae": vae, "ema": ema, "optimizer": optimizer},
        steps=steps,
        checkpoint=out / "checkpoints" / "autoencoder.pt",
        log=out / "log.jsonl",
        title="autoencoder",
        save_every=250,
    )
    return ema.module


@dataclass
class LatentPool:
    """Encoded pictures of the training split: posterior ``mean`` and ``std`` float16 [N, C, H, W] (unscaled), caption
    ``tokens`` int64 [N, L], and the ``scaling_factor`` that gives the latents unit variance."""

    mean: Tensor
    std: Tensor
    tokens: Tensor

    @property
    def scaling_factor(self) -> float:
        return float(1 / self.mean[:4096].float().std())

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scaled latents float32 [B, C, H, W], sampled from the posterior, and their tokens [B, L]."""
        rows = torch.randint(len(self.mean), (size,), generator=generator)
        mean, std = self.mean[rows].float(), self.std[rows].float()
        return (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling_factor, self.tokens[rows]


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, tokenizer: object, out: Path, device: torch.device, size: int = 49152) -> LatentPool:
    """Encode ``size`` training pictures once; read them back where that is done already."""
    path = out / "checkpoints" / "latents.safetensors"
    if path.exists():
        return LatentPool(**load_file(path))
    batch_size = 128
    means, stds, tokens = [], [], []
    with progress("latents", total=size // batch_size) as advance:
        for index in range(size // batch_size):
            batch = draw_batch(batch_size, index, seed=SEED + 1)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                posterior = vae.encode(batch.pixels().to(device)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
            tokens.append(tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids)  # type: ignore[operator]
            advance()
    pool = {"mean": torch.cat(means), "std": torch.cat(stds), "tokens": torch.cat(tokens)}
    save_file(pool, path)
    return LatentPool(**pool)


def train_teacher(pool: LatentPool, tokenizer: object, out: Path, device: torch.device, steps: int, batch_size: int = 64, lr: float = 1.5e-3) -> nn.ModuleDict:
    """The U-Net and its text encoder together, on the squared error of v; returns the averaged weights."""
    torch.manual_seed(SEED)
    model = nn.ModuleDict({"unet": architecture.unet(), "text_encoder": architecture.text_encoder(tokenizer)}).to(device)
    ema = Ema(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = Schedule.stable_diffusion().to(device)
    no_caption = tokenizer("", padding="max_length", return_tensors="pt").input_ids  # type: ignore[operator]

    def update(step: int) -> Logs:
        set_learning_rate(optimizer, cosine(step, steps, lr))
        generator = torch.Generator().manual_seed(step)
        x0, tokens = pool.draw(batch_size, generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < CAPTION_DROPOUT
        tokens = torch.where(dropped, no_caption, tokens)
        t = torch.randint(len(schedule), (batch_size,), generator=generator).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        x0 = x0.to(device)
        alpha, sigma = schedule.at(t, x0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            context = model["text_encoder"](tokens.to(device)).last_hidden_state
            v = model["unet"](alpha * x0 + sigma * eps, t, context).sample
        loss = (v.float() - (alpha * eps - sigma * x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        return {"loss": loss.detach()}

    fit(
        update,
        {"model": model, "ema": ema, "optimizer": optimizer},
        steps=steps,
        checkpoint=out / "checkpoints" / "teacher.pt",
        log=out / "log.jsonl",
        title="teacher",
        save_every=500,
    )
    return ema.module
