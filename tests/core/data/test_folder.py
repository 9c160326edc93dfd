"""Folders of captioned images: by an index or by file names; ids and captions are checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.data.base import Prompt
from ddil_core.data.captioned import prepare_image, read_image
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import read_folder
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.features.recipes import Preparation
from tests.coco import photograph

Batches = list[tuple[np.ndarray, list[str]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, name in enumerate(("b.png", "a.JPG", "c.webp")):
        Image.fromarray(photograph(place)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def index(folder: Path, *rows: object, name: str = "index.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def refused(folder: Path) -> str:
    with pytest.raises(WrongCommand) as error:
        read_folder(folder)
    return str(error.value)


def test_without_an_index_images_are_in_file_order_with_the_text_beside_them(folder: Path) -> None:
    (folder / "a.txt").write_text(" a\n cat ")
    assert [(p.id, p.path.name, p.caption) for p in read_folder(folder)] == [
        ("a", "a.JPG", "a cat"), ("b", "b.png", None), ("c", "c.webp", None),
    ]  # fmt: skip
    data = open_data(f"folder:{folder}")
    assert data.prompts(1) == [Prompt("a", "a cat")]
    assert np.array_equal(list(data.images(2))[1][0], photograph(0))


def test_an_index_says_which_images_in_which_order(folder: Path) -> None:
    index(folder, {"id": 7, "file": "c.webp", "prompt": "x  y", "seed": 0}, {"file_name": "b.png", "text": ""})
    assert [(p.id, p.path.name, p.caption) for p in read_folder(folder)] == [
        ("7", "c.webp", "x y"), ("b", "b.png", None),
    ]  # fmt: skip


def test_metadata_as_image_folders_have_it(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,text\nb.png,"a cat, sitting"\na.JPG,a dog\n')
    assert [(p.id, p.caption) for p in read_folder(folder)] == [("b", "a cat, sitting"), ("a", "a dog")]


def test_line_ends_inside_captions_are_white_space(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,text\nb.png,"a cat,\nsitting\x85"\n', encoding="utf-8")
    assert [p.caption for p in read_folder(folder)] == ["a cat, sitting"]
    row = {"file": "b.png", "text": "a\u2028cat"}
    (folder / "index.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert [p.caption for p in read_folder(folder)] == ["a cat"]


def test_a_caption_in_another_encoding(folder: Path) -> None:
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    assert refused(folder).startswith(f"the caption {folder / 'a.txt'} cannot be read as UTF-8: ")


def test_an_id_twice(folder: Path) -> None:
    path = index(folder, {"id": "1", "file": "a.JPG", "prompt": "x"}, {"id": "1", "file": "b.png", "prompt": "x"})
    assert refused(folder) == f"the id '1' occurs twice, in rows 1 and 2 of {path}; give each row its own id"
    path.unlink()
    Image.fromarray(photograph(0)).save(folder / "a.png")
    assert refused(folder) == f"the id 'a' occurs twice, in rows 1 and 2 of {folder}; give each row its own id"


def test_two_captions_for_one_id(folder: Path) -> None:
    path = index(folder, {"id": "1", "file": "a.JPG", "prompt": "x"}, {"id": "1", "file": "a.JPG", "prompt": "y"})
    assert refused(folder) == f"the id '1' has two captions, 'x' and 'y', in rows 1 and 2 of {path}; keep one"


def test_an_index_that_is_none(folder: Path) -> None:
    path = index(folder, {"id": "1"})
    assert refused(folder) == f"row 1 of {path} names no file; give it a 'file' or 'file_name'"
    path = index(folder, [1])
    assert refused(folder) == (f'{path} has a line that is not a JSON object; write each line like {{"file": "a.png"}}')
    path.write_text("{")
    assert refused(folder).startswith(f"{path} cannot be read as jsonl in UTF-8: ")


def test_a_folder_without_images(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"the folder {tmp_path} holds no images (.png, .jpg, .jpeg, .webp, .bmp)"
    with pytest.raises(WrongCommand) as error:
        open_data(f"folder:{tmp_path}/none")
    assert str(error.value) == f"the data set 'folder:{tmp_path}/none' names no folder: there is no {tmp_path}/none"


def test_images_without_captions_have_no_prompts(folder: Path) -> None:
    (folder / "a.txt").write_text("a cat")
    with pytest.raises(WrongCommand) as error:
        open_data(f"folder:{folder}").prompts(3)
    assert str(error.value) == (
        f"2 of 3 images of folder:{folder} have no caption: b.png, c.webp; put a .txt beside each, or take --prompts "
        "where the command has it"
    )


# To train on


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Ten images; the caption of each says which it is."""
    for place in range(10):
        Image.fromarray(photograph(place)).save(tmp_path / f"{place}.png")
        (tmp_path / f"{place}.txt").write_text(f"picture {place}")
    return tmp_path


def not_trained_on(folder: Path, count: int = 10, kind: type[DdilError] = WrongCommand) -> str:
    with pytest.raises(kind) as error:
        open_data(f"folder:{folder}").require(count, 32)
    return str(error.value)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (91, 60), (64, 64), (65, 64), (33, 33), (20, 31)])
def test_preparation_is_pillows_bit_by_bit_and_that_of_the_recipe(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = min(height, width)
    left, top = round((width - short) / 2), round((height - short) / 2)
    whole = Image.fromarray(image).crop((left, top, left + short, top + short))
    found = prepare_image(image, 64)
    assert np.array_equal(found, np.asarray(whole.resize((64, 64), Image.Resampling.LANCZOS)))
    assert np.array_equal(found, Preparation(crop=True, size=64, filter="lanczos")(image))
    if (height, width) == (64, 64):
        assert np.array_equal(found, image)


def test_training_shows_every_image_once_with_its_caption_in_a_shuffled_order(captioned: Path) -> None:
    batches = list(open_data(f"folder:{captioned}").training(10, 32, batch_size=4))
    assert [images.shape for images, _ in batches] == [(4, 32, 32, 3), (4, 32, 32, 3), (2, 32, 32, 3)]
    places = [int(caption.removeprefix("picture ")) for _, captions in batches for caption in captions]
    assert sorted(places) == list(range(10)) != places
    shown = np.concatenate([images for images, _ in batches])
    for place, image in zip(places, shown, strict=True):
        assert np.array_equal(image, prepare_image(read_image(captioned / f"{place}.png"), 32))


def same(found: Batches, expected: Batches) -> bool:
    """Equal bit by bit."""
    return [captions for _, captions in found] == [captions for _, captions in expected] and all(
        np.array_equal(a, b) for (a, _), (b, _) in zip(found, expected, strict=True)
    )


def test_a_batch_depends_on_its_index_alone(captioned: Path) -> None:
    """Not on the batches before it, on how many there are, or on which process asks."""
    data = open_data(f"folder:{captioned}")
    whole = list(data.training(10, 32, batch_size=4))
    for first in (2, 0, 1):
        assert same(list(data.training(10, 32, batch_size=4, first=first)), whole[first:])
        assert same(list(open_data(f"folder:{captioned}").training(8, 32, batch_size=4, first=first)), whole[first:2])
    assert list(data.training(10, 32, batch_size=4, first=3)) == []


def test_other_images_are_another_identity(captioned: Path) -> None:
    before = open_data(f"folder:{captioned}").identity()
    assert open_data(f"folder:{captioned}").identity() == before
    (captioned / "3.txt").write_text("a cat")
    after = open_data(f"folder:{captioned}").identity()
    (captioned / "4.png").unlink()
    assert len({before, after, open_data(f"folder:{captioned}").identity()}) == 3


def test_too_few_images_to_train_on(captioned: Path) -> None:
    assert not_trained_on(captioned, 11) == (
        f"folder:{captioned} has 10 images to train on, fewer than the pool of 11; add others, or say --set pool=10"
    )


def test_training_images_without_captions_are_named(captioned: Path) -> None:
    (captioned / "7.txt").unlink()
    (captioned / "4.txt").write_text(" \n")
    assert not_trained_on(captioned) == (
        f"2 of 10 images of folder:{captioned} have no caption: 4.png, 7.png; put a .txt beside each, or leave them out"
    )


def test_training_images_that_are_missing_or_no_images_are_named(captioned: Path) -> None:
    index(captioned, *({"file": f"{place}.png", "text": "x"} for place in range(11)))
    assert not_trained_on(captioned, 11, DdilError) == (
        f"1 of 11 images of folder:{captioned} are missing: 10.png; fetch or make them again"
    )
    (captioned / "10.png").write_bytes(b"no picture")
    assert not_trained_on(captioned, 11, DdilError) == (
        f"1 of 11 images of folder:{captioned} are damaged: 10.png; fetch or make them again"
    )


def test_images_cut_short_end_training_and_are_all_named(captioned: Path) -> None:
    order = [captions[0][-1] for _, captions in open_data(f"folder:{captioned}").training(10, 32, batch_size=1)]
    for place in (order[5], order[8]):
        path = captioned / f"{place}.png"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data, seen = open_data(f"folder:{captioned}"), []
    data.require(10, 32)  # their heads are whole
    with pytest.raises(DdilError) as error:
        seen.extend(captions for _, captions in data.training(10, 32, batch_size=2))
    assert len(seen) == 2
    assert str(error.value) == (
        f"2 of 10 images of folder:{captioned} are damaged: {order[5]}.png, {order[8]}.png; fetch or make them again"
    )


def test_an_image_too_large_to_open_is_damaged(captioned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (500, 500)).save(captioned / "3.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert not_trained_on(captioned, kind=DdilError) == (
        f"1 of 10 images of folder:{captioned} are damaged: 3.png; fetch or make them again"
    )
    with pytest.raises(DdilError, match=r"3\.png is damaged \(Image size \(250000 pixels\) exceeds limit"):
        read_image(captioned / "3.png")


def test_what_preparation_changes_is_said(captioned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(photograph(2)).convert("L").save(captioned / "2.png")
    Image.fromarray(photograph(5)).convert("CMYK").save(captioned / "5.jpg")
    (captioned / "5.png").unlink()
    data = open_data(f"folder:{captioned}")
    data.require(10, 60)
    converted = f"warning: 2 of 10 images of folder:{captioned} are not RGB and are converted: 2.png, 5.jpg"
    assert capsys.readouterr().err.splitlines() == [converted]
    data.require(10, 61)
    small = f"warning: images of folder:{captioned} are smaller than 61 x 61 and are enlarged, such as 0.png"
    assert capsys.readouterr().err.splitlines() == [converted, small]
    shown = {c: i for images, captions in data.training(10, 32) for i, c in zip(images, captions, strict=True)}
    assert (shown["picture 2"][..., 0] == shown["picture 2"][..., 2]).all()
