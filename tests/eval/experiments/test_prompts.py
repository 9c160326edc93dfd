"""Prompts: a list by path or the data set's own, cleaned, pinned by hashes; bad lists are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ddil_core.data.base import Prompt
from ddil_core.data.datasets import open_data
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.prompts import choose_prompts, read_prompts
from ddil_eval.report.records import digest
from tests.coco import save_coco


def refused(path: Path) -> str:
    with pytest.raises(WrongCommand) as error:
        read_prompts(path)
    return str(error.value)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "captions_coco14_test.txt"
    path.write_text("A  cat \n\n a dog\nA cat\n")
    assert read_prompts(path) == [
        Prompt("captions_coco14_test-00001", "A cat"),
        Prompt("captions_coco14_test-00002", "a dog"),
        Prompt("captions_coco14_test-00003", "A cat"),
    ]


def test_tables_have_ids(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"id": 3, "prompt": "a cat"}\n{"caption": "a dog"}\n')
    assert read_prompts(path) == [Prompt("3", "a cat"), Prompt("list-00002", "a dog")]
    path = tmp_path / "metadata.csv"
    path.write_text("file_name,text\na.jpg,a cat\nb.jpg,a dog\n")
    assert read_prompts(path) == [Prompt("a.jpg", "a cat"), Prompt("b.jpg", "a dog")]


def test_a_record_holds_the_hash_of_the_list(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a cat\na dog\na hat\n")
    chosen = choose_prompts(open_data("shapes"), 2, path)
    assert chosen.described() == {
        "prompts": "mine.txt",
        "prompts_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "prompt_ids_sha256": digest(["mine-00001", "mine-00002"]),
        "captions_sha256": digest(["a cat", "a dog"]),
    }


def test_a_record_holds_the_hash_of_cocos_annotation_file(tmp_path: Path) -> None:
    folder = save_coco(tmp_path / "coco", count=4, year=2017)
    described = choose_prompts(open_data(f"coco2017:{folder}"), 4, None).described()
    annotations = folder / "annotations" / "captions_val2017.json"
    assert described["prompts"] == "captions_val2017.json"
    assert described["prompts_sha256"] == hashlib.sha256(annotations.read_bytes()).hexdigest()


def test_prompts_that_are_skipped_are_those_before(tmp_path: Path) -> None:
    data, path = open_data("shapes"), tmp_path / "mine.txt"
    assert choose_prompts(data, 3, None, skip=2).prompts == data.prompts(5)[2:]
    path.write_text("a cat\na dog\na hat\n")
    assert [prompt.text for prompt in choose_prompts(data, 2, path, skip=1).prompts] == ["a dog", "a hat"]
    assert [prompt.text for prompt in choose_prompts(data, None, path, skip=2).prompts] == ["a hat"]
    with pytest.raises(WrongCommand, match="has 3 prompts, fewer than the 4 asked for"):
        choose_prompts(data, 2, path, skip=2)


def test_fewer_prompts_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a cat\n")
    with pytest.raises(WrongCommand) as error:
        choose_prompts(open_data("shapes"), 2, path)
    assert str(error.value) == (
        f"the list {path} has 1 prompts, fewer than the 2 asked for; add prompts, or ask for fewer"
    )


def test_bad_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    assert refused(path) == f"there is no list of prompts {path}"
    path.write_text("id,prompt\n1,a cat\n1,a cat\n")
    assert refused(path) == f"the id '1' occurs twice, in rows 1 and 2 of {path}; give each row its own id"
    path.write_text("id,prompt\n1,a cat\n2,a\n1,a dog\n")
    assert refused(path) == f"the id '1' has two captions, 'a cat' and 'a dog', in rows 1 and 3 of {path}; keep one"
    path.write_text("a,b\n1,2\n")
    assert refused(path) == f"the list {path} holds no prompts; give a row a 'prompt', 'caption' or 'text'"
    path = tmp_path / "list.pkl"
    path.write_bytes(b"\x80")
    assert refused(path) == f"the list of prompts {path} is neither .txt, .jsonl nor .csv"
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xff\xfe")
    assert refused(path).startswith(f"the list of prompts {path} is not UTF-8 text: ")
