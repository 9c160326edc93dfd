"""From images to features: prepare images as the recipe says, and run the networks of the chosen metrics on them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ddil_core.data.base import DataSet
from ddil_core.support.devices import wait_for
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.fitting import Fitting
from ddil_core.support.progress import progress
from ddil_core.support.protocol import content_hash
from ddil_core.support.side_by_side import side_by_side
from ddil_eval.features.recipes import Preparation, Recipe
from ddil_eval.features.reference_features import cached_reference_features
from ddil_eval.features.storage import Features
from ddil_eval.metrics import METRICS, Extractor, Network

BATCH = 64
"""Reference images that a network gets at once."""
REQUIRED_SETTINGS = {
    "inception": {"fid_input": "clean-fid"},
    "inception_patch": {"fid_input": "clean-fid"},
    "inception_pytorch": {"fid_input": "pytorch-fid"},
    "clip_vitg14_s12b": {"clip": "ViT-g-14 laion2b_s12b_b42k"},
    "clip_vitg14_s34b": {"clip": "ViT-g-14 laion2b_s34b_b88k"},
}
"""For each network: the recipe settings that it requires. A setting that a recipe leaves null fits every network."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Extractors:
    """The networks of the chosen metrics, each loaded once. Features are stored under the network's name.

    Attributes:
        metrics: The names of the chosen metrics, each once.
        networks: The networks by name.

    Args:
        names: Names of metrics.
        device: Where the networks run ("cpu" …).
        recipe: How images are prepared. Without a recipe, the networks get the images unchanged.
        images_per_prompt: How many images of each prompt follow one another.

    Raises:
        WrongCommand: a metric is not known, or does not fit the recipe or the number of images of each prompt.
        DdilError: a metric needs a file or a package that is missing. No image is made before this check.
    """

    def __init__(
        self, names: Sequence[str], device: str, recipe: Recipe | None = None, images_per_prompt: int = 1
    ) -> None:
        self.metrics = tuple(dict.fromkeys(names))
        rows = [METRICS.find(name) for name in self.metrics]
        if recipe is not None:
            require_several(self.metrics, images_per_prompt)
            require_fitting(self.metrics, recipe)
        missing = [f"{row.name}: {problem}" for row in rows if (problem := row.missing())]
        if missing:
            raise DdilError(missing[0])
        self.networks: dict[str, Network] = {row.network.name: row.network for row in rows}
        self._recipe, self._images_per_prompt = recipe, images_per_prompt
        self._loaded: dict[str, Extractor] = {name: net.open_on(device) for name, net in self.networks.items()}
        wait_for(device)  # a thread may use them beside other work of the device
        self._fitting = {name: Fitting(f"the network {name!r}") for name in self.networks}
        self._first_metric = {row.network.name: row.name for row in reversed(rows)}
        self._group = sorted({row.network.name for row in rows if row.kind == "group"})
        self._scores = {row.network.name for row in rows if row.kind in ("mean", "group")}
        self._set = list(dict.fromkeys(row.network.name for row in rows if row.kind == "set"))

    def identity(self) -> list[dict[str, Any]]:
        """Return what the features depend on, for each network in the order of names."""
        return [self.networks[name].identity() for name in sorted(self.networks)]

    def __call__(self, images: np.ndarray | Sequence[np.ndarray], captions: list[str]) -> Features:
        """Return the features [P, d] of P prompts, by network.

        ``images`` are generated images as they come, uint8 [P · n, H, W, 3], each with its caption; the n images of a
        prompt follow one another. A list may hold images of different sizes where the recipe gives them one size.
        Networks of "group" metrics get all images of a prompt, other networks the first image.
        """
        n = self._images_per_prompt
        texts = captions[::n]
        single = [name for name in self.networks if name not in self._group]
        batches = self._prepared(list(images[::n]), single, generated=True)
        features = {name: self._extract_all(name, batches[name], texts) for name in single}
        for name, prepared in self._prepared(list(images), self._group, generated=True).items():
            by_prompt = np.concatenate(prepared)
            features[name] = self._extract_groups(name, by_prompt.reshape(len(texts), n, *by_prompt.shape[1:]), texts)
        return features

    def groups(self, images: np.ndarray, captions: list[str]) -> Features:
        """Return the features [P, 1] of "group" metrics for unprepared images uint8 [P, n, H, W, 3] and P captions."""
        return {name: self._extract_groups(name, images, captions) for name in self._group}

    def reference(self, data: DataSet, count: int) -> Features:
        """Return features of the first ``count`` images of the evaluation split, for the metrics of the kind "set".

        Features of networks with weights are stored in the user's folder, under the hash of the images' content, the
        recipe and the network.
        """

        def extract(networks: Sequence[str]) -> Iterator[Features]:
            with progress("reference images", total=count) as advance:
                for images in rebatched(data.images(count), BATCH):
                    batches = self._prepared(images, networks, generated=False)
                    yield {name: self._extract_all(name, batches[name], [""] * len(images)) for name in networks}
                    advance(len(images))

        key = ""
        if self._recipe is not None:
            key = content_hash(self._recipe.model_dump(mode="json", exclude={"name", "source", "metrics"}))
        return cached_reference_features(data, count, key, {name: self.networks[name] for name in self._set}, extract)

    def _extract(self, name: str, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """Run one network on one batch: [B, d].

        Raises:
            DdilError: the features are not finite, or not one row of real numbers for each image or group.
        """
        network = self.networks[name]
        clip = self._recipe.clip if self._recipe is not None else None
        if network.prefixed and clip is not None and clip.prefix:
            captions = [clip.prefix + caption for caption in captions]
        features: Any = self._run(name, images, captions)
        if not isinstance(features, np.ndarray):
            raise DdilError(
                f"the network {name!r} gives a {type(features).__name__} for images; it must give an array of numpy"
            )
        rows = 1 if name in self._group else len(images)
        wide = name in self._scores and features.shape[1:] != (1,)
        if features.ndim != 2 or len(features) != rows or wide or features.dtype.kind not in "biuf":
            raise DdilError(
                f"the network {name!r} gives {features.dtype} {list(features.shape)} for {len(images)} images; it must "
                f"give real numbers of the shape [{rows}, {1 if name in self._scores else 'd'}]"
            )
        if not np.isfinite(features).all():
            metrics = ", ".join(metric for metric in self.metrics if METRICS[metric].network.name == name)
            raise DdilError(
                f"the network {name!r} of the metric {metrics} gives features that are not finite (NaN or infinity, "
                f"{features.dtype}): its weights are damaged; get them again (see 'ddil metrics')"
            )
        return features

    def _run(self, name: str, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """Run a network on a batch, or on fewer images at once where memory is too small, unless it compares them."""
        network = self._loaded[name]
        if name in self._group:
            return network(images, captions)
        parts = self._fitting[name].parts(lambda rows: network(images[rows], captions[rows]), len(images))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _extract_all(self, name: str, batches: Sequence[np.ndarray], captions: list[str]) -> np.ndarray:
        """Run a network on batches that follow one another as the captions do: [B, d]."""
        starts = itertools.accumulate((len(batch) for batch in batches), initial=0)
        parts = [
            self._extract(name, batch, captions[start : start + len(batch)])
            for batch, start in zip(batches, starts, strict=False)
        ]
        return np.concatenate(parts)

    def _extract_groups(self, name: str, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """Run a network on the images of each prompt, uint8 [P, n, H, W, 3]: [P, 1]."""
        return np.concatenate(
            [self._extract(name, group, [text] * len(group)) for group, text in zip(images, captions, strict=True)]
        )

    def _prepared(
        self, images: Sequence[np.ndarray], networks: Iterable[str], *, generated: bool
    ) -> dict[str, list[np.ndarray]]:
        """Prepare images uint8 [H, W, 3] for each network: batches uint8 [B, h, w, 3]. Do each preparation once."""
        done: dict[Preparation, list[np.ndarray]] = {}
        batches = {}
        for network in networks:
            preparation = Preparation()
            if self._recipe is not None:
                preparation = self._recipe.preparation(self._first_metric[network], generated=generated)
            if preparation not in done:
                done[preparation] = self._stacked(side_by_side(preparation, images), preparation)
            batches[network] = done[preparation]
        return batches

    def _stacked(self, images: Sequence[np.ndarray], preparation: Preparation) -> list[np.ndarray]:
        """Return all images as one batch. Patches of different sizes (of small images) become a batch each."""
        sizes = sorted({image.shape[:2] for image in images})
        if len(sizes) > 1 and preparation.patch is not None:
            return [image[None] for image in images]
        if len(sizes) > 1:
            (height, width), (other_height, other_width) = sizes[:2]
            recipe = "no recipe" if self._recipe is None else f"the recipe {self._recipe.name!r}"
            raise WrongCommand(
                f"there are images of {width} × {height} px and of {other_width} × {other_height} px, and {recipe} "
                "does not resize; name a recipe that resizes, or give images of one size"
            )
        return [np.stack(images)]


def require_several(names: Sequence[str], images_per_prompt: int) -> None:
    """Refuse a metric that compares the images of a prompt where each prompt has one image. Raises WrongCommand."""
    group = [name for name in names if METRICS[name].kind == "group"]
    if group and images_per_prompt < 2:
        raise WrongCommand(
            f"the metric {group[0]!r} needs several images of each prompt, and each prompt has one; with 'ddil eval "
            "systems', 'run' and 'score', add --set images_per_prompt=10"
        )


def require_fitting(names: Sequence[str], recipe: Recipe) -> None:
    """Refuse a metric that the recipe does not serve. Raises WrongCommand."""
    if "patch_fid" in names and recipe.patch is None:
        raise WrongCommand(
            f"the metric 'patch_fid' needs a recipe that cuts patches, and the recipe {recipe.name!r} cuts none; "
            "use the recipe 'dmd2-sdxl'"
        )
    settings = {"fid_input": recipe.fid_input, "clip": recipe.clip and f"{recipe.clip.model} {recipe.clip.weights}"}
    for name in names:
        network = METRICS.find(name).network
        if network.shapes_only and recipe.size is not None:
            raise WrongCommand(
                f"the metric {name!r} reads images of the shapes world at their own size, and the recipe "
                f"{recipe.name!r} resizes to {recipe.size} px; choose other metrics"
            )
        for key, value in REQUIRED_SETTINGS.get(network.name, {}).items():
            if settings[key] not in (None, value):
                raise WrongCommand(
                    f"the metric {name!r} needs {key}: {value}, and the recipe {recipe.name!r} has {settings[key]}; "
                    "choose the metric that fits, or another recipe"
                )


def rebatched(batches: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yield lists of ``size`` images uint8 [H, W, 3], the last list shorter, from batches of any size."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting += list(batch)
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def map_ahead(items: Iterable[Item], work: Callable[[Item], Result], ahead: int = 2) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in order. A second thread works while this thread makes the next item.

    For extraction beside sampling: ``items`` samples images, ``work`` prepares and extracts. At most ``ahead`` items
    wait. The results are the same as with one thread. An error in either thread is raised here, and no new item starts.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="features") as worker:
        try:
            for item in items:
                waiting.append(worker.submit(work, item))
                del item
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
