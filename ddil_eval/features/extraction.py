"""What the networks of metrics see under a recipe: generated and reference pictures prepared, captions with the prefix."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ddil_core.data.base import DataSet
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_eval.features.recipes import Preparation, Recipe
from ddil_eval.features.reference_features import cached_reference_features
from ddil_eval.features.storage import Features
from ddil_eval.metrics import METRICS, Extractor, Network

BATCH = 64
DECLARED = {
    "inception": {"fid_input": "clean-fid"},
    "inception_patch": {"fid_input": "clean-fid"},
    "inception_pytorch": {"fid_input": "pytorch-fid"},
    "clip_vitg14_s12b": {"clip": "ViT-g-14 laion2b_s12b_b42k"},
    "clip_vitg14_s34b": {"clip": "ViT-g-14 laion2b_s34b_b88k"},
}
"""By network, what a recipe that declares the key must declare for a metric to be its own."""


class Extractors:
    """The networks of the chosen metrics, each opened once; features are held under the network's name.

    ``prefix`` is what a recipe puts before captions ("A photo depicts "), for the networks that read it.

    Raises:
        WrongCommand: a metric that is not known.
        DdilError: a metric lacks its weights; said before any picture is made.
    """

    def __init__(self, names: Sequence[str], device: str, *, prefix: str = "") -> None:
        self.metrics = tuple(dict.fromkeys(names))
        rows = [METRICS.find(name) for name in self.metrics]
        absent = [f"{row.name}: {problem}" for row in rows if (problem := row.missing())]
        if absent:
            raise DdilError(absent[0])
        self.prefix = prefix
        self.networks: dict[str, Network] = {row.network.name: row.network for row in rows}
        self.open: dict[str, Extractor] = {name: network.open_on(device) for name, network in self.networks.items()}
        self._of = {
            kind: {r.network.name for r in rows if r.kind == kind} for kind in ("mean", "set", "alone", "group")
        }

    def identity(self) -> list[dict[str, Any]]:
        """What features depend on of the networks, in the order of their names."""
        return [self.networks[name].identity() for name in sorted(self.networks)]

    def __call__(self, images: np.ndarray, captions: list[str]) -> Features:
        """Pictures uint8 [B, H, W, 3] with their captions → features [B, d] by network; not those of "group" metrics."""
        return {name: self._extract(name, images, captions) for name in self.open if name not in self._of["group"]}

    def groups(self, images: np.ndarray, captions: list[str]) -> Features:
        """All pictures of each prompt, uint8 [P, n, H, W, 3], with the P captions → features [P, 1] of "group" metrics."""
        return {
            name: np.concatenate(
                [self._extract(name, own, [caption] * len(own)) for own, caption in zip(images, captions, strict=True)]
            )
            for name in self.open
            if name in self._of["group"]
        }

    def reference(self, data: DataSet, count: int, recipe: str = "") -> Features:
        """Features of the first ``count`` pictures of the evaluation split, for the metrics that compare sets.

        Those of networks with weights are kept in the user's folder under the hash of the pictures' content, ``recipe``
        (how they are prepared) and the network.
        """
        wanted = {name: self.networks[name] for name in self.open if name in self._of["set"]}

        def extract(networks: Sequence[str]) -> Iterator[Features]:
            with progress("reference pictures", total=count) as advance:
                for images in data.images(count):
                    yield {name: self._extract(name, images, [""] * len(images)) for name in networks}
                    advance(len(images))

        return cached_reference_features(data, count, recipe, wanted, extract)

    def _extract(self, name: str, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """The one place where a network is asked.

        Raises:
            DdilError: it gives features that are not finite.
        """
        prefix = self.prefix if self.networks[name].prefixed else ""
        found = self.open[name](images, [prefix + caption for caption in captions] if prefix else captions)
        if not np.isfinite(found).all():
            metrics = ", ".join(metric for metric in self.metrics if METRICS[metric].network.name == name)
            raise DdilError(
                f"the network {name!r} of the metric {metrics} gives features that are not finite (NaN or infinity, "
                f"{found.dtype}): its weights are damaged; get them again (see 'ddil metrics')"
            )
        return found


class RecipeExtractors(Extractors):
    """The networks of the chosen metrics, with pictures prepared as the recipe says; each preparation is done once a batch.

    Each prompt has ``number`` pictures.

    Raises:
        WrongCommand: a metric that is not known, or that the recipe or the number of pictures of each prompt does not serve.
        DdilError: a metric lacks its weights; said before any picture is made.
    """

    def __init__(self, names: Sequence[str], device: str, recipe: Recipe, number: int = 1) -> None:
        require_several(names, number)
        if "patch_fid" in names and recipe.patch is None:
            raise WrongCommand(
                f"the metric 'patch_fid' needs a recipe that cuts patches, and {recipe.name!r} cuts none; take 'dmd2-sdxl'"
            )
        of_shapes = [name for name in names if name in METRICS and METRICS[name].network.shapes_only]
        if of_shapes and recipe.size is not None:
            raise WrongCommand(
                f"the metric {of_shapes[0]!r} reads the shapes world's pictures as they are drawn, and the recipe "
                f"{recipe.name!r} resizes to {recipe.size} px; choose other metrics"
            )
        _refuse_other_networks(names, recipe)
        super().__init__(names, device, prefix=recipe.clip.prefix if recipe.clip else "")
        self.recipe, self.number = recipe, number
        self.metric_of = {METRICS[name].network.name: name for name in reversed(self.metrics)}

    def __call__(self, images: np.ndarray, captions: list[str]) -> Features:
        """Generated pictures as they come, uint8 [P · number, H, W, 3], with their captions → features [P, d] by network.

        Networks of "group" metrics see all pictures of a prompt, the others its first one.
        """
        grouped = sorted(self._of["group"])
        single = [name for name in self.open if name not in grouped]
        texts = captions[:: self.number]
        views = self._views(list(images[:: self.number]), single, generated=True)
        found = {name: self._features(name, views[name], texts) for name in single}
        for name, view in self._views(list(images), grouped, generated=True).items():
            prompts = np.concatenate(view).reshape(len(texts), self.number, *view[0].shape[1:])
            scores = [self._extract(name, own, [text] * self.number) for own, text in zip(prompts, texts, strict=True)]
            found[name] = np.concatenate(scores)
        return found

    def reference(self, data: DataSet, count: int, recipe: str = "") -> Features:
        """Features of the first ``count`` reference pictures, for the metrics that compare sets; kept under the recipe's hash."""
        compared = [METRICS[name].network for name in self.metrics if METRICS[name].kind == "set"]

        def extract(networks: Sequence[str]) -> Iterator[Features]:
            with progress("reference pictures", total=count) as advance:
                for images in rebatched(data.images(count), BATCH):
                    views = self._views(images, networks, generated=False)
                    yield {name: self._features(name, views[name], [""] * len(images)) for name in networks}
                    advance(len(images))

        key = content_hash(self.recipe.model_dump(mode="json", exclude={"name", "source", "metrics"}))
        return cached_reference_features(
            data, count, recipe or key, {network.name: network for network in compared}, extract
        )

    def _features(self, name: str, views: Sequence[np.ndarray], captions: list[str]) -> np.ndarray:
        """What a network makes of batches, which follow one another as the captions do: [B, d]."""
        starts = itertools.accumulate((len(view) for view in views), initial=0)
        parts = [
            self._extract(name, view, captions[start : start + len(view)])
            for view, start in zip(views, starts, strict=False)
        ]
        return np.concatenate(parts)

    def _views(
        self, images: Sequence[np.ndarray], networks: Iterable[str], *, generated: bool
    ) -> dict[str, list[np.ndarray]]:
        """Pictures uint8 [H, W, 3] → for each network its batches uint8 [B, h, w, 3]."""
        seen: dict[Preparation, list[np.ndarray]] = {}
        views = {}
        for network in networks:
            preparation = self.recipe.preparation(self.metric_of[network], generated=generated)
            if preparation not in seen:
                seen[preparation] = _stacked([preparation(image) for image in images], preparation, self.recipe.name)
            views[network] = seen[preparation]
        return views


def require_several(names: Sequence[str], number: int) -> None:
    """Raises WrongCommand: a metric compares the pictures of a prompt, and each has ``number`` = 1."""
    grouped = [name for name in names if name in METRICS and METRICS[name].kind == "group"]
    if grouped and number < 2:
        raise WrongCommand(
            f"the metric {grouped[0]!r} needs several pictures of each prompt, and here each has one; 'ddil eval coco', 'run' and "
            "'score' take more with --set pictures_per_prompt=10"
        )


def _refuse_other_networks(names: Sequence[str], recipe: Recipe) -> None:
    """Refuse metrics whose network is another than the one that a recipe declares; what it leaves null, it does not use."""
    declared = {"fid_input": recipe.fid_input, "clip": recipe.clip and f"{recipe.clip.model} {recipe.clip.weights}"}
    for name in (name for name in names if name in METRICS):
        for key, value in DECLARED.get(METRICS[name].network.name, {}).items():
            if declared[key] not in (None, value):
                raise WrongCommand(
                    f"the metric {name!r} takes {value}, and the recipe {recipe.name!r} declares {declared[key]} as its {key}; "
                    "choose the metric that fits, or another recipe"
                )


def rebatched(batches: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Lists of ``size`` pictures uint8 [H, W, 3], at the end fewer, from batches of any size."""
    held: list[np.ndarray] = []
    for batch in batches:
        held += list(batch)
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def _stacked(images: Sequence[np.ndarray], preparation: Preparation, recipe: str) -> list[np.ndarray]:
    """One batch of all pictures. Patches of pictures that are smaller than a patch differ in size: each is a batch then."""
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1 and preparation.patch is not None:
        return [image[None] for image in images]
    if len(sizes) > 1:
        (a, b), (c, d) = sizes[:2]
        raise WrongCommand(
            f"pictures of {b} × {a} and {d} × {c} px are mixed, and the recipe {recipe!r} does not resize; "
            "take a recipe that does, or pictures of one size"
        )
    return [np.stack(images)]
