"""Pictures of prompts, with any solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ddil_core.models import Model, Sampling
from ddil_core.noise import Sample, initial_noise
from ddil_core.progress import progress
from ddil_core.schedule import grid, transitions
from ddil_core.solvers import get_solver

DEFAULT_STEPS = 32


@torch.no_grad()
def draw(model: Model, samples: Sequence[Sample], texts: Sequence[str], sampling: Sampling, seed: int) -> np.ndarray:
    """One batch of pictures uint8 [B, H, W, 3]: a sample's noise comes from it and the seed alone, ``texts`` are its prompts."""
    solver = get_solver(sampling.solver)
    denoiser = model.guided(sampling.guidance_scale)
    condition = model.encode(texts)
    z = initial_noise(samples, model.latent_shape, seed).to(model.device)
    generators = [one.generator(seed, "solver") for one in samples]
    carry = None
    for t, s in transitions(grid(sampling.steps or DEFAULT_STEPS)):
        t_rows, s_rows = (torch.full((len(z),), value, device=z.device) for value in (t, s))
        noise = None
        if solver.stochastic:
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z.device)
        x0 = denoiser(z, t_rows, condition)
        z, carry = solver.step(model.denoiser.schedule, z, t_rows, s_rows, x0, carry, noise)
    return model.decode(z)


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
    given: dict[str, Any] = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale}
    sampling = replace(model.sampling, **{key: value for key, value in given.items() if value is not None})
    samples = [Sample(prompt, number) for prompt in prompts for number in range(num_images)]
    pictures = []
    with progress("sample", total=len(samples)) as advance:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            pictures.append(draw(model, part, [one.prompt_id for one in part], sampling, seed))
            advance(len(part))
    images = np.concatenate(pictures)
    return images.reshape(len(prompts), num_images, *images.shape[1:])
