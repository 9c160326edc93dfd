"""Images of prompts, with any solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddil_core.diffusion.integrate import integrate
from ddil_core.diffusion.noise import Sample, initial_noise, solver_noise
from ddil_core.diffusion.parameterization import ReflectionMode
from ddil_core.diffusion.schedule import rows_at
from ddil_core.diffusion.solvers import SOLVERS
from ddil_core.models.model import Model
from ddil_core.models.sampling import Sampling, misuse_warnings, sampling_line
from ddil_core.support.devices import sent
from ddil_core.support.finite import Checks, not_finite
from ddil_core.support.progress import note, progress, warn
from ddil_core.support.text import require_text

T = TypeVar("T")
TRUNCATED = "{} of {} prompts are longer than the text encoder takes; the rest of each is not read"

CENTRES_LATENTS = "StableDiffusionXLPipeline"
"""The only pipeline of diffusers, among those supported here, that reads an autoencoder's ``latents_mean``."""


@torch.no_grad()
def sample_latents(
    model: Model,
    samples: Sequence[Sample],
    texts: Sequence[str],
    sampling: Sampling,
    seed: int,
    rows: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Draw one batch of scaled latents [B, C, H, W].

    Args:
        model: The model.
        samples: One for each latent. The noise of a latent depends on its sample and the seed alone.
        texts: The prompts, one for each sample.
        sampling: Solver, grid and guidance.
        seed: The seed.
        rows: The number of rows to fill the batch up to where shapes should stay the same (``Model.static``). None
            fills nothing up.
        on_step: Called after each step; with a GPU, when it has been given the step.

    Raises:
        DdilError: the latents or the prompts' embeddings are not finite.
    """
    checks = Checks()
    with model.compute.precision():
        z = _integrate(model, samples, texts, sampling, seed, rows, on_step, checks)
    if (error := checks.first_broken()) is not None:
        raise error()
    return z


@torch.no_grad()
def _integrate(
    model: Model,
    samples: Sequence[Sample],
    texts: Sequence[str],
    sampling: Sampling,
    seed: int,
    rows: int | None,
    on_step: Callable[[], object] | None,
    checks: Checks,
) -> Tensor:
    """Draw one batch of scaled latents. ``checks`` sees what must be finite."""
    count = len(samples)
    if rows is not None and model.static:
        samples, texts = _filled_up(samples, rows), _filled_up(texts, rows)
    solver, schedule = sampling.own_solver(), model.denoiser.schedule
    steps = sampling.transitions(schedule)
    reflection = sampling.reflected(model.reference)
    denoiser = model.guided(sampling.guidance_scale, reflection and reflection.to(model.device))
    condition = model.encode(texts, checks=checks if model.device.type == "cuda" else None)
    z = sent(initial_noise(samples, model.latent_shape, seed), model.device)
    if sampling.starts_scaled():
        z = schedule.at(rows_at(steps[0][0], z), z)[1] * z
    noise: Tensor | None = None
    if solver.stochastic:
        noise = sent(solver_noise(samples, model.latent_shape, seed, len(steps)), model.device)
    owner, nets = f"the model {model.reference!r}", [model.denoiser.net]

    def observe(step: int, z: Tensor) -> None:
        place = f"after step {step + 1} of {len(steps)}, at t = {steps[step][0]:g}"
        checks.see(partial(not_finite, "the latents", place, owner, nets), z)
        if on_step is not None:
            on_step()

    draws = None if noise is None else noise.__getitem__
    return integrate(denoiser, solver, z, condition, steps, noise=draws, observe=observe)[:count]


def _filled_up(items: Sequence[T], size: int) -> list[T]:
    """Return the items, and the first one again until there are ``size``."""
    return [*items, *[items[0]] * (size - len(items))]


def sample_images(
    model: Model,
    samples: Sequence[Sample],
    texts: Sequence[str],
    sampling: Sampling,
    seed: int,
    rows: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> np.ndarray:
    """Draw one batch of images uint8 [B, H, W, 3]. The arguments are those of ``sample_latents``."""
    return begin_images(model, samples, texts, sampling, seed, rows, on_step)()


def begin_images(
    model: Model,
    samples: Sequence[Sample],
    texts: Sequence[str],
    sampling: Sampling,
    seed: int,
    rows: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> Callable[[], np.ndarray]:
    """Begin to draw one batch of images. Return a function that waits for them, and raises what went wrong.

    The arguments are those of ``sample_latents``. The host of a GPU can prepare the next batch meanwhile.
    """
    checks = Checks()
    with model.compute.precision():
        latents = _integrate(model, samples, texts, sampling, seed, rows, on_step, checks)
        return model.begin_decode(latents, whole=rows or 0, checks=checks)


def resolve_sampling(
    model: Model,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    reflection: ReflectionMode | None = None,
) -> Sampling:
    """Return the model's own sampling with the given settings in place of its own.

    Args:
        model: The model.
        steps: The number of steps. None keeps the model's own, as in every setting.
        solver: The name of a solver.
        guidance_scale: The guidance scale.
        reflection: How x̂ is kept inside the bounds of the data.

    Raises:
        WrongCommand: the solver does not exist, has no such grid on the model's schedule, or the model brings no bounds
            for reflection.
    """
    settings = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "reflection": reflection}
    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    if solver is not None and SOLVERS.find(solver).name != model.sampling.solver:
        given |= {"ends_clean": True, "replaces": None}  # these two belong to the model's own solver
    if guidance_scale is None:
        given["guidance_scale"] = model.own_guidance()
    sampling = replace(model.sampling, **given)
    sampling.transitions(model.denoiser.schedule)
    sampling.reflected(model.reference)
    return sampling


def sampling_warnings(model: Model, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Return one sentence for each thing that a user should know before sampling these prompts."""
    return [*setting_warnings(model, sampling), *cut_warnings(model, prompts)]


def setting_warnings(model: Model, sampling: Sampling, reference: str | None = None) -> list[str]:
    """Return one sentence for each thing that a user should know before sampling, by the model's configurations.

    The model was distilled for other settings; its own scheduler is not known here; the guidance turns the prompt off;
    diffusers scales the latents in another way.

    Args:
        model: The model, which may lack its weights (``outline``).
        sampling: How the model is sampled.
        reference: What the sentences call the model. Defaults to its reference.
    """
    reference = reference or model.reference
    sentences = [f"{reference!r} {sentence}" for sentence in misuse_warnings(model.sampling, sampling)]
    if sampling.replaces is not None:
        sentences.append(
            f"{reference!r} comes with {sampling.replaces}, which is not known here; {sampling.solver} is in its place"
        )
    if sampling.guidance_scale < 1 and model.denoiser.guidance_width is None:
        sentences.append(
            "guidance below 1 turns the prompt down, and 0 turns it off; where a page writes 0 for no guidance, say "
            "--guidance 1"
        )
    if model.pipeline.vae.config.get("latents_mean") is not None and model.layout.pipeline != CENTRES_LATENTS:
        sentences.append(
            f"the latents_mean and latents_std of {reference!r} are applied here, and diffusers' "
            f"{model.layout.pipeline} ignores them"
        )
    return sentences


def cut_warnings(model: Model, prompts: Sequence[str]) -> list[str]:
    """Return a sentence where prompts are too long for a text encoder."""
    cut = model.cut(prompts)
    return [TRUNCATED.format(cut, len(prompts))] if cut else []


def announce_sampling(model: Model, prompts: Sequence[str], sampling: Sampling, name: str | None = None) -> None:
    """Print how a model is sampled, after warnings of what a user should know about it.

    Args:
        model: The model.
        prompts: The prompts.
        sampling: How the model is sampled.
        name: What the lines call the model. Defaults to its reference.
    """
    for sentence in sampling_warnings(model, prompts, sampling):
        warn(sentence if name is None else f"{name}: {sentence}")
    note(sampling_line(name or model.reference, sampling.effective()))


def require_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that no tokenizer takes.

    Raises:
        WrongCommand: a prompt holds a NUL, or half of a surrogate pair (which a byte that is not UTF-8 becomes).
    """
    for prompt in prompts:
        require_text(prompt, f"the prompt {prompt!r}")


def sample(
    model: Model,
    prompts: Sequence[str],
    *,
    num_images: int = 1,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    reflection: ReflectionMode | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """Draw images of prompts, uint8 [prompts, num_images, H, W, 3].

    The noise of an image depends on the seed, the prompt and the image's number alone.

    Args:
        model: The model.
        prompts: Texts. The empty text is allowed.
        num_images: Images of each prompt.
        steps: The number of steps. None takes the model's own, as in the next three.
        solver: The name of a solver.
        guidance_scale: The guidance scale.
        reflection: How x̂ is kept inside the bounds of the data.
        seed: The seed of the noise.
        batch_size: Images of every batch on the device.

    Raises:
        WrongCommand: no tokenizer takes a prompt, or the settings do not fit the model (``resolve_sampling``).
        DdilError: the latents or images are not finite.
    """
    require_prompts(prompts)
    sampling = resolve_sampling(model, steps, solver, guidance_scale, reflection)
    samples = [Sample(prompt, number) for prompt in prompts for number in range(num_images)]
    rows, batches = min(batch_size, len(samples)), list[np.ndarray]()
    decoding: Callable[[], np.ndarray] | None = None
    starts = range(0, len(samples), batch_size)
    steps = len(starts) * len(sampling.transitions(model.denoiser.schedule))
    with progress("sample, in steps", total=steps) as advance:
        for start in starts:
            part = samples[start : start + batch_size]
            after = begin_images(model, part, [image.prompt_id for image in part], sampling, seed, rows, advance)
            if decoding is not None:  # a GPU decoded the last batch while this one was prepared
                batches.append(decoding())
            decoding = after
            advance(0, note=f"{start + len(part):,} of {len(samples):,} images")
    images = np.concatenate([*batches, *([] if decoding is None else [decoding()])])
    return images.reshape(len(prompts), num_images, *images.shape[1:])
