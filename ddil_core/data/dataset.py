"""Captioned pictures by reference, as streams whose batches depend on their index alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ddil_core.errors import WrongCommand


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation split, with the name that its noise is drawn from."""

    id: str
    text: str


class DataSet(Protocol):
    """Captioned pictures: an endless training stream, and an evaluation split in a fixed order."""

    reference: str

    def batch(self, size: int, index: int) -> tuple[np.ndarray, list[str]]:
        """The ``index``-th training batch: pictures uint8 [B, H, W, 3] and captions."""
        ...

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts of the evaluation split."""
        ...

    def pictures(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """The first ``count`` pictures of the evaluation split, in batches uint8 [B, H, W, 3]."""
        ...


KINDS = {"shapes": "shapes", "coco2014": "coco2014:DIR", "coco2017": "coco2017:DIR", "folder": "folder:DIR"}
"""The kinds of data sets, and how each is written."""


def open_data(reference: str) -> DataSet:
    """A data set by reference.

    Raises:
        WrongCommand: the reference fits nothing; the message names the nearest that would.
    """
    if reference == "shapes":
        from ddil_core.shapes.data import ShapesData

        return ShapesData()
    kind, colon, _ = reference.partition(":")
    if colon and kind in ("coco2014", "coco2017"):
        from ddil_core.data.coco import coco_data

        return coco_data(reference)
    if colon and kind == "folder":
        from ddil_core.data.folder import folder_data

        return folder_data(reference)
    nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    hint = f"; did you mean {KINDS[nearest[0]]!r}?" if nearest else ""
    accepted = ", ".join(map(repr, KINDS.values()))
    raise WrongCommand(f"the data set {reference!r} is not known: it may be one of {accepted}{hint}")


def listing() -> list[dict[str, Any]]:
    """The data sets that there are, for ``ddil data``."""
    return [
        {
            "name": "shapes",
            "description": "captioned pictures of one or two objects, 64 px, drawn on the fly; held-out pairs for evaluation",
            "source": "drawn by the package",
            "here": True,
            "needs": "",
        },
        *(
            {
                "name": f"coco{year}:DIR",
                "description": f"COCO {year} val, {count} pictures with captions, for evaluation",
                "source": "images.cocodataset.org",
                "here": None,
                "needs": f"DIR/val{year}/ and DIR/annotations/captions_val{year}.json",
            }
            for year, count in ((2014, "40,504"), (2017, "5,000"))
        ),
        {
            "name": "folder:DIR",
            "description": "a folder of pictures, with a .txt beside each or an index, for evaluation",
            "source": "your own",
            "here": None,
            "needs": "pictures; for captions .txt files, index.jsonl, metadata.jsonl or metadata.csv",
        },
    ]
