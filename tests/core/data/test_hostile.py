"""Data that would fill the memory, hang a command or lead out of its folder is refused in one sentence."""

from __future__ import annotations

import gzip
import json
import os
import resource
import tarfile
from pathlib import Path

import pytest

from ddil_core.data.captions import LONGEST, read_rows
from ddil_core.data.coco import read_annotations
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import read_folder
from ddil_core.data.shards import DamagedShard, read_shard
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.prompts import read_prompts
from tests.shards import picture, save_shard


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header that states a size, without the member."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (header("a.txt", 52_000_000), "its file 'a.txt' is larger than 1 MB"),
        (header("a.png", 12 * 10**9), "its file 'a.png' is larger than 200 MB"),
        (gzip.compress(header("a.bin", 12 * 10**9)), "it grows to more than 100 times its size"),
        (header("x", 10**9, tarfile.GNUTYPE_LONGNAME), "file could not be opened successfully"),
        (gzip.compress(header("x", 300_000_000, tarfile.XHDTYPE) + bytes(300_000_000), 1), None),
    ],
    ids=["a caption", "an image", "compressed", "a long name", "a compressed header"],
)
def test_a_shard_that_would_fill_the_memory(content: bytes, sentence: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedShard) as error:
        list(read_shard(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    if sentence is not None:  # with compression tarfile says only that no reader fits
        assert str(error.value) == f"the shard {path} is damaged ({sentence}); fetch or make it again"


def test_a_shard_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DamagedShard, match=r"\(\[Errno 22\] it is no regular file"):
        list(read_shard(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "pattern", ["{0..999999999}.tar", "{a,b}" * 40, "{0..9}" * 9, "{0.." + "9" * 5000 + "}", "a" * 20_000]
)
def test_a_pattern_of_too_many_shards(pattern: str) -> None:
    with pytest.raises(WrongCommand, match=r"names more than 100,000 shards; name fewer$"):
        open_data(f"webdataset:{pattern}")


def test_a_pattern_of_many_shards_is_expanded(tmp_path: Path) -> None:
    save_shard(tmp_path / "b-07.tar", [{"png": picture(0), "txt": b"x"}])
    open_data(f"webdataset:{tmp_path}/{{b,b}}-{{07..07}}.tar").require(2, 32)


def test_a_caption_without_end(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x" * (LONGEST + 1)}))
    with pytest.raises(WrongCommand) as error:
        read_prompts(tmp_path / "p.jsonl")
    where = f"the 'prompt' of row 1 of {tmp_path / 'p.jsonl'}"
    assert (
        str(error.value)
        == f"{where} has 20,001 characters, and a caption has at most 20,000; shorten it or leave it out"
    )


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b.png"])
def test_an_index_that_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "index.jsonl"
    index.write_text(json.dumps({"file": name, "prompt": "x"}))
    with pytest.raises(WrongCommand) as error:
        read_folder(tmp_path)
    outside = f"names the file {name!r}, which lies outside of the folder; name a file in the folder"
    assert str(error.value) == f"row 1 of {index} {outside}"
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": name}], "annotations": []}))
    with pytest.raises(WrongCommand, match=rf"image 1 has the file name {name!r}, which lies outside of its folder"):
        read_annotations(path)


def test_a_list_of_too_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddil_core.data.captions.ROWS", 10)
    path = tmp_path / "p.jsonl"
    path.write_text("{}\n" * 21)
    with pytest.raises(WrongCommand, match=r"p.jsonl cannot be read as jsonl in UTF-8: it has more than 10 lines$"):
        read_rows(path)
