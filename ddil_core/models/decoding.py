"""Images of latents. A GPU decodes while its host goes on with the next batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.models.memory import tiles
from ddil_core.support.finite import Finite, not_finite


@torch.no_grad()
def begin_decoding(
    vae: Any,
    z: Tensor,
    scaling: tuple[float | Tensor, float | Tensor],
    batch_size: int,
    owner: str,
    to_images: Callable[[Tensor], Tensor],
    *,
    static: bool = False,
    whole: int = 0,
) -> Callable[[], np.ndarray]:
    """Begin to decode scaled latents, and return a function that waits for the images [B, H, W, C].

    A GPU's images are copied to pinned memory behind its work, so that the host waits once and not after each part.

    Args:
        vae: The autoencoder.
        z: Scaled latents [B, C, h, w].
        scaling: (scale, shift) of ``latent_scaling``.
        batch_size: The most images at once. 0 decodes them one by one, in tiles.
        owner: What the message of an error calls the model.
        to_images: Returns the images of decoded values (``ImageFormat``).
        static: Give all parts the same number of rows. Rows that fill the last part up are dropped.
        whole: The latents of a whole batch, where z may be a shorter one: its parts then have as many rows, if static.

    Raises:
        DdilError: (by the returned function) the images are not finite.
    """
    scale, shift = scaling
    rows = batch_size or 1
    if static:
        whole = max(whole, len(z))
        rows = -(-whole // -(-whole // rows))  # as even as possible, so that few rows are decoded in vain
    finite, parts = Finite[str](), list[Tensor]()
    with nullcontext() if batch_size else tiles(vae, max(z.shape[-2:])):
        for part in z.split(rows):
            full = torch.cat([part, part[:1].expand(rows - len(part), -1, -1, -1)]) if static else part
            pixels = vae.decode((full / scale + shift).to(vae.dtype)).sample[: len(part)]
            finite.see("after its autoencoder decoded them", pixels)
            parts.append(_to_host(to_images(pixels).permute(0, 2, 3, 1)))
    done = None
    if z.is_cuda:
        done = torch.cuda.Event()
        done.record()

    def images() -> np.ndarray:
        if done is not None:
            done.synchronize()
        if (place := finite.first_broken()) is not None:
            raise not_finite("the images", place, owner, [vae])
        return torch.cat(parts).numpy()

    return images


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host; from a GPU behind its work, into pinned memory."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
