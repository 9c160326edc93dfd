"""Folders of captioned pictures: by an index or by file names; ids and captions are checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.data.dataset import Prompt, open_data
from ddil_core.data.folder import read_folder
from ddil_core.errors import WrongCommand
from tests.coco import photograph


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


def test_without_an_index_pictures_are_in_file_order_with_the_text_beside_them(folder: Path) -> None:
    (folder / "a.txt").write_text(" a\n cat ")
    assert [(p.id, p.path.name, p.caption) for p in read_folder(folder)] == [
        ("a", "a.JPG", "a cat"), ("b", "b.png", None), ("c", "c.webp", None),
    ]  # fmt: skip
    data = open_data(f"folder:{folder}")
    assert data.prompts(1) == [Prompt("a", "a cat")]
    assert np.array_equal(list(data.pictures(2))[1][0], photograph(0))


def test_an_index_says_which_pictures_in_which_order(folder: Path) -> None:
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
    assert refused(folder) == f"the id '1' stands twice, in rows 1 and 2 of {path}; each picture needs an id of its own"
    path.unlink()
    Image.fromarray(photograph(0)).save(folder / "a.png")
    assert (
        refused(folder) == f"the id 'a' stands twice, in rows 1 and 2 of {folder}; each picture needs an id of its own"
    )


def test_two_captions_for_one_id(folder: Path) -> None:
    path = index(folder, {"id": "1", "file": "a.JPG", "prompt": "x"}, {"id": "1", "file": "a.JPG", "prompt": "y"})
    assert refused(folder) == f"the id '1' has two captions, 'x' and 'y', in rows 1 and 2 of {path}; keep one"


def test_an_index_that_is_none(folder: Path) -> None:
    path = index(folder, {"id": "1"})
    assert refused(folder) == f"row 1 of {path} names no file; give it a 'file' or 'file_name'"
    path = index(folder, [1])
    assert refused(folder) == (
        f'{path} holds a line that is no JSON object; each line is one, such as {{"file": "a.png"}}'
    )
    path.write_text("{")
    assert refused(folder).startswith(f"{path} cannot be read as jsonl in UTF-8: ")


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"the folder {tmp_path} holds no pictures (.png, .jpg, .jpeg, .webp, .bmp)"
    with pytest.raises(WrongCommand) as error:
        open_data(f"folder:{tmp_path}/none")
    assert str(error.value) == f"the data set 'folder:{tmp_path}/none' names no folder: there is no {tmp_path}/none"


def test_pictures_without_captions_have_no_prompts(folder: Path) -> None:
    (folder / "a.txt").write_text("a cat")
    with pytest.raises(WrongCommand) as error:
        open_data(f"folder:{folder}").prompts(3)
    assert str(error.value) == (
        f"2 of 3 pictures of folder:{folder} have no caption: b.png, c.webp; put a .txt beside each, or name a list of prompts"
    )
