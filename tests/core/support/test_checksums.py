"""Damage to what was written with a checksum is noticed, wherever it is, and a kill never looks like damage."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ddil_core.support import checksums
from ddil_core.support.checksums import (
    CONTENT,
    MANIFEST,
    Damaged,
    checksum_of,
    delete_with_checksum,
    read_manifest,
    require_checksum,
    require_digest,
    with_checksum,
    with_content_sha256,
    without_content_sha256,
    write_manifest,
)
from ddil_core.support.files import replacing
from ddil_core.support.outside import NotPlain, parse_json

CURE = "delete the file to make it again"


def write(path: Path, content: bytes) -> None:
    with with_checksum(path) as temporary:
        temporary.write_bytes(content)


def write_folder(path: Path) -> None:
    with with_checksum(path) as temporary:
        (temporary / "unet").mkdir(parents=True)
        (temporary / "unet" / "weights.bin").write_bytes(bytes(range(64)))
        (temporary / "index.json").write_text("{}")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_and_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    path, content = tmp_path / "weights.bin", bytes(range(40))
    assert not require_checksum_after(path, content)
    write(path, content)
    assert require_checksum(path, "the weights", CURE)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", checksum_of(path).name], cwd=tmp_path, check=True)
    for bit in range(8 * len(content)):
        flip(path, bit)
        with pytest.raises(Damaged) as error:
            require_checksum(path, "the weights", CURE)
        flip(path, bit)
    assert str(error.value) == (
        f"the weights {path} does not match its checksum weights.bin.sha256, so one of the two was damaged or changed "
        f"after it was written; {CURE}"
    )
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(Damaged):
            require_checksum(path, "the weights", CURE)
    write(path, b"other")
    assert require_checksum(path, "the weights", CURE)
    delete_with_checksum(path)
    assert not list(tmp_path.iterdir())


def require_checksum_after(path: Path, content: bytes) -> bool:
    """What an earlier version wrote, without a checksum, is read as it is."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return require_checksum(path, "the weights", CURE)


FOLDER_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (
        lambda folder: flip(folder / "unet" / "weights.bin", 77),
        "the file {folder}/unet/weights.bin of the student does not match its checksum in sha256.json",
    ),
    "a missing file": (
        lambda folder: (folder / "index.json").unlink(),
        "the student {folder} lacks its file index.json, which sha256.json lists",
    ),
    "a flipped bit in the list": (lambda folder: flip(folder / MANIFEST, 0), "the checksums {folder}/sha256.json of"),
    "an empty list": (lambda folder: (folder / MANIFEST).write_bytes(b""), "the checksums {folder}/sha256.json of"),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
def test_damage_in_a_folder_names_the_file(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "student"
    write_folder(folder)
    (folder / "note.txt").write_text("a file of the user")
    assert require_checksum(folder, "the student", CURE)
    do, start = FOLDER_DAMAGE[damage]
    do(folder)
    with pytest.raises(Damaged) as error:
        require_checksum(folder, "the student", CURE)
    sentence = str(error.value)
    assert sentence.startswith(start.format(folder=folder)) and sentence.endswith(CURE) and "\n" not in sentence


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", range(3))
def test_a_kill_between_a_file_and_its_checksum_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """It comes before the checksum, before the file has its name, or before the old checksum is removed."""
    path = tmp_path / "weights.bin"
    write(path, b"old")
    original, calls = Path.replace, iter(range(9))

    def replace(self: Path, target: Path) -> Path:
        if next(calls) == moment:
            raise Killed
        return original(self, target)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "replace", replace)
        write(path, b"new")
    assert path.read_bytes() == (b"new" if moment == 2 else b"old")
    assert require_checksum(path, "the weights", CURE)
    write(path, b"newer")
    assert require_checksum(path, "the weights", CURE) and len(checksums._digests(checksum_of(path))) == 1


def test_every_flipped_bit_of_an_object_with_its_checksum_is_noticed_or_changes_nothing() -> None:
    content = {"name": "PD — 4", "value": 1.5e-7, "grid": [999, 749], "more": {"n": None}}
    text = json.dumps(with_content_sha256(content), ensure_ascii=False).encode()
    assert without_content_sha256(json.loads(text)) == content
    assert without_content_sha256(content) == content and without_content_sha256([1]) == [1]
    noticed = 0
    for bit in range(8 * len(text)):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = without_content_sha256(parse_json(bytes(changed)))
        except ValueError:  # no JSON, or another content
            noticed += 1
        else:  # another key in place of content_sha256, which a record refuses, or another white space
            assert found == content or CONTENT not in json.loads(changed)
    assert noticed > 0.9 * 8 * len(text)
    with pytest.raises(NotPlain, match="^does not match its content_sha256, so it was damaged or changed after"):
        without_content_sha256(with_content_sha256(content) | {"name": "DMD2"})


def test_a_manifest_may_name_some_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "kept")
    (tmp_path / "kept" / MANIFEST).unlink()
    assert read_manifest(tmp_path / "kept", "the images", CURE) is None
    write_manifest(tmp_path / "kept", [tmp_path / "kept" / "index.json"])
    digests = read_manifest(tmp_path / "kept", "the images", CURE)
    assert digests is not None and list(digests) == ["index.json"]
    (tmp_path / "kept" / "index.json").write_text("[]")
    with pytest.raises(Damaged, match="index.json of the images does not match its checksum in sha256.json"):
        require_digest(tmp_path / "kept" / "index.json", digests["index.json"], "the images", CURE)
    require_digest(tmp_path / "kept" / "index.json", None, "the images", CURE)
