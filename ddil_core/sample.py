"""Pictures of prompts, with any solver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ddil_core.models import Model
from ddil_core.noise import Sample, initial_noise
from ddil_core.progress import progress
from ddil_core.schedule import grid, transitions
from ddil_core.solvers import get_solver

DEFAULT_STEPS = 32


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[str],
    *,
    num_images: int = 1,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """uint8 [prompts, num_images, H, W, 3]. None takes what the model was made for.

    The noise of a picture comes from (seed, prompt, number) alone.
    """
    chosen = get_solver(solver or model.sampling.solver)
    steps = steps or model.sampling.steps or DEFAULT_STEPS
    denoiser = model.guided(guidance_scale)
    texts = [prompt for prompt in prompts for _ in range(num_images)]
    samples = [Sample(prompt, number) for prompt in prompts for number in range(num_images)]
    pictures = []
    with progress("sample", total=len(samples)) as advance:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            condition = model.encode(texts[start : start + batch_size])
            z = initial_noise(part, model.latent_shape, seed).to(model.device)
            generators = [s.generator(seed, "solver") for s in part]
            carry = None
            for t, s in transitions(grid(steps)):
                t_rows, s_rows = (torch.full((len(part),), value, device=z.device) for value in (t, s))
                noise = None
                if chosen.stochastic:
                    noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z.device)
                x0 = denoiser(z, t_rows, condition)
                z, carry = chosen.step(model.denoiser.schedule, z, t_rows, s_rows, x0, carry, noise)
            pictures.append(model.decode(z))
            advance(len(part))
    images = np.concatenate(pictures)
    return images.reshape(len(prompts), num_images, *images.shape[1:])
