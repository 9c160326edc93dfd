"""The training images of the shapes world's teacher, encoded once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from ddil_core.shapes.batches import draw_batch
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_tensors
from ddil_core.support.progress import progress

SEED = 0
"""The seed of the whole training."""


@dataclass
class TrainingPool:
    """Encoded images of the training split.

    Attributes:
        mean: The posterior's mean, float16 [N, C, H, W], not scaled.
        std: The posterior's standard deviation, float16 [N, C, H, W], not scaled.
        tokens: The captions' tokens, int64 [N, L].
        scaling_factor: The factor that scales latents; by default the factor that gives them unit variance.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor
    scaling_factor: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self.scaling_factor = self.scaling_factor or float(1 / self.mean[:4096].float().std())

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw scaled latents, float32 [B, C, H, W], from the posterior, with their captions' tokens [B, L]."""
        rows = torch.randint(len(self.mean), (size,), generator=generator)
        mean, std = self.mean[rows].float(), self.std[rows].float()
        return (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling_factor, self.tokens[rows]


@torch.no_grad()
def encode_training_pool(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    out: Path,
    device: torch.device,
    size: int = 49152,
    scaling_factor: float = 0.0,
) -> TrainingPool:
    """Encode training images and store them in ``out``, or read the file where it exists.

    Args:
        vae: The autoencoder.
        tokenizer: The tokenizer of the captions.
        out: The folder of the training.
        device: The device of ``vae``.
        size: The number of images, a multiple of the batch size 128.
        scaling_factor: The factor that scales latents; 0 for the factor that gives them unit variance.

    Raises:
        DdilError: the file is damaged.
    """
    path = out / "checkpoints" / "latents.safetensors"
    if path.exists():
        try:
            return TrainingPool(**load_file(path), scaling_factor=scaling_factor)
        except (SafetensorError, TypeError, OSError) as error:
            raise DdilError(f"the encoded data {path} is damaged; delete the file to encode the data again") from error
    batch_size = 128
    means, stds, tokens = [], [], []
    with progress("latents", total=size // batch_size) as advance:
        for index in range(size // batch_size):
            batch = draw_batch(batch_size, index, seed=SEED + 1)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                posterior = vae.encode(batch.pixels().to(device)).latent_dist
            means.append(posterior.mean.half().cpu().contiguous())
            stds.append(posterior.std.half().cpu().contiguous())
            tokens.append(tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids)
            advance()
    pool = {"mean": torch.cat(means), "std": torch.cat(stds), "tokens": torch.cat(tokens)}
    write_tensors(path, pool)
    return TrainingPool(**pool, scaling_factor=scaling_factor)
