"""Read and write features: ``.npy`` files that grow block by block, and ``.npz`` files of one chunk.

Each file that is kept has a checksum beside it, which is checked when the file is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddil_core.support.checksums import require_checksum, with_checksum
from ddil_core.support.errors import DdilError

Arrays = dict[str, np.ndarray]
Features = Arrays
"""For each network the features [N, d] of N images."""
BLOCK = 4096
"""Rows that are read at once when a whole file is checked."""


def gather_features(
    parts: Iterable[Features],
    count: int,
    folder: Path | Mapping[str, Path],
    *,
    writing: Callable[[Path], AbstractContextManager[Path]] = with_checksum,
) -> Features:
    """Write the features of batches that follow one another to files; return them memory-mapped, read-only.

    Each network has a file of its name in ``folder``, or in its own folder where ``folder`` is a mapping. Only one
    batch is in memory at a time. ``writing=replacing`` writes no checksums, for files that are deleted soon.

    Raises:
        DdilError: the batches hold fewer or more than ``count`` rows, or a file cannot be written.
    """

    def path_of(name: str) -> Path:
        return (folder if isinstance(folder, Path) else folder[name]) / f"{name}.npy"

    with ExitStack() as open_files:
        files: dict[str, _RowWriter] = {}
        for part in parts:
            for name, block in part.items():
                if name not in files:
                    path = open_files.enter_context(writing(path_of(name)))
                    files[name] = _RowWriter(open_files.enter_context(path.open("wb")), count, block)
                files[name].add(block)
        for name, rows in files.items():
            if rows.written != count:
                raise DdilError(f"the network {name} gave features of {rows.written} images, and {count} were expected")
    return {name: np.load(path_of(name), mmap_mode="r") for name in files}


def read_features(path: Path, count: int, what: str) -> np.ndarray:
    """Return features [count, d] from a file of ``gather_features``, memory-mapped. ``what`` names them in messages.

    Raises:
        DdilError: the file is damaged, or holds numbers that are not finite.
    """
    require_checksum(path, f"the file of the stored {what}", "delete the file to compute them again")
    try:
        features: np.ndarray = np.load(path, mmap_mode="r")
        if features.ndim != 2 or len(features) != count:
            raise ValueError("another shape")
        if not all(np.isfinite(features[start : start + BLOCK]).all() for start in range(0, count, BLOCK)):
            raise ValueError("not finite")
        return features
    except Exception as error:  # numpy parses the header as Python, so many kinds of error are possible
        raise DdilError(f"the stored {what} {path} are damaged; delete the file to compute them again") from error


class _RowWriter:
    """Write a ``.npy`` file block by block, for ``count`` rows in all of the type and width of ``like``."""

    def __init__(self, file: BinaryIO, count: int, like: np.ndarray) -> None:
        self.file, self.dtype, self.written = file, like.dtype, 0
        header = {"descr": np.lib.format.dtype_to_descr(like.dtype), "fortran_order": False}
        np.lib.format.write_array_header_2_0(file, {**header, "shape": (count, *like.shape[1:])})

    def add(self, block: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(block, dtype=self.dtype).tobytes())
        self.written += len(block)


def delete_parts(folder: Path) -> None:
    """Delete a folder of parts that a finished command no longer needs, and its parent where that is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # the parts of an unfinished command lie beside it
        folder.parent.rmdir()


def cached_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of a finished chunk. Where its file is missing, call ``make`` and write the file.

    Raises:
        DdilError: the file is damaged, or holds numbers that are not finite.
    """
    if not path.is_file():
        arrays = make()
        with with_checksum(path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stub takes every name for allow_pickle
        return arrays
    require_checksum(path, "the finished chunk", "delete the file to make the chunk again")
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
        return arrays
    except Exception as error:  # numpy, zipfile and zlib raise errors of different kinds
        raise DdilError(f"the finished chunk {path} is damaged; delete the file to make the chunk again") from error


def concatenate(parts: Sequence[Features]) -> Features:
    """Join the features of batches that follow one another, in memory; ``gather_features`` does it on disk."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
