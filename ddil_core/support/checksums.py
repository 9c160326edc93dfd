"""SHA-256 checksums. What was damaged or changed after it was written is noticed when it is read.

The checksum of a file NAME is in NAME.sha256 beside it, in the format of the command ``sha256sum``. The checksums of
the files in a folder are in ``sha256.json`` inside it. A small JSON file holds its own, as ``content_sha256``. What has
no checksum comes from an earlier version or another program. It is read as it is.

Write with ``with_checksum`` and read after ``require_checksum``::

    with with_checksum(path) as temporary:
        temporary.write_bytes(content)

    require_checksum(path, "the features", "delete the file to compute them again")
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddil_core.support.errors import DdilError
from ddil_core.support.files import replacing, write_text
from ddil_core.support.outside import MEGABYTE, NotPlain, parse_json, read_file

MANIFEST = "sha256.json"
"""The file with the checksums of a folder: a JSON object from the path of each file, with slashes, to its checksum."""

LARGEST = 100 * MEGABYTE
"""The largest ``sha256.json``, of a million files."""

SUFFIX = ".sha256"
"""The end of the name of a file's checksum."""

CONTENT = "content_sha256"
"""The key of a JSON object with the checksum of all its other keys and their values."""

AFTER = "so it was damaged or changed after it was written"

_DIGEST = re.compile(r"^([0-9a-fA-F]{64})(?: [ *]|\s*$)", re.MULTILINE)
"""A line of ``sha256sum``, for a text or a binary file, or a bare checksum."""


class Damaged(DdilError):
    """A file or folder does not match its checksum. The message names the file, and says what to do."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(path: Path) -> Path:
    """Return the path of the checksum of a file."""
    return path.with_name(path.name + SUFFIX)


@contextmanager
def with_checksum(path: Path) -> Iterator[Path]:
    """Write the file or folder ``path`` whole or not at all, as ``replacing`` does, and its checksum.

    A kill at any moment leaves a file that matches its checksum: the new checksum is written before the new file gets
    its name, beside the one of the old file, which is removed afterwards.

    Raises:
        DdilError: the disk or the folder refuses.
    """
    checksum = checksum_of(path)
    digests = _digests(checksum)
    with replacing(path) as temporary:
        yield temporary
        if temporary.is_dir():
            write_manifest(temporary)
        else:
            digests = [sha256(temporary), *digests]
            write_text(checksum, _lines(digests, path))
    if len(digests) > 1:
        write_text(checksum, _lines(digests[:1], path))


def require_checksum(path: Path, what: str, cure: str) -> bool:
    """Refuse a file or folder that does not match its checksum.

    Every byte is read, at 1 to 2 GB/s where the processor has instructions for SHA-256.

    Args:
        path: A file or folder that exists.
        what: What a message calls it, such as "the checkpoint".
        cure: What to do, such as "delete the file to train the stage again".

    Returns:
        Whether there is a checksum.

    Raises:
        Damaged: it does not match.
    """
    if path.is_dir():
        return _require_manifest(path, what, cure)
    checksum = checksum_of(path)
    if not checksum.is_file():
        return False
    if sha256(path) not in _digests(checksum):
        raise Damaged(
            f"{what} {path} does not match its checksum {checksum.name}, so one of the two was damaged or changed "
            f"after it was written; {cure}"
        )
    return True


def delete_with_checksum(path: Path) -> None:
    """Delete a file and its checksum, as far as they exist."""
    path.unlink(missing_ok=True)
    checksum_of(path).unlink(missing_ok=True)


def _lines(digests: list[str], path: Path) -> str:
    return "".join(f"{digest}  {path.name}\n" for digest in digests)


def _digests(checksum: Path) -> list[str]:
    """Return the checksums in a file: mostly one, and two after a kill between a checksum and its file."""
    try:
        text = checksum.read_text(encoding="utf-8", errors="replace")
        return [digest.lower() for digest in _DIGEST.findall(text)]
    except FileNotFoundError:
        return []


def write_manifest(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write the checksums of some files in a folder, or of all, into its ``sha256.json``. Raises as ``replacing``."""
    chosen = sorted(path for path in folder.rglob("*") if path.is_file()) if files is None else files
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in chosen}
    write_text(folder / MANIFEST, json.dumps(digests, indent=2) + "\n")


def read_manifest(folder: Path, what: str, cure: str) -> dict[str, str] | None:
    """Return the checksums in a folder's ``sha256.json`` by path; None where there is none.

    Args:
        folder: The folder.
        what: What a message calls it.
        cure: What to do.

    Raises:
        Damaged: the file is damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        return {str(name): str(digest) for name, digest in dict(parse_json(read_file(manifest, LARGEST))).items()}
    except (ValueError, TypeError) as error:
        raise Damaged(f"the checksums {manifest} of {what} are damaged; {cure}") from error


def require_digest(path: Path, digest: str | None, what: str, cure: str) -> None:
    """Refuse a file with another SHA-256 than a manifest says. None: it says nothing. Raises Damaged."""
    if digest is not None and sha256(path) != digest:
        raise Damaged(f"the file {path} of {what} does not match its checksum in {MANIFEST}, {AFTER}; {cure}")


def _require_manifest(folder: Path, what: str, cure: str) -> bool:
    digests = read_manifest(folder, what, cure)
    for name, digest in (digests or {}).items():
        if not (folder / name).is_file():
            raise Damaged(f"{what} {folder} lacks its file {name}, which {MANIFEST} lists; {cure}")
        require_digest(folder / name, digest, what, cure)
    return digests is not None


def with_content_sha256(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the checksum of its content as its last key."""
    return {**content, CONTENT: _content_sha256(content)}


def without_content_sha256(content: Any) -> Any:
    """Check the checksum of a JSON object, and return the object without it. Any other value is returned as it is.

    Raises:
        NotPlain: the content does not match it. The message starts with a verb.
    """
    require_content_sha256(content)
    return {key: value for key, value in content.items() if key != CONTENT} if isinstance(content, dict) else content


def require_content_sha256(content: Any) -> None:
    """Check the checksum of a JSON object, where it has one.

    Raises:
        NotPlain: the content does not match it. The message starts with a verb.
    """
    if isinstance(content, dict) and CONTENT in content:
        rest = {key: value for key, value in content.items() if key != CONTENT}
        if content[CONTENT] != _content_sha256(rest):
            raise NotPlain(f"does not match its {CONTENT}, {AFTER}")


def _content_sha256(content: Mapping[str, Any]) -> str:
    """Return a hash that does not depend on the order of keys, or on how a text is indented."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
