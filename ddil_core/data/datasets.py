"""The table of data sets: which kinds there are, and how a reference opens one."""

from __future__ import annotations

import difflib
from typing import Any

from ddil_core.data.base import DataSet
from ddil_core.support.errors import WrongCommand

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
        from ddil_core.data.shapes import ShapesData

        return ShapesData()
    kind, colon, _ = reference.partition(":")
    if colon and kind in ("coco2014", "coco2017"):
        from ddil_core.data.coco import open_coco

        return open_coco(reference)
    if colon and kind == "folder":
        from ddil_core.data.folder import open_folder

        return open_folder(reference)
    if colon and kind == "webdataset":
        from ddil_core.data.shards import open_shards

        return open_shards(reference, download)
    nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    hint = f"; did you mean {KINDS[nearest[0]]!r}?" if nearest else ""
    accepted = ", ".join(map(repr, KINDS.values()))
    raise WrongCommand(f"the data set {reference!r} is not known: it may be one of {accepted}{hint}")


def list_datasets() -> list[dict[str, Any]]:
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
