"""Files are written whole or not at all, and a full disk gives one sentence.

A limit on the file size makes the disk full.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ddil_core.support.errors import DdilError
from ddil_core.support.files import append_line, delete_temporaries, is_temporary, replacing, sort_metadata, write_text

LIMITED = """
import resource, signal, sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models

from ddil_core.support.errors import DdilError
from ddil_core.support.files import append_line, replacing, write_tensors, write_text, write_torch

out, big = Path(sys.argv[1]), torch.zeros(1000, 100)
picture = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
words = Tokenizer(models.WordLevel({str(i): i for i in range(20000)}, "0"))

def through(save):
    def write(path):
        with replacing(path) as temporary:
            save(temporary)
    return write

def folder(temporary):
    temporary.mkdir()
    (temporary / "small.json").write_text("{}")
    words.save(str(temporary / "tokenizer.json"))

WRITERS = {
    "checkpoint.pt": lambda path: write_torch(path, {"net": big}),
    "weights.safetensors": lambda path: write_tensors(path, {"net": big}),
    "features.npz": through(lambda temporary: np.savez(temporary, a=big.numpy())),
    "features.npy": through(lambda temporary: np.save(temporary, big.numpy())),
    "picture.png": through(lambda temporary: Image.fromarray(picture).save(temporary)),
    "tokenizer.json": through(lambda temporary: words.save(str(temporary))),
    "student": through(folder),
    "table.csv": lambda path: write_text(path, "a" * 200_000),
    "log.jsonl": lambda path: [append_line(path, "b" * 30_000) for _ in range(4)],
}
for name in WRITERS:
    if name != "student":
        (out / name).write_text("before\\n")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for name, write in WRITERS.items():
    try:
        write(out / name)
    except DdilError as error:
        print(name, "|", error)
"""
"""The system refuses to write past the limit, as on a full disk, with the reason "File too large"."""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_what_was_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert len(said) == 9
    for name, sentence in said.items():
        start, _, end = sentence.partition(" MiB are free there")
        reason = "10[0-9]+ requested and [0-9]+ written|File too large" if name == "features.npy" else "File too large"
        assert re.match(rf"{tmp_path / name} could not be written \(({reason}); [0-9,]+$", start)
        assert end == "): make room or name another place, and run the same command again"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(said) - {"student"})
    for path in tmp_path.iterdir():
        lines = path.read_text().splitlines()
        assert lines[0] == "before" and all(line == "b" * 30_000 for line in lines[1:])


def test_a_full_device_is_one_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    log = tmp_path / "log.jsonl"
    log.symlink_to(full)
    with pytest.raises(
        DdilError, match=r"log\.jsonl could not be written \(No space left on device; [0-9,]+ MiB are free"
    ):
        append_line(log, "{}")


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), replacing(path) as temporary:
            temporary.write_text("half")
            assert is_temporary(temporary) and temporary.suffix == ".json" and temporary.parent == tmp_path
            raise failure
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as first:
        first.write_text("first")
        write_text(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_an_error_of_another_kind_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a"):
        try:
            raise FileNotFoundError("looked for something that may be absent")
        except FileNotFoundError:
            raise ZeroDivisionError from None
    with pytest.raises(DdilError, match="its own sentence"), replacing(tmp_path / "a"):
        raise DdilError("its own sentence")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for write in (write_text, append_line):
        with pytest.raises(DdilError, match=r"could not be written \((Not a directory|File exists)"):
            write(tmp_path / "file" / "deeper" / "a.txt", "text")
    assert (tmp_path / "file").read_text() == "mine"


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    """The library writes metadata in a random order, so that two of so many files would be equal once in 40,320."""
    contents, metadata = set(), {name: f"{name} ε" for name in "abcdefgh"}
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        save_file({"x": torch.arange(5.0), "y": torch.ones(2, 2)}, path, metadata)
        sort_metadata(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("x"), torch.arange(5.0))


def test_only_what_a_kill_left_is_deleted(tmp_path: Path) -> None:
    with replacing(tmp_path / "weights.safetensors") as temporary:
        temporary.write_text("whole")
        left = temporary.name
    mine = (".hidden", "notes.partial", ".a.partial.txt", "weights.safetensors")
    for name in (left, *mine):
        (tmp_path / name).write_text("x")
    delete_temporaries(tmp_path, tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)
