"""Images of latents. A GPU decodes while its host goes on with the next batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_core.models.memory import tiles
from ddil_core.support.devices import fetched, work_until_now
from ddil_core.support.finite import Checks, not_finite
from ddil_core.support.fitting import Fitting


@torch.no_grad()
def begin_decoding(
    vae: Any,
    z: Tensor,
    scaling: tuple[float | Tensor, float | Tensor],
    batch_size: int,
    owner: str,
    to_images: Callable[[Tensor], Tensor],
    *,
    checks: Checks,
    static: bool = False,
    whole: int = 0,
) -> Callable[[], np.ndarray]:
    """Begin to decode scaled latents, and return a function, called once, that waits for the images [B, H, W, C].

    A GPU's images are copied to pinned memory behind its work. The host waits once, and not for later work.

    Args:
        vae: The autoencoder.
        z: Scaled latents [B, C, h, w].
        scaling: (scale, shift) of ``latent_scaling``.
        batch_size: The most images at once, or fewer where they do not fit. 0 decodes them one by one, in tiles.
        owner: What the message of an error calls the model.
        to_images: Returns the images of decoded values (``ImageFormat``).
        checks: What must be finite before the images count. The images are added to it.
        static: Give all parts the same number of rows. Rows that fill the last part up are dropped.
        whole: The latents of a whole batch, where z may be a shorter one: its parts then have as many rows, if static.

    Raises:
        DdilError: (by the returned function on a GPU, else at once) the images, or what ``checks`` saw, are not finite.
    """
    scale, shift = scaling
    most = batch_size or 1
    rows = _even(max(whole, len(z)), most) if static else most
    broken = partial(not_finite, "the images", "after its autoencoder decoded them", owner, [vae])
    fitting = Fitting("the autoencoder")
    fitting.most = rows

    def decoded(part: slice) -> Tensor:
        latents, rows = z[part], fitting.most or len(z)
        full = torch.cat([latents, latents[:1].expand(rows - len(latents), -1, -1, -1)]) if static else latents
        pixels = vae.decode((full / scale + shift).to(vae.dtype)).sample[: len(latents)]
        checks.see(broken, pixels)
        return fetched(to_images(pixels).permute(0, 2, 3, 1))

    with nullcontext() if batch_size else tiles(vae, max(z.shape[-2:])):
        parts = fitting.parts(decoded, len(z))
    first_broken, wait = checks.begin_reading(), work_until_now(z.device)

    def images() -> np.ndarray:
        wait()
        if (error := first_broken()) is not None:
            raise error()
        joined = torch.cat(parts).numpy()
        parts.clear()  # so that nothing is held twice
        return joined

    if z.is_cuda:
        return images
    found = images()
    return lambda: found


def _even(count: int, most: int) -> int:
    """Return the rows of each part of ``count`` rows, at most ``most``. Even parts decode few rows in vain."""
    return -(-count // -(-count // most))
