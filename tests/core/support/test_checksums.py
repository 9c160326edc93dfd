"""Damage to what was written with a checksum is noticed, wherever it is, and a kill never looks like damage."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ddil_core.support import checksums
from ddil_core.support.checksums import (
    MANIFEST,
    Damaged,
    checksum_of,
    delete_with_checksum,
    require_checksum,
    with_checksum,
)
from ddil_core.support.files import replacing

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
