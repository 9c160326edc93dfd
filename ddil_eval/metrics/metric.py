"""What a metric is: how pictures become features, and how features become one value with its interval.

``METRICS[name]`` is a row. Several rows share one ``Network`` (FID, KID, precision … all read Inception's features), whose
features are extracted once and held under the network's name. Features become a value by the metric's ``kind``:

==========  =====================================  ============================================================
kind        features                               value
==========  =====================================  ============================================================
``mean``    one score a picture, [n, 1]            the mean over pictures
``set``     [n, d]                                 a statistic of the set and a reference set (Fréchet, KID …)
``alone``   [n, d]                                 a statistic of the set by itself (Vendi)
``group``   one score a prompt, [prompts, 1],      the mean over prompts
            from all pictures of that prompt
==========  =====================================  ============================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ddil_eval.metrics.weights import WeightsFile
from ddil_eval.statistics import Statistic

Array = np.ndarray
Kind = Literal["mean", "set", "alone", "group"]


class Extractor(Protocol):
    """Pictures to features; a picture's features do not depend on the others of its batch.

    The extractor of a ``group`` metric is given all pictures of one prompt (one caption, repeated) and returns [1, 1].
    """

    def __call__(self, images: Array, captions: list[str]) -> Array:
        """``images`` uint8 [B, H, W, 3] in [0, 255] with their B captions → float [B, d]."""
        ...


def nothing_missing() -> str | None:
    """For networks that need no more than the package brings."""
    return None


@dataclass(frozen=True)
class Network:
    """What turns pictures into features. ``lacks`` names what else than ``weights`` is absent, with the cure, or None.

    ``open_on`` loads it onto a device. ``version`` is raised when the same weights come to give other features; with the
    weights' SHA-256 it is what cached reference features are kept under. ``prefixed`` networks read a recipe's prefix
    before each caption ("A photo depicts "); those that ``reads_captions`` cannot see a picture without. ``shapes_alone`` ones
    see the shapes world's pictures alone, unresized.
    """

    name: str
    needs: str
    open_on: Callable[[str], Extractor]
    weights: tuple[WeightsFile, ...] = ()
    lacks: Callable[[], str | None] = nothing_missing
    version: int = 1
    prefixed: bool = False
    reads_captions: bool = False
    shapes_alone: bool = False

    def missing(self) -> str | None:
        """None where all that is needed is here, else one sentence with the cure; opens nothing heavy."""
        return next((problem for weights in self.weights if (problem := weights.missing())), None) or self.lacks()

    def identity(self) -> dict[str, Any]:
        """What its features depend on: name, version, and the SHA-256 of every file of weights."""
        return {"name": self.name, "version": self.version, "weights": {w.file: w.digest() for w in self.weights}}


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    ``statistic`` takes the reference's features [m, d] (None for "alone") and gives values in columns, of which
    ``column`` is this metric's. ``bounds`` are those of the value, which no interval passes; a ``rate`` is a share of pictures
    (of the kind "mean": scores are 0 or 1) or a mean of counts, whose interval is not symmetric near its bounds.
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
        """What it needs, in words."""
        return self.network.needs

    @property
    def weights(self) -> tuple[WeightsFile, ...]:
        """The files of weights that it needs from outside the package."""
        return self.network.weights

    def missing(self) -> str | None:
        """None where all that is needed is here, else one sentence with the cure; opens nothing heavy."""
        return self.network.missing()

    def open(self, device: str) -> Extractor:
        """Load its network onto a device ("cpu" …). Raises DdilError where something is missing or damaged."""
        return self.network.open_on(device)

    def value(self, features: Array, reference: Array | None = None) -> float:
        """Features to the metric's value, without its interval; ``reference`` [m, d] for the kind "set" alone."""
        if self.statistic is None:
            return float(np.mean(features, dtype=np.float64))
        return float(self.statistic(reference).values(features)[self.column])
