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
    """Captioned pictures: those to train on, and an evaluation split, both in a fixed order."""

    reference: str
    side: int | None
    """The side of its pictures in pixels; None where they are prepared to the side that is asked for."""

    def identity(self) -> str:
        """What the training pictures are, as far as it is known without reading them; other pictures, another identity."""
        ...

    def require(self, count: int, side: int) -> None:
        """Look at the first ``count`` training pictures, as far as that is quick. Raises DdilError where they cannot be used."""
        ...

    def training(
        self, count: int, side: int, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """The first ``count`` training pictures, uint8 [B, side, side, 3] with their captions, from the ``first`` batch on.

        A batch depends on its index and ``batch_size`` alone: never on which batches were asked for before it.
        """
        ...

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts of the evaluation split."""
        ...

    def pictures(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """The first ``count`` pictures of the evaluation split, in batches uint8 [B, H, W, 3]."""
        ...


KINDS = {
    "shapes": "shapes",
    "coco2014": "coco2014:DIR",
    "coco2017": "coco2017:DIR",
    "folder": "folder:DIR",
    "webdataset": "webdataset:PATTERN",
}
"""The kinds of data sets, and how each is written."""


def open_data(reference: str, download: bool = False) -> DataSet:
    """A data set by reference. With ``download``, shards on the web that are read and not here are fetched.

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
    if colon and kind == "webdataset":
        from ddil_core.data.shards import shard_data

        return shard_data(reference, download)
    nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    hint = f"; did you mean {KINDS[nearest[0]]!r}?" if nearest else ""
    accepted = ", ".join(map(repr, KINDS.values()))
    raise WrongCommand(f"the data set {reference!r} is not known: it may be one of {accepted}{hint}")


def listing() -> list[dict[str, Any]]:
    """The data sets that there are, for ``ddil data``."""
    both = "training, evaluation"
    return [
        {
            "name": KINDS["shapes"],
            "use": both,
            "description": "captioned pictures of one or two objects, 64 px, drawn on the fly; held-out pairs for evaluation",
            "source": "drawn by the package",
            "here": True,
            "needs": "",
        },
        *(
            {
                "name": KINDS[f"coco{year}"],
                "use": both,
                "description": f"COCO {year} with captions: train, {train} pictures, to train on; val, {val}, for evaluation",
                "source": "images.cocodataset.org",
                "here": None,
                "needs": f"for training DIR/train{year}/ and DIR/annotations/captions_train{year}.json, for evaluation "
                f"DIR/val{year}/, and for both DIR/annotations/captions_val{year}.json",
            }
            for year, train, val in ((2014, "82,783", "40,504"), (2017, "118,287", "5,000"))
        ),
        {
            "name": KINDS["folder"],
            "use": both,
            "description": "a folder of pictures, with a .txt beside each or an index",
            "source": "your own",
            "here": None,
            "needs": "pictures; for captions .txt files, index.jsonl, metadata.jsonl or metadata.csv",
        },
        {
            "name": KINDS["webdataset"],
            "use": "training",
            "description": "shards: .tar files of pictures with a .txt, or a .json with a 'caption', of the same name",
            "source": "your own, or http(s) with --download",
            "here": None,
            "needs": "a pattern, in quotes, as in --data 'webdataset:/data/train-{000000..000099}.tar' or 'webdataset:/data/*.tar'",
        },
    ]
