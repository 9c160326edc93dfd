"""COCO's captioned pictures in its own folders and annotation files: ``coco2014:DIR`` and ``coco2017:DIR``.

DIR holds ``val2014/`` or ``val2017/`` and ``annotations/captions_val20XX.json``, as COCO's archives unpack. Pictures and
prompts are in the order of the annotation file's list of images; a picture's prompt is the first of its captions in the
order of the list of annotations.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ddil_core.data.folder import Picture, PictureFiles, clean_caption, named
from ddil_core.errors import WrongCommand

FETCH = "fetch {zip} from images.cocodataset.org and unpack it there"


class Coco(PictureFiles):
    """The validation pictures of one year, with the annotation file that their captions are from."""

    def __init__(self, reference: str, files: list[Picture], split: str, annotations: Path) -> None:
        super().__init__(reference, files)
        self.split = split
        self.annotations = annotations


def coco_data(reference: str) -> Coco:
    """A COCO data set by reference, ``coco2014:DIR`` or ``coco2017:DIR``.

    Raises:
        WrongCommand: no such folder, no annotation file, or one that is damaged; the message says what to fetch.
    """
    kind, _, place = reference.partition(":")
    year = kind.removeprefix("coco")
    folder, split = Path(place).expanduser(), f"val{year}"
    if not folder.is_dir():
        raise WrongCommand(
            f"the data set {reference!r} names no folder: there is no {folder}; make it, and "
            f"{FETCH.format(zip=f'zips/{split}.zip and annotations/annotations_trainval{year}.zip')}"
        )
    name = f"captions_{split}.json"
    annotations = next((path for path in (folder / "annotations" / name, folder / name) if path.is_file()), None)
    if annotations is None:
        raise WrongCommand(
            f"the data set {reference!r} has no annotations/{name}; "
            f"{FETCH.format(zip=f'annotations/annotations_trainval{year}.zip')}"
        )
    captions = read_annotations(annotations)
    files = [Picture(f"{kind}-{Path(file).stem}", folder / split / file, texts[0]) for file, texts in captions.items()]
    return Coco(reference, files, split, annotations)


def read_annotations(path: Path) -> dict[str, list[str]]:
    """Each picture's file name with its cleaned captions, in the orders of the lists ``images`` and ``annotations``.

    Raises:
        WrongCommand: the file is damaged or no caption file, an image stands twice, or has no caption.
    """
    try:
        content: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        files = [(image["id"], str(image["file_name"])) for image in content["images"]]
        captions: dict[Any, list[str]] = {key: [] for key, _ in files}
        for annotation in content["annotations"]:
            text = clean_caption(annotation["caption"])
            if text and annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongCommand(
            f"the annotation file {path} is damaged or holds no captions ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if len(captions) < len(files):
        twice = Counter(key for key, _ in files).most_common(1)[0][0]
        raise WrongCommand(f"the annotation file {path} has the image {twice} twice; fetch it again")
    silent = [file for key, file in files if not captions[key]]
    if silent:
        raise WrongCommand(f"the annotation file {path} has no caption for {named(silent)}; fetch it again")
    return {file: captions[key] for key, file in files}
