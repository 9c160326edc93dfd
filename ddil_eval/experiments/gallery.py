"""What systems draw from inverted prompts, measured against the pictures that the prompts are of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.diffusion.noise import Sample
from ddil_core.inversion.towers import Towers
from ddil_core.models.generate import resolve_sampling, sample_images, sampling_warnings
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import Sampling
from ddil_core.support.environment import full_precision
from ddil_core.support.progress import progress, warn
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.experiments.measurement import batches
from ddil_eval.experiments.systems import SystemConfig, how_made
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.recipes import Preparation
from ddil_eval.features.storage import Arrays, cached_arrays


@dataclass(frozen=True)
class Drawn:
    """A system's pictures of all prompts: ``scores`` [N] by metric, one picture of each prompt uint8 [N, H, W, 3], how made."""

    system: SystemConfig
    made: ImageOrigin
    scores: Arrays
    shown: np.ndarray


@dataclass(frozen=True)
class Gallery:
    """Draws ``number`` pictures of each prompt, from noise that all systems share, and measures them.

    ``references`` uint8 [N, H, W, 3] are what the prompts are of, by ``ids``; a system's pictures are brought to their size.
    ``distance`` is the metric between pictures. What is done lies in ``work``.
    """

    ids: tuple[str, ...]
    references: np.ndarray
    distance: str
    extractors: Extractors
    towers: Towers
    number: int
    batch_size: int
    seed: int
    work: Path
    device: str

    @property
    def to_reference(self) -> str:
        """The name of the distance to the reference."""
        return self.distance.removesuffix("_diversity") + "_to_reference"

    @property
    def directions(self) -> dict[str, str]:
        """The metrics by name, with which way is better."""
        return {self.distance: "higher", self.to_reference: "lower", self.towers.identity["name"]: "higher"}

    def draw(self, system: SystemConfig, prompts: Sequence[str], model: Model | None = None) -> Drawn:
        """A system's pictures of all prompts, sampled as its row says; ``model`` is the system's where it is loaded already."""
        model = model or load_model(system.model, self.device)
        sampling = resolve_sampling(model, system.steps, system.solver, system.guidance_scale, system.reflection)
        for sentence in sampling_warnings(model, prompts, sampling):
            warn(f"{system.name}: {sentence}")
        made = how_made(model, sampling, self.seed)
        place = self.work / self._work_key(made, sampling, prompts)

        @full_precision()
        def measure(part: slice) -> Arrays:
            texts = [text for text in prompts[part] for _ in range(self.number)]
            samples = [Sample(name, number) for name in self.ids[part] for number in range(self.number)]
            return self._measured(
                self._sized(sample_images(model, samples, texts, sampling, self.seed)), part, prompts[part]
            )

        parts = []
        with progress(system.name, total=len(prompts)) as advance:
            for part in batches(len(prompts), max(1, self.batch_size // self.number)):
                parts.append(cached_arrays(place / f"{part.start:06d}.npz", partial(measure, part)))
                advance(part.stop - part.start)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        shown = whole.pop("shown")
        return Drawn(system, made, whole, shown)

    def _work_key(self, made: ImageOrigin, sampling: Sampling, prompts: Sequence[str]) -> str:
        """All that finished batches of a system depend on; they are numbered by their first prompt."""
        depends = {
            "weights": made.weights_sha256,
            "sampling": str(sampling),
            "prompts": list(prompts),
            "ids": list(self.ids),
            "references": hashlib.sha256(self.references.tobytes()).hexdigest(),
            "number": self.number,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "distance": self.distance,
            "networks": self.extractors.identity(),
            "towers": self.towers.identity,
        }
        return content_hash(depends)[:16]

    def _sized(self, images: np.ndarray) -> np.ndarray:
        """Pictures [M, …] → [M / number, number, …], of the references' size."""
        size = self.references.shape[1]
        if images.shape[1:3] != (size, size):
            prepare = Preparation(crop=True, size=size, filter="lanczos")
            images = np.stack([prepare(image) for image in images])
        return images.reshape(-1, self.number, *images.shape[1:])

    def _measured(self, images: np.ndarray, part: slice, prompts: Sequence[str]) -> Arrays:
        """The scores [P] of P prompts' pictures uint8 [P, number, H, W, 3]."""
        references, texts = self.references[part], list(prompts)
        among = self._distance(images, texts)
        together = self._distance(np.concatenate([references[:, None], images], axis=1), texts)
        repeated = np.repeat(references, self.number, axis=0)
        alike = self.towers.similarity(images.reshape(repeated.shape), repeated).reshape(len(images), self.number)
        return {
            self.distance: among,
            self.to_reference: mean_to_first(together, among, self.number),
            self.towers.identity["name"]: alike.mean(axis=1),
            "shown": images[:, 0],
        }

    def _distance(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """The mean distance over all pairs of each prompt's pictures, float64 [P]."""
        (scores,) = self.extractors.groups(images, texts).values()
        return scores[:, 0].astype(np.float64)


def mean_to_first(together: np.ndarray, among: np.ndarray, number: int) -> np.ndarray:
    """The mean distance of ``number`` pictures to one more, from the mean over all pairs with it and without it.

    Of the (n + 1) n / 2 pairs n are with it, so that their mean is ((n + 1) D' − (n − 1) D) / 2.
    """
    return ((number + 1) * together - (number - 1) * among) / 2


def as_cell(drawn: Drawn) -> dict[str, Any]:
    """What places a system's record in a table."""
    paper = {"paper": drawn.system.paper} if drawn.system.paper else {}
    return {"kind": "system", "name": drawn.system.name, "steps": len(drawn.made.grid)} | paper
