"""The table of data sets: its rows, and how a reference opens one.

Another package adds a data set by an entry point of the group ``ddil.datasets``; its value is a ``DataSetKind``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ddil_core.data.base import DataSet
from ddil_core.support.errors import WrongCommand
from ddil_core.support.registry import Registry


@dataclass(frozen=True)
class DataSetKind:
    """A row of the table: one kind of data set.

    Attributes:
        name: The reference up to its colon.
        form: How the reference is written: the name alone, or the name, a colon and a word for what follows.
        use: What the data set serves: "training", "evaluation" or both, with a comma between them.
        description: What the data set holds, for ``ddil data``.
        source: Where its images come from.
        needs: What the user must provide; empty where the package brings everything.
        open: Opens a reference. The second argument allows downloads. The function reads as little as it can.
    """

    name: str
    form: str
    use: str
    description: str
    source: str
    needs: str
    open: Callable[[str, bool], DataSet]

    def fits(self, reference: str) -> bool:
        """Whether a reference with this kind's name has a colon exactly where the form has one."""
        return (":" in reference) == (":" in self.form)


def _open_shapes(reference: str, download: bool) -> DataSet:
    from ddil_core.data.shapes import ShapesData

    return ShapesData()


def _open_gaussians(reference: str, download: bool) -> DataSet:
    from ddil_core.data.gaussians import GaussiansData

    return GaussiansData()


def _open_coco(reference: str, download: bool) -> DataSet:
    from ddil_core.data.coco import open_coco

    return open_coco(reference)


def _open_folder(reference: str, download: bool) -> DataSet:
    from ddil_core.data.folder import open_folder

    return open_folder(reference)


def _open_shards(reference: str, download: bool) -> DataSet:
    from ddil_core.data.shards import open_shards

    return open_shards(reference, download)


def _coco(year: int, train: str, validation: str) -> DataSetKind:
    return DataSetKind(
        name=f"coco{year}",
        form=f"coco{year}:DIR",
        use="training, evaluation",
        description=f"COCO {year} with captions: train ({train} images) to train on, val ({validation}) for evaluation",
        source="images.cocodataset.org",
        needs=f"for training DIR/train{year}/ and DIR/annotations/captions_train{year}.json, for evaluation "
        f"DIR/val{year}/, and for both DIR/annotations/captions_val{year}.json",
        open=_open_coco,
    )


DATASETS = Registry(
    "data set",
    "ddil.datasets",
    DataSetKind,
    [
        DataSetKind(
            name="shapes",
            form="shapes",
            use="training, evaluation",
            description="captioned images of one or two objects, 64 px, drawn on the fly; evaluation on held-out pairs",
            source="drawn by the package",
            needs="",
            open=_open_shapes,
        ),
        DataSetKind(
            name="gaussians",
            form="gaussians",
            use="training, evaluation",
            description="points of a mixture of Gaussians with their classes, drawn when they are read",
            source="drawn by the package",
            needs="",
            open=_open_gaussians,
        ),
        _coco(2014, "82,783", "40,504"),
        _coco(2017, "118,287", "5,000"),
        DataSetKind(
            name="folder",
            form="folder:DIR",
            use="training, evaluation",
            description="a folder of images, with a .txt beside each or an index",
            source="your own",
            needs="images; for captions .txt files, index.jsonl, metadata.jsonl or metadata.csv",
            open=_open_folder,
        ),
        DataSetKind(
            name="webdataset",
            form="webdataset:PATTERN",
            use="training",
            description="shards: .tar files of images with a .txt, or a .json with a 'caption', of the same name",
            source="your own, or http(s) with --download",
            needs="a pattern, in quotes, as in --data 'webdataset:/data/train-{000000..000099}.tar' or "
            "'webdataset:/data/*.tar'",
            open=_open_shards,
        ),
    ],
)


def open_data(reference: str, download: bool = False) -> DataSet:
    """Open a data set by its reference. With ``download``, missing shards on the web may be fetched when they are read.

    Raises:
        WrongCommand: no data set has such a reference; the message names the nearest form.
        DdilError: the data set is damaged, or the table holds a broken row of another package.
    """
    name = reference.partition(":")[0]
    if name in DATASETS and DATASETS[name].fits(reference):
        return DATASETS[name].open(reference, download)
    nearest = difflib.get_close_matches(name, list(DATASETS), n=1, cutoff=0.5)
    hint = f"; did you mean {DATASETS[nearest[0]].form!r}?" if nearest else ""
    accepted = ", ".join(repr(kind.form) for kind in DATASETS.values())
    raise WrongCommand(f"the data set {reference!r} is not known: it may be one of {accepted}{hint}")


def list_datasets() -> list[dict[str, str | bool | None]]:
    """Return the data sets for ``ddil data``, by their forms. ``here`` is None where it depends on the user's files."""
    return [
        {
            "name": kind.form,
            "use": kind.use,
            "description": kind.description,
            "source": kind.source,
            "here": None if kind.needs else True,
            "needs": kind.needs,
        }
        for kind in DATASETS.values()
    ]
