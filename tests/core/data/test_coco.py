"""COCO's folders: images and prompts in the annotation file's order; what is bad is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddil_core.data.base import Prompt
from ddil_core.data.captioned import prepare_image, read_image, survey
from ddil_core.data.captions import clean_caption
from ddil_core.data.coco import read_annotations
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles
from ddil_core.support.errors import DdilError, WrongCommand
from tests.coco import photograph, save_coco

NAMES = ["COCO_val2014_000000001000.jpg", "COCO_val2014_000000000993.jpg", "COCO_val2014_000000000986.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_coco(tmp_path / "coco", count=5)


def coco(folder: Path) -> ImageFiles:
    data = open_data(f"coco2014:{folder}")
    assert isinstance(data, ImageFiles)
    return data


def test_prompts_are_each_images_first_caption_in_the_order_of_the_images(folder: Path) -> None:
    assert coco(folder).prompts(3) == [
        Prompt(f"coco2014-COCO_val2014_{image:012d}", f"a small red circle on a grey background, {image}")
        for image in (1000, 993, 986)
    ]


def test_images_come_in_the_same_order_as_they_are_decoded(folder: Path) -> None:
    pictures = list(coco(folder).images(3))
    for place, (picture, name) in enumerate(zip(pictures, NAMES, strict=True)):
        with Image.open(folder / "val2014" / name) as image:
            assert np.array_equal(picture[0], np.asarray(image))
        assert picture.shape == (1, *photograph(place).shape)


def test_the_hash_is_of_the_files_bytes_and_order(folder: Path) -> None:
    before = coco(folder).images_sha256(3)
    assert before == coco(folder).images_sha256(3) != coco(folder).images_sha256(4)
    Image.fromarray(photograph(0)).save(folder / "val2014" / NAMES[2], quality=50)
    assert coco(folder).images_sha256(3) != before


def test_captions_are_cleaned_of_white_space_alone() -> None:
    assert clean_caption("  A man,\n with  a\tHAT . ") == "A man, with a HAT ."


def test_the_2017_annotation_file_reads(shared: Path) -> None:
    captions = read_annotations(shared / "coco" / "captions_val2017.json")
    assert (len(captions), sum(map(len, captions.values()))) == (5_000, 25_014)
    assert all(text == clean_caption(text) and text for texts in captions.values() for text in texts)
    prompts = open_data(f"coco2017:{shared / 'coco'}").prompts(5_000)
    content: dict[str, Any] = json.loads((shared / "coco" / "captions_val2017.json").read_text())
    first = content["images"][0]
    caption = next(row["caption"] for row in content["annotations"] if row["image_id"] == first["id"])
    assert prompts[0] == Prompt(f"coco2017-{first['id']:012d}", clean_caption(caption))
    assert len({prompt.id for prompt in prompts}) == 5_000


def test_missing_images_are_named_before_any_is_read(folder: Path) -> None:
    for name in NAMES[:2]:
        (folder / "val2014" / name).unlink()
    with pytest.raises(DdilError) as error:
        next(coco(folder).images(5))
    assert str(error.value) == (
        f"2 of 5 images of coco2014:{folder} are missing: {NAMES[0]}, {NAMES[1]}; fetch or make them again"
    )


def test_images_cut_short_are_named_all_of_them(folder: Path) -> None:
    for name in NAMES[1:]:
        path = folder / "val2014" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    seen = []
    with pytest.raises(DdilError) as error:
        seen.extend(coco(folder).images(5))
    assert len(seen) == 3
    assert str(error.value) == (
        f"2 of 5 images of coco2014:{folder} are damaged: {NAMES[1]}, {NAMES[2]}; fetch or make them again"
    )


def test_many_bad_images_are_counted(tmp_path: Path) -> None:
    folder = save_coco(tmp_path / "coco", count=8)
    for path in (folder / "val2014").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DdilError) as error:
        next(coco(folder).images(8))
    assert str(error.value).startswith(f"8 of 8 images of coco2014:{folder} are damaged: {NAMES[0]}, ")
    assert str(error.value).endswith(" and 3 more; fetch or make them again")


def test_images_that_are_not_rgb_are_converted_and_named(folder: Path) -> None:
    grey = Image.fromarray(photograph(0)).convert("L")
    grey.save(folder / "val2014" / NAMES[1])
    Image.fromarray(photograph(0)).convert("CMYK").save(folder / "val2014" / NAMES[2])
    data = coco(folder)
    assert survey(data.take(5, "images"), data.reference).converted == NAMES[1:]
    picture = list(data.images(2))[1][0]
    with Image.open(folder / "val2014" / NAMES[1]) as image:
        assert np.array_equal(picture, np.asarray(image.convert("RGB")))
    assert (picture[..., 0] == picture[..., 2]).all()


def test_fewer_than_asked(folder: Path) -> None:
    for what, ask in (("prompts", coco(folder).prompts), ("images", lambda n: list(coco(folder).images(n)))):
        with pytest.raises(WrongCommand) as error:
            ask(6)
        assert str(error.value) == (
            f"coco2014:{folder} has 5 images, fewer than the 6 {what} asked for; add the others, or ask for fewer"
        )


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        open_data(f"coco2014:{tmp_path}/none")
    assert str(error.value) == (
        f"the data set 'coco2014:{tmp_path}/none' names no folder: there is no {tmp_path}/none; make it, and fetch "
        "zips/val2014.zip and annotations/annotations_trainval2014.zip from images.cocodataset.org and unpack it there"
    )
    with pytest.raises(WrongCommand) as error:
        open_data(f"coco2017:{tmp_path}")
    assert str(error.value) == (
        f"the data set 'coco2017:{tmp_path}' has no annotations/captions_val2017.json; "
        "fetch annotations/annotations_trainval2017.zip from images.cocodataset.org and unpack it there"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged or holds no captions (JSONDecodeError: "),
        ("[]", "is damaged or holds no captions (TypeError: "),
        ('{"images": []}', "is damaged or holds no captions (KeyError: 'annotations'); fetch it again"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "has no caption for a; fetch it again"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "has the image 1 twice; fetch it again",
        ),
    ],
)
def test_annotation_files_that_are_damaged(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    path.write_text(content)
    with pytest.raises(WrongCommand) as error:
        open_data(f"coco2014:{tmp_path}")
    assert str(error.value).startswith(f"the annotation file {path} {sentence}")


def test_it_is_trained_on_its_training_images_and_evaluated_on_the_others(folder: Path) -> None:
    save_coco(folder, count=6, part="train")
    data = coco(folder)
    data.require(6, 32)
    ((images, captions),) = data.training(6, 32)
    shown = dict(zip(captions, images, strict=True))
    assert sorted(shown) == sorted(f"a small red circle on a grey background, {1000 - 7 * place}" for place in range(6))
    for image in (1000, 993):
        path = folder / "train2014" / f"COCO_train2014_{image:012d}.jpg"
        assert np.array_equal(
            shown[f"a small red circle on a grey background, {image}"], prepare_image(read_image(path), 32)
        )
    assert [prompt.id for prompt in data.prompts(2)] == [f"coco2014-{Path(name).stem}" for name in NAMES[:2]]


def test_training_images_that_are_not_there(folder: Path) -> None:
    sentences = []
    for made in ((), ("annotations/captions_train2014.json",), ("train2014/a",)):
        for name in made:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / "annotations" / "captions_val2014.json", folder / name)
        with pytest.raises(DdilError) as error:
            coco(folder).require(5, 32)
        sentences.append(str(error.value))
    assert sentences == [
        f"the data set 'coco2014:{folder}' has no annotations/captions_train2014.json; "
        "fetch annotations/annotations_trainval2014.zip from images.cocodataset.org and unpack it there",
        f"the data set 'coco2014:{folder}' has no train2014/ to train on; "
        "fetch zips/train2014.zip from images.cocodataset.org and unpack it there",
        f"5 of 5 images of coco2014:{folder} are missing: COCO_val2014_000000001000.jpg, COCO_val2014_000000000993.jpg, "
        "COCO_val2014_000000000986.jpg, COCO_val2014_000000000979.jpg, COCO_val2014_000000000972.jpg; fetch or make them again",
    ]
