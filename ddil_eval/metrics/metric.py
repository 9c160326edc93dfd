"""What a metric is: how pictures become features, and how features become one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


class Extractor(Protocol):
    """Pictures to features; a picture's features do not depend on the others of its batch."""

    def __call__(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """``images`` uint8 [B, H, W, 3] in [0, 255] with their B captions → float [B, d]."""
        ...


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    ``kind`` says how features become a value: "mean" averages per-picture scores [n, 1]; "set" takes the Fréchet
    distance of features [n, d] to those of a reference set. ``missing`` gives None where all that is needed is here,
    else one sentence with the cure; it opens nothing heavy. ``open`` loads what is needed onto a device ("cpu" …).
    """

    name: str
    title: str
    direction: Literal["lower", "higher"]
    kind: Literal["mean", "set"]
    needs: str
    missing: Callable[[], str | None]
    open: Callable[[str], Extractor]
