"""What the networks of metrics see under a recipe: generated and reference pictures prepared, captions with the prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ddil_core.data import DataSet
from ddil_core.errors import WrongCommand
from ddil_core.progress import progress
from ddil_core.protocol import content_hash
from ddil_eval.features import Features
from ddil_eval.measure import Extractors
from ddil_eval.metrics import METRICS
from ddil_eval.recipes import Preparation, Recipe
from ddil_eval.references import kept_reference

BATCH = 64


class RecipeExtractors(Extractors):
    """The networks of the chosen metrics, with pictures prepared as the recipe says; each preparation is done once a batch.

    Raises:
        WrongCommand: a metric that is not known, or that the recipe or one picture for each prompt does not serve.
        DdilError: a metric lacks its weights; said before any picture is made.
    """

    def __init__(self, names: Sequence[str], device: str, recipe: Recipe) -> None:
        grouped = [name for name in names if name in METRICS and METRICS[name].kind == "group"]
        if grouped:
            raise WrongCommand(
                f"the metric {grouped[0]!r} needs several pictures of each prompt, and here each has one"
            )
        if "patch_fid" in names and recipe.patch is None:
            raise WrongCommand(
                f"the metric 'patch_fid' needs a recipe that cuts patches, and {recipe.name!r} cuts none; take 'dmd2-sdxl'"
            )
        of_shapes = [name for name in names if name in METRICS and METRICS[name].network.shapes_alone]
        if of_shapes and recipe.size is not None:
            raise WrongCommand(
                f"the metric {of_shapes[0]!r} reads the shapes world's pictures as they are drawn, and the recipe "
                f"{recipe.name!r} resizes to {recipe.size} px; choose other metrics"
            )
        super().__init__(names, device, prefix=recipe.clip.prefix if recipe.clip else "")
        self.recipe = recipe
        self.metric_of = {METRICS[name].network.name: name for name in reversed(self.metrics)}

    def __call__(self, images: np.ndarray, captions: list[str]) -> Features:
        """Generated pictures as they come, uint8 [B, H, W, 3], with their captions → features [B, d] by network."""
        views = self._views(list(images), self.open, generated=True)
        return {name: self._extract(name, views[name], captions) for name in self.open}

    def reference(self, data: DataSet, count: int, recipe: str = "") -> Features:
        """Features of the first ``count`` reference pictures, for the metrics that compare sets; kept under the recipe's hash."""
        compared = [METRICS[name].network for name in self.metrics if METRICS[name].kind == "set"]

        def extract(networks: Sequence[str]) -> Iterator[Features]:
            with progress("reference pictures", total=count) as advance:
                for images in rebatched(data.pictures(count), BATCH):
                    views = self._views(images, networks, generated=False)
                    yield {name: self.open[name](views[name], [""] * len(images)) for name in networks}
                    advance(len(images))

        key = content_hash(self.recipe.model_dump(mode="json", exclude={"name", "source", "metrics"}))
        return kept_reference(data, count, recipe or key, {network.name: network for network in compared}, extract)

    def _views(
        self, images: Sequence[np.ndarray], networks: Iterable[str], *, generated: bool
    ) -> dict[str, np.ndarray]:
        """Pictures uint8 [H, W, 3] → for each network uint8 [B, h, w, 3]."""
        seen: dict[Preparation, np.ndarray] = {}
        views = {}
        for network in networks:
            preparation = self.recipe.preparation(self.metric_of[network], generated=generated)
            if preparation not in seen:
                seen[preparation] = _stack([preparation(image) for image in images], self.recipe.name)
            views[network] = seen[preparation]
        return views


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


def _stack(images: Sequence[np.ndarray], recipe: str) -> np.ndarray:
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        (a, b), (c, d) = sizes[:2]
        raise WrongCommand(
            f"pictures of {b} × {a} and {d} × {c} px are mixed, and the recipe {recipe!r} does not resize; "
            "take a recipe that does, or pictures of one size"
        )
    return np.stack(images)
