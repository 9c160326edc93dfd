"""The classes ``Metric`` and ``Network``: a network turns images into features, a metric turns features into a value.

Several metrics share one ``Network``: FID, KID, precision and others read Inception's features. The features are
extracted once and stored under the network's name. A metric's ``kind`` says how features become a value:

==========  =====================================  ============================================================
kind        features                               value
==========  =====================================  ============================================================
``mean``    one score for each image, [n, 1]       the mean over images
``set``     [n, d]                                 a statistic of the set and a reference set (Fréchet, KID …)
``alone``   [n, d]                                 a statistic of the set alone (Vendi)
``group``   one score for each prompt,             the mean over prompts
            [prompts, 1], from all its images
==========  =====================================  ============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np

from ddil_eval.metrics.weights_file import WeightsFile
from ddil_eval.statistics import Statistic

Array = np.ndarray
Kind = Literal["mean", "set", "alone", "group"]


class Extractor(Protocol):
    """A function from images to features. An image's features do not depend on the other images of the batch.

    The extractor of a ``group`` metric gets all images of one prompt, with the caption repeated, and returns [1, 1].
    """

    def __call__(self, images: Array, captions: list[str]) -> Array:
        """Return float [B, d] for ``images`` uint8 [B, H, W, 3] in [0, 255] and their B captions."""
        ...


def take_any(size: tuple[int, int], captions: Sequence[str]) -> None:
    """Accept images of any size with any captions (see ``Network.require``)."""


def missing_package(module: str, package: str) -> str | None:
    """Return None where ``module`` is installed, else how to install ``package``, in one sentence."""
    if find_spec(module) is None:
        return f"the Python package {package} is not installed; install it with: pip install {package}"
    return None


@dataclass(frozen=True)
class Network:
    """A network that turns images into features.

    Attributes:
        name: The name under which features are stored.
        needs: What the network needs, in words.
        open_on: Loads the network onto a device ("cpu" …). Raises DdilError where a file is missing or damaged.
        weights: Files of weights from outside the package.
        lacks: Returns what else is missing and how to get it, or None. Most often ``missing_package``.
        version: Raise it when the same weights start to give other features. The version and the SHA-256 of the weights
            identify stored reference features.
        prefixed: The network reads the recipe's prefix before each caption ("A photo depicts ").
        reads_captions: The network needs a caption for each image.
        shapes_only: The network takes images of the shapes world only, and not resized.
        require: Takes the size (H, W) of prepared images and their captions. Raises WrongCommand where the network
            cannot take them. It is called before any image is made.
    """

    name: str
    needs: str
    open_on: Callable[[str], Extractor]
    weights: tuple[WeightsFile, ...] = ()
    lacks: Callable[[], str | None] = lambda: None
    version: int = 1
    prefixed: bool = False
    reads_captions: bool = False
    shapes_only: bool = False
    require: Callable[[tuple[int, int], Sequence[str]], None] = take_any

    def missing(self) -> str | None:
        """Return what is missing and how to get it, in one sentence, or None. Load nothing."""
        return next((problem for weights in self.weights if (problem := weights.missing())), None) or self.lacks()

    def identity(self) -> dict[str, Any]:
        """Return what the features depend on: name, version, and the SHA-256 of each file of weights."""
        return {"name": self.name, "version": self.version, "weights": {w.file: w.digest() for w in self.weights}}


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    Attributes:
        name: The name in commands, protocols and records.
        title: What a list of metrics prints.
        direction: Which values are better.
        kind: How features become a value; see the table above.
        network: Where the features come from.
        statistic: Takes the reference features [m, d] (None for the kind "alone") and returns the statistic. None for
            the kinds "mean" and "group".
        column: The metric's column among the values of the statistic.
        bounds: The bounds of the value. No interval of a single system passes them.
        rate: The value is a share of images (kind "mean": scores are 0 or 1) or a mean of counts. Its interval is not
            symmetric near the bounds.
    """

    name: str
    title: str
    direction: Literal["lower", "higher"]
    kind: Kind
    network: Network
    statistic: Callable[[Array | None], Statistic] | None = None
    column: int = 0
    bounds: tuple[float, float] = (-np.inf, np.inf)
    rate: bool = False

    @property
    def needs(self) -> str:
        """What the metric's network needs, in words."""
        return self.network.needs

    @property
    def weights(self) -> tuple[WeightsFile, ...]:
        """The files of weights that the metric's network needs from outside the package."""
        return self.network.weights

    def missing(self) -> str | None:
        """Return what is missing and how to get it, in one sentence, or None. Load nothing."""
        return self.network.missing()
