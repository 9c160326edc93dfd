"""Captions: what a standard writer wrote is read back by every reader, by the same rules; any other bytes are one sentence."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddil_core.data.captions import clean_caption, decode, is_blank, lines, parse_json, read_rows
from ddil_core.data.coco import open_coco, read_annotations
from ddil_core.data.folder import read_folder
from ddil_core.data.shards import read_shard
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.experiments.prompts import read_prompts
from tests.shards import picture, save_shard

few = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff"), max_size=20)
LINE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n\ufeff"), max_size=20)
SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
"""A line that ``str.splitlines`` cuts into nine."""


# Every reader, by what holds the caption


def by_text_list(folder: Path, text: Any) -> str | None:
    path = folder / "list.txt"
    path.write_text("first\n" + " ".join(lines(text) or [""]) + "\n", encoding="utf-8", newline="")
    found = [prompt.text for prompt in read_prompts(path)]
    return found[1] if len(found) > 1 else None


def by_table_list(folder: Path, text: Any) -> str | None:
    path = folder / "list.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "prompt"], ["1", text]])
    return _only(read_prompts, path)


def by_json_list(folder: Path, text: Any) -> str | None:
    path = folder / "list.jsonl"
    path.write_text(json.dumps({"prompt": text}), encoding="utf-8")
    return _only(read_prompts, path)


def _only(read: Callable[[Path], Any], path: Path) -> str | None:
    """The one prompt of a list, None where the list is refused since it has none."""
    try:
        (prompt,) = read(path)
    except WrongCommand as error:
        if "holds no prompts" in str(error):
            return None
        raise
    return str(prompt.text)


def by_json_index(folder: Path, text: Any) -> str | None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}), encoding="utf-8")
    return read_folder(folder)[0].caption


def by_table_index(folder: Path, text: Any) -> str | None:
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["a.png", text]])
    return read_folder(folder)[0].caption


def by_text_beside(folder: Path, text: Any) -> str | None:
    (folder / "a.png").touch()
    (folder / "a.txt").write_text(text, encoding="utf-8", newline="")
    return read_folder(folder)[0].caption


def by_annotations(folder: Path, text: Any) -> str | None:
    images = [{"id": 1, "file_name": "a.png"}]
    captions = [{"image_id": 1, "caption": text}, {"image_id": 1, "caption": "the second"}]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}), encoding="utf-8")
    (found,) = read_annotations(path).values()
    return found[0] if len(found) > 1 else None


def by_shard_text(folder: Path, text: Any) -> str | None:
    return _of_shard(folder, {"txt": text.encode()})


def by_shard_json(folder: Path, text: Any) -> str | None:
    return _of_shard(folder, {"json": json.dumps({"caption": text}).encode()})


def _of_shard(folder: Path, sample: dict[str, bytes]) -> str | None:
    path = save_shard(folder / "a.tar", [{"png": picture(0)} | sample])
    return next(iter(read_shard(path))).caption


TEXT_READERS = (by_text_list, by_table_list, by_table_index, by_text_beside, by_shard_text)
JSON_READERS = (by_json_list, by_json_index, by_annotations, by_shard_json)
READERS = TEXT_READERS + JSON_READERS


def named(reader: Callable[..., Any]) -> str:
    return reader.__name__


@pytest.mark.parametrize("reader", READERS, ids=named)
@few
@given(text=TEXT)
@example(text=SEPARATORS)
@example(text='a "quoted", caption; with\ttabs \r\n and lines')
@example(text="\u00a0\u200b\u2060\u3164")
@example(text="")
def test_a_caption_is_read_back_by_every_reader(
    reader: Callable[[Path, str], str | None], text: str, tmp_path: Path
) -> None:
    assert reader(tmp_path, text) == (None if is_blank(text) else clean_caption(text))


@pytest.mark.parametrize("reader", JSON_READERS, ids=named)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["a cat", "a dog"], "is a list, but a caption is one text"),
        ({"en": "a cat"}, "is an object, but a caption is one text"),
        (7, "is a number, but a caption is one text"),
        (float("nan"), "is a number, but a caption is one text"),
        (True, "is true or false, but a caption is one text"),
        ("a \ud83d cat", "holds U+D83D, half of a surrogate pair, which is no character of a text; write it again in"),
        ("a \0 cat", "holds a NUL, which is no character of a text"),
    ],
)
def test_what_is_no_caption_is_refused_by_every_reader(
    reader: Callable[[Path, Any], Any], value: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(WrongCommand) as error:
        reader(tmp_path, value)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("reader", JSON_READERS, ids=named)
def test_null_is_no_caption(reader: Callable[[Path, Any], str | None], tmp_path: Path) -> None:
    assert reader(tmp_path, None) is None


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "a \\ud83d\\ude00 cat"}')
    assert read_prompts(path)[0].text == "a \U0001f600 cat"


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize(
    "name",
    ["list.txt", "list.csv", "list.jsonl", "metadata.csv", "metadata.jsonl", "a.txt", "a.tar", "c.json"],
)
def test_other_encodings_are_refused(name: str, encoding: str, tmp_path: Path) -> None:
    content = {"csv": "file_name,prompt\na.png,café\n", "txt": "café\n"}.get(name[-3:], '{"prompt": "café"}\n')
    (tmp_path / "a.png").touch()
    path = tmp_path / name
    if name == "a.tar":
        save_shard(path, [{"png": picture(0), "txt": content.encode(encoding)}])
    else:
        path.write_bytes(content.encode(encoding))
    read: dict[str, Callable[[], object]] = {"list": lambda: read_prompts(path), "c": lambda: read_annotations(path)}
    with pytest.raises(WrongCommand) as error:
        if name == "a.tar":
            list(read_shard(path))
        else:
            read.get(path.stem, lambda: read_folder(tmp_path))()
    assert "\n" not in str(error.value) and name.removesuffix(".tar") in str(error.value)
    reason = str(error.value)
    assert "'utf-8' codec" in reason or "UTF-16" in reason


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog\r\xef\xbb\xbf\xef\xbb\xbfa hat\n")  # joined from several
    assert [prompt.text for prompt in read_prompts(path)] == ["a cat", "a dog", "a hat"]
    table = tmp_path / "list.csv"
    table.write_bytes(b'\xef\xbb\xbf"id","prompt"\n1,a cat\n\xef\xbb\xbf2,"\xef\xbb\xbfa dog"\n')
    assert [(prompt.id, prompt.text) for prompt in read_prompts(table)] == [("1", "a cat"), ("2", "a dog")]


# Lines


@few
@given(
    texts=st.lists(LINE, min_size=1), end=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans(), last=st.booleans()
)
@example(texts=[SEPARATORS, "second"], end="\n", mark=True, last=True)
def test_a_list_has_as_many_prompts_as_lines(
    texts: list[str], end: str, mark: bool, last: bool, tmp_path: Path
) -> None:
    texts = [f"{place} {text}" for place, text in enumerate(texts)]  # none of them blank
    path = tmp_path / "list.txt"
    path.write_bytes((end.join(texts) + end * last).encode("utf-8-sig" if mark else "utf-8"))
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts] == [clean_caption(text) for text in texts]
    assert [prompt.id for prompt in prompts] == [f"list-{place:05d}" for place in range(1, len(texts) + 1)]


def test_mixed_line_ends() -> None:
    assert lines("a\r\nb\rc\nd\n\ne\r") == ["a", "b", "c", "d", "", "e"]
    assert lines("") == [] and lines("\n") == [""]


def test_blank_lines_of_a_list_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a cat\n\n \u00a0\na dog\n\u200b\n")
    assert [prompt.id for prompt in read_prompts(path)] == ["list-00001", "list-00002"]
    assert capsys.readouterr().err == f"warning: 3 of 5 lines of the list {path} are blank and are skipped\n"


# Tables


@few
@given(
    rows=st.lists(TEXT, min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_tables_are_read_back(rows: list[str], quoting: Any, end: str, tmp_path: Path) -> None:
    if quoting == csv.QUOTE_MINIMAL and end == "\n":
        rows = [text.replace("\r", "") for text in rows]  # Python 3.11's writer puts no quotes around a CR then
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerows([["file_name", "text"], *([f"{place}.png", text] for place, text in enumerate(rows))])
    path = tmp_path / "metadata.csv"
    path.write_bytes(file.getvalue().encode("utf-8-sig"))
    found = read_rows(path)
    assert [row.values["text"] for row in found] == rows
    assert [row.name("file_name") for row in found] == [f"{place}.png" for place in range(len(rows))]


SURPLUS = (
    "the row in line {line} has {fields} fields, but the header has 2; put quotes around a field that holds a comma"
)
MISSING = "the row in line 2 has 1 fields, but the header has 2; write a comma for each empty field"
UNNAMED = (
    "the row in line {line} has a value in column {column}, for which the header has no name; put quotes around a field "
    "that holds a comma"
)
ONE_COLUMN = "its header '{}' has one column; put commas between the columns"
OPEN = "the row in line 2 cannot be read ({}); close every quote"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("file_name,text\na.png,a cat, sitting\n", SURPLUS.format(line=2, fields=3)),
        ('file_name,text\na.png,"two\nlines"\nb.png,a, b\n', SURPLUS.format(line=4, fields=3)),
        ('file_name,text\na.png, "a cat, sitting"\n', SURPLUS.format(line=2, fields=3)),
        ("file_name,text\na.png\n", MISSING),
        ("file_name,text,\na.png,a cat, sitting\n", UNNAMED.format(line=2, column=3)),
        ("file_name;text\na.png;a cat\n", ONE_COLUMN.format("file_name;text")),
        ("file_name\ttext\na.png\ta cat\n", ONE_COLUMN.format("file_name\\ttext")),
        ("file_name,text,text\na.png,a,b\n", "its header has the column 'text' twice"),
        ('file_name,text\na.png,"a cat\nb.png,a dog\n', OPEN.format("unexpected end of data")),
        (f'file_name,text\na.png,"{"x" * 200_000}\n', OPEN.format("field larger than field limit (131072)")),
    ],
)
def test_tables_whose_captions_would_be_cut(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(content, newline="")
    with pytest.raises(WrongCommand) as error:
        read_folder(tmp_path)
    assert str(error.value) == f"{tmp_path / 'metadata.csv'} cannot be read as csv in UTF-8: {reason}"


def test_a_header_may_have_spaces_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(
        "\n, id , prompt ,,\n0,1,a cat,,\n\n  \n1,2,a dog,, \n\n"
    )  # a data frame's index, a sheet's empty columns
    assert [(prompt.id, prompt.text) for prompt in read_prompts(path)] == [("1", "a cat"), ("2", "a dog")]


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_rows_of_a_list_without_a_prompt_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    texts = ["a cat", "", "\u00a0", "a dog"]
    path.write_text(
        "id,prompt\n" + "".join(f"{place},{text}\n" for place, text in enumerate(texts))
        if name == "list.csv"
        else "".join(json.dumps({"id": place, "prompt": text}) + "\n" for place, text in enumerate(texts))
    )
    with pytest.raises(WrongCommand) as error:
        read_prompts(path)
    assert str(error.value) == (
        f"2 of 4 rows of the list {path} have no prompt: 2, 3; give each a 'prompt', 'caption' or 'text', or leave them out"
    )


def test_a_quote_after_a_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('id, prompt\n1, a "green" cow\n2," ""blue"" dog"\n')
    assert [prompt.text for prompt in read_prompts(path)] == ['a "green" cow', '"blue" dog']
    path.write_text('id,prompt\n1,a cow\n2, "a cat"\n')
    with pytest.raises(WrongCommand, match="the row in line 3 has a space before a quote; leave the space out$"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_keys_in_capitals_are_read(name: str, tmp_path: Path) -> None:
    """Where capitals count, another column's text becomes the caption, or none."""
    row = {"File_Name": "a.png", "Prompt ": "a cat", "text": "a remark"}
    content = json.dumps(row) if name.endswith("jsonl") else "\n".join([",".join(row), ",".join(row.values())])
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_text(content)
    assert [(image.name, image.caption) for image in read_folder(tmp_path)] == [("a.png", "a cat")]
    twice = content.replace("text", "PROMPT")
    (tmp_path / name).write_text(twice)
    with pytest.raises(WrongCommand, match=r"row 1 of .* has the key 'prompt' twice, in capitals and in small letters"):
        read_folder(tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=named)
def test_controls_at_the_ends_are_no_part_of_a_caption(
    reader: Callable[[Path, str], str | None], tmp_path: Path
) -> None:
    """DOS ends a file with U+001A; a caption that keeps it is another caption."""
    assert reader(tmp_path, "a cat\x1a") == "a cat"
    assert reader(tmp_path, "\x1a") is None


def test_images_of_one_id_are_refused_in_annotations(tmp_path: Path) -> None:
    """They would share one noise and one file name."""
    (tmp_path / "val2017").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}],
    }
    (tmp_path / "captions_val2017.json").write_text(json.dumps(content))
    with pytest.raises(WrongCommand, match=r"^the id 'coco2017-a' has two captions, 'a cat' and 'a dog'"):
        open_coco(f"coco2017:{tmp_path}")


def test_a_caption_file_in_capitals_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.TXT").write_text("a cat")
    assert read_folder(tmp_path)[0].caption is None
    assert ".txt files without an image (1)" in capsys.readouterr().err


# JSON


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file": "a.png", "text": "x", "text": "y"}', "line 1: it has an object with the key 'text' twice"),
        ("[" * 100_000, "line 1: it is nested more than 64 levels deep"),
        ('{"file": "a.png", "text": "a\tb"}', "line 1: Invalid control character at: line 1 column 29 (char 28)"),
    ],
)
def test_json_that_would_lose_something(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(WrongCommand) as error:
        read_folder(tmp_path)
    assert str(error.value) == f"{tmp_path / 'metadata.jsonl'} cannot be read as jsonl in UTF-8: {reason}"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"file": ["a.png"]}, "the 'file' of {row} is a list, but it names an image or a prompt; write a text or a number"),
        ({"file": "a.png", "id": True},
         "the 'id' of {row} is true or false, but it names an image or a prompt; write a text or a number"),
        ({"file": "a.png", "id": float("nan")},
         "the 'id' of {row} is not a finite number, but it names an image or a prompt; write a text or a number"),
        ({"file": "a.png", "id": "\ud800"},
         "the 'id' of {row} holds U+D800, half of a surrogate pair, which is no character of a text; write it again in UTF-8"),
        ({"file": "a\0.png"}, "the 'file' of {row} holds a NUL, which is no character of a text; write it again in UTF-8"),
    ],
)  # fmt: skip
def test_names_that_are_none(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(WrongCommand) as error:
        read_folder(tmp_path)
    assert str(error.value) == sentence.format(row=f"row 1 of {path}")


def test_a_file_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    path.write_text('{"id": 1, "file": "a.png", "text": "x"}\n{"id": 2, "file": "./a.png", "text": "y"}\n')
    with pytest.raises(WrongCommand) as error:
        read_folder(tmp_path)
    assert str(error.value) == f"the file 'a.png' occurs twice, in rows 1 and 2 of {path}; name each image once"
    annotations = tmp_path / "captions.json"
    images = [{"id": number, "file_name": "a.jpg"} for number in (1, 2)]
    captions = [{"image_id": number, "caption": "x"} for number in (1, 2)]
    annotations.write_text(json.dumps({"images": images, "annotations": captions}))
    with pytest.raises(WrongCommand) as error:
        read_annotations(annotations)
    assert str(error.value) == f"the annotation file {annotations} has the file a.jpg twice; fetch it again"


def test_an_image_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(WrongCommand) as error:
        read_folder(tmp_path)
    assert "\\udcff.png' holds U+DCFF, half of a surrogate pair" in str(error.value)


# Anything


WORDS = b'" , \n \r \0 { } [ : a text "text" file_name "file_name" "images" null NaN 1e999 \\ud800'.split(b" ")
PIECES = (*WORDS, b" ", b"\r", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc2\x85")
BYTES = st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join))


@pytest.mark.parametrize(
    "name",
    ["list.txt", "list.csv", "list.jsonl", "index.jsonl", "metadata.csv", "a.txt", "captions.json", "a.tar"],
)
@few
@given(content=BYTES)
def test_any_bytes_are_captions_or_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    path = tmp_path / name
    if name == "a.tar":
        save_shard(path, [{"png": b"", "txt": content}, {"png": b"", "json": content}])
    else:
        path.write_bytes(content)
    try:
        if name == "a.tar":
            texts = [one.caption for one in read_shard(path)]
        elif name.startswith("list"):
            texts = [prompt.text for prompt in read_prompts(path)]
        elif name == "captions.json":
            texts = [text for some in read_annotations(path).values() for text in some]
        else:
            texts = [one.caption for one in read_folder(tmp_path)]
    except DdilError as error:
        assert "\n" not in str(error)
    else:
        for text in texts:
            assert text is None or (text == clean_caption(text) and not is_blank(text))
            (text or "").encode()


@few
@given(content=st.binary(max_size=40))
def test_decoding_gives_text_that_can_be_written_or_a_reason(content: bytes) -> None:
    try:
        text = decode(content)
    except ValueError as error:
        assert str(error)
    else:
        assert "\0" not in text and content.endswith(text.encode())


def test_json_numbers_stay_what_they_are() -> None:
    assert parse_json('{"a": NaN, "b": 1.0}')["b"] == 1.0  # a score that is NaN is nobody's caption


def test_a_number_of_any_length_is_an_id(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "a cat", "id": ' + "9" * 400 + "}")
    assert read_prompts(path)[0].id == "9" * 400
