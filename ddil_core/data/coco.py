"""COCO's captioned images in COCO's own folders and annotation files: ``coco2014:DIR`` and ``coco2017:DIR``.

DIR is laid out as COCO's archives unpack. Evaluation reads ``val20XX/`` and ``annotations/captions_val20XX.json``.
Training reads ``train20XX/`` and ``annotations/captions_train20XX.json``. Images and prompts keep the order of the
annotation file's list ``images``. An image's prompt is its first caption in the order of the list ``annotations``.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from ddil_core.data.captioned import ImageFile, name_some
from ddil_core.data.captions import LIST_FILE, caption_of, parse_json, read_text
from ddil_core.data.folder import ImageFiles, refuse_twice
from ddil_core.support.errors import WrongCommand
from ddil_core.support.outside import inside
from ddil_core.support.paths import shown, user_path
from ddil_core.support.text import require_text

VALUES = 20_000_000
"""The most values of an annotation file. COCO 2017's largest has about 4 million."""

FETCH = "fetch {zip} from images.cocodataset.org and unpack it there"


class Coco(ImageFiles):
    """The validation images of one year with their annotation file, and the training images of the same year."""

    def __init__(self, reference: str, folder: Path) -> None:
        self.split = f"val{_year(reference)}"
        self.folder, self.annotations = folder, _annotations(reference, folder, self.split)
        super().__init__(reference, _images(reference, folder, self.split, self.annotations))

    def training_files(self) -> list[ImageFile]:
        """Return the training images. The first call reads their annotation file.

        Raises:
            WrongCommand: their folder or annotation file is missing or damaged; the message says what to do.
        """
        return self._training

    @cached_property
    def _training(self) -> list[ImageFile]:
        split = f"train{_year(self.reference)}"
        annotations = _annotations(self.reference, self.folder, split)
        if not (self.folder / split).is_dir():
            raise WrongCommand(
                f"the data set {self.reference!r} has no {split}/ to train on; {FETCH.format(zip=f'zips/{split}.zip')}"
            )
        return _images(self.reference, self.folder, split, annotations)


def open_coco(reference: str) -> Coco:
    """Open a COCO data set by its reference, ``coco2014:DIR`` or ``coco2017:DIR``.

    Raises:
        WrongCommand: the folder or the annotation file is missing, or the file is damaged; the message says what to do.
    """
    folder, year = user_path(reference.partition(":")[2], "the data set's folder"), _year(reference)
    if not folder.is_dir():
        raise WrongCommand(
            f"the data set {reference!r} names no folder: there is no {folder}; make it, and "
            f"{FETCH.format(zip=f'zips/val{year}.zip and annotations/annotations_trainval{year}.zip')}"
        )
    return Coco(reference, folder)


def _year(reference: str) -> str:
    return reference.partition(":")[0].removeprefix("coco")


def _annotations(reference: str, folder: Path, split: str) -> Path:
    name = f"captions_{split}.json"
    for path in (folder / "annotations" / name, folder / name):
        if path.is_file():
            return path
    raise WrongCommand(
        f"the data set {reference!r} has no annotations/{name}; "
        f"{FETCH.format(zip=f'annotations/annotations_trainval{_year(reference)}.zip')}"
    )


def _images(reference: str, folder: Path, split: str, annotations: Path) -> list[ImageFile]:
    kind, captions = reference.partition(":")[0], read_annotations(annotations)
    images = [
        ImageFile(f"{kind}-{Path(file).stem}", folder / split / file, texts[0]) for file, texts in captions.items()
    ]
    refuse_twice([(image.id, image.caption) for image in images], str(annotations))
    return images


def read_annotations(path: Path) -> dict[str, list[str]]:
    """Return each image's file name with its cleaned captions, in the orders of the annotation file's two lists.

    A blank caption is skipped, so the next caption becomes the image's prompt.

    Raises:
        WrongCommand: the file is damaged or holds no captions, an image or a file name occurs twice, an image has no
            caption, or a caption or a file name is not a text.
    """
    try:
        content: dict[str, list[dict[str, Any]]] = parse_json(read_text(path, LIST_FILE), VALUES)
        files = [(image["id"], image["file_name"]) for image in content["images"]]
        captions: dict[object, list[str]] = {key: [] for key, _ in files}
        for number, annotation in enumerate(content["annotations"], 1):
            text = caption_of(annotation["caption"], f"the 'caption' of annotation {number} of {path}")
            if text and annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(text)
        for place, (_, file) in enumerate(files, 1):
            if not isinstance(file, str):
                raise TypeError(f"the file name of image {place} is not a text")
            require_text(file, f"the 'file_name' of image {place} of {path}")
            if not inside(file):
                raise ValueError(f"image {place} has the file name {shown(file)}, which lies outside of its folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WrongCommand(
            f"the annotation file {path} is damaged or holds no captions ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error
    if len(captions) < len(files):
        twice = Counter(key for key, _ in files).most_common(1)[0][0]
        raise WrongCommand(f"the annotation file {path} has the image {twice} twice; fetch it again")
    if len({file for _, file in files}) < len(files):
        twice = Counter(file for _, file in files).most_common(1)[0][0]
        raise WrongCommand(f"the annotation file {path} has the file {twice} twice; fetch it again")
    uncaptioned = [file for key, file in files if not captions[key]]
    if uncaptioned:
        raise WrongCommand(f"the annotation file {path} has no caption for {name_some(uncaptioned)}; fetch it again")
    return {file: captions[key] for key, file in files}
