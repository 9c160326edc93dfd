"""The images that systems draw from inverted prompts, measured against the images that were inverted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddil_core.data.captioned import prepare_image
from ddil_core.diffusion.noise import Sample
from ddil_core.inversion.towers import Towers
from ddil_core.models.generate import sample_images
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import Sampling
from ddil_core.support.compute import FP32, Compute
from ddil_core.support.environment import full_precision
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_core.support.size import OWN_SIZE, WantedSize
from ddil_eval.experiments.image_sources import ImageOrigin
from ddil_eval.experiments.results import code_sha256
from ddil_eval.experiments.system_configs import SystemConfig, image_origin, sampling_of
from ddil_eval.features.extraction import Extractors
from ddil_eval.features.storage import Arrays, cached_arrays
from ddil_eval.statistics.moments import blocks


@dataclass(frozen=True)
class Drawn:
    """What a system drew from N prompts.

    Attributes:
        system: The system.
        origin: How its images were made.
        scores: Scores [N] by metric.
        shown: The first image of each prompt, uint8 [N, H, W, 3].
    """

    system: SystemConfig
    origin: ImageOrigin
    scores: Arrays
    shown: np.ndarray

    @property
    def cell(self) -> dict[str, Any]:
        """What places the system's record in a table."""
        paper = {"paper": self.system.paper} if self.system.paper else {}
        return {"kind": "system", "name": self.system.name, "steps": len(self.origin.grid)} | paper


@dataclass(frozen=True)
class Gallery:
    """Draws images of each prompt, from noise that all systems share, and measures them.

    Attributes:
        ids: The N names of the inverted images.
        references: The inverted images, uint8 [N, H, W, 3]. Drawn images are resized to their size.
        distance: The name of the metric between images.
        extractors: The network of that metric.
        towers: The CLIP that compares images with the inverted ones; None for no such comparison.
        number: The number of images of each prompt.
        batch_size: The number of images that are drawn at a time.
        seed: The seed of the noise.
        work: The folder of finished batches.
        places: The folders below it that were used.
        device: The device of this process.
        compute: How models compute that have no settings of their own.
        size: The height and width of their images.
    """

    ids: tuple[str, ...]
    references: np.ndarray
    distance: str
    extractors: Extractors
    towers: Towers | None
    number: int
    batch_size: int
    seed: int
    work: Path
    device: str
    compute: Compute = FP32
    size: WantedSize = field(default_factory=OWN_SIZE.copy)
    places: list[Path] = field(default_factory=list)

    @property
    def to_reference(self) -> str:
        """The name of the metric between drawn and inverted images."""
        return self.distance.removesuffix("_diversity") + "_to_reference"

    @property
    def likeness(self) -> str | None:
        """The name of CLIP's cosine between drawn and inverted images; None where there is no CLIP."""
        return None if self.towers is None else str(self.towers.identity["name"])

    @property
    def directions(self) -> dict[str, str]:
        """The metrics by name, each with the direction that is better."""
        likeness = {} if self.likeness is None else {self.likeness: "higher"}
        return {self.distance: "higher", self.to_reference: "lower"} | likeness

    def draw(self, system: SystemConfig, prompts: Sequence[str], model: Model | None = None) -> Drawn:
        """Draw a system's images of all prompts, and measure them.

        Args:
            system: The system, which says how its model is sampled.
            prompts: The N prompts.
            model: The system's model, where it is loaded already.
        """
        compute, size = system.compute(self.compute), system.size(self.size)
        model = model or load_model(system.model, self.device, compute=compute, **size)
        sampling = sampling_of(system, model, prompts)
        origin = image_origin(model, sampling, self.seed)
        place = self.work / self._work_key(origin, sampling, prompts)
        self.places.append(place)
        rows = min(max(1, self.batch_size // self.number), len(prompts)) * self.number

        def measure(part: slice) -> Arrays:
            texts = [text for text in prompts[part] for _ in range(self.number)]
            samples = [Sample(name, number) for name in self.ids[part] for number in range(self.number)]
            images = sample_images(model, samples, texts, sampling, self.seed, rows)
            with full_precision():
                return self._measured(self._sized(images), part, prompts[part])

        parts = []
        with progress(system.name, total=len(prompts)) as advance:
            for part in blocks(len(prompts), max(1, self.batch_size // self.number)):
                parts.append(cached_arrays(place / f"{part.start:06d}.npz", partial(measure, part)))
                advance(part.stop - part.start)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        shown = whole.pop("shown")
        return Drawn(system, origin, whole, shown)

    def _work_key(self, origin: ImageOrigin, sampling: Sampling, prompts: Sequence[str]) -> str:
        """Hash all that a system's finished batches depend on, apart from their first prompt."""
        depends = {
            "weights": origin.weights_sha256,
            "sampling": str(sampling),
            "prompts": list(prompts),
            "ids": list(self.ids),
            "references": hashlib.sha256(self.references.tobytes()).hexdigest(),
            "number": self.number,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "distance": self.distance,
            "networks": self.extractors.identity(),
            "code": code_sha256(),
            "towers": None if self.towers is None else self.towers.identity,
        } | (origin.compute.changed() if origin.compute else {})
        depends |= {} if origin.size is None else {"size": list(origin.size)}
        return content_hash(depends)[:16]

    def _sized(self, images: np.ndarray) -> np.ndarray:
        """Resize images [M, …] to the size of the references, and group them: [M / number, number, …]."""
        height, width = self.references.shape[1:3]
        if images.shape[1:3] != (height, width):
            images = np.stack([prepare_image(image, (height, width)) for image in images])
        return images.reshape(-1, self.number, *images.shape[1:])

    def _measured(self, images: np.ndarray, part: slice, prompts: Sequence[str]) -> Arrays:
        """Return the scores [P] of the images uint8 [P, number, H, W, 3] of P prompts."""
        references, texts = self.references[part], list(prompts)
        among = self._distance(images, texts)
        together = self._distance(np.concatenate([references[:, None], images], axis=1), texts)
        scores = {self.distance: among, self.to_reference: mean_to_first(together, among, self.number)}
        if self.towers is not None and self.likeness is not None:
            repeated = np.repeat(references, self.number, axis=0)
            alike = self.towers.similarity(images.reshape(repeated.shape), repeated)
            scores[self.likeness] = alike.reshape(len(images), self.number).mean(axis=1)
        return scores | {"shown": images[:, 0]}

    def _distance(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """Return the mean distance over all pairs of images of each prompt, float64 [P]."""
        (scores,) = self.extractors.groups(images, texts).values()
        return scores[:, 0].astype(np.float64)


def mean_to_first(together: np.ndarray, among: np.ndarray, number: int) -> np.ndarray:
    """Return the mean distance of n images to one more image.

    n of the (n + 1) n / 2 pairs hold the additional image, so the mean is ((n + 1) D' − (n − 1) D) / 2.

    Args:
        together: D' [P], the mean over all pairs of the n + 1 images.
        among: D [P], the mean over all pairs of the n images.
        number: n.
    """
    return ((number + 1) * together - (number - 1) * among) / 2
