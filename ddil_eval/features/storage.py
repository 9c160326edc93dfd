"""Features on their way from pictures to statistics: extracted beside the sampling, and held on disk where there are many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from ddil_core.support.errors import DdilError
from ddil_core.support.files import replacing

Arrays = dict[str, np.ndarray]
Features = Arrays
"""For each network the features [N, d] of N pictures."""
BLOCK = 4096
"""Pictures whose features are read at once where a whole file is looked through."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(items: Iterable[Item], work: Callable[[Item], Result], ahead: int = 2) -> Iterator[Result]:
    """``work(item)`` for every item, in order, by one other thread while the next item is made.

    For extraction beside sampling: ``items`` draws pictures, ``work`` resizes and extracts. At most ``ahead`` items wait.
    The results are those of one thread; what either side raises is raised here, and nothing more is begun.

    Float32 is exact for the while: the switch that networks of metrics set is the process's own, and one thread must not
    turn it under the other.
    """
    from ddil_core.support.environment import full_precision

    waiting: deque[Future[Result]] = deque()
    with full_precision(), ThreadPoolExecutor(1, thread_name_prefix="features") as worker:
        try:
            for item in items:
                waiting.append(worker.submit(work, item))
                del item
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def gather_features(parts: Iterable[Features], count: int, folder: Path | Mapping[str, Path]) -> Features:
    """Features of several batches, one after another, as files that are read as they are needed: memory-mapped, read-only.

    One pass; what is in memory is one batch. The files lie in ``folder``, or each network's in its own, under the
    networks' names.

    Raises:
        DdilError: fewer or more than ``count`` rows came, or the disk does not take them.
    """

    def place(name: str) -> Path:
        return (folder if isinstance(folder, Path) else folder[name]) / f"{name}.npy"

    with ExitStack() as open_files:
        files: dict[str, _Rows] = {}
        for part in parts:
            for name, block in part.items():
                if name not in files:
                    path = open_files.enter_context(replacing(place(name)))
                    files[name] = _Rows(open_files.enter_context(path.open("wb")), count, block)
                files[name].add(block)
        for name, rows in files.items():
            if rows.done != count:
                raise DdilError(f"features of {rows.done} pictures came for {name} where {count} were asked for")
    return {name: np.load(place(name), mmap_mode="r") for name in files}


def read_features(path: Path, count: int, what: str) -> np.ndarray:
    """Features [count, d] that ``gather_features`` left in a file, memory-mapped.

    Raises:
        DdilError: the file is damaged, or holds numbers that are not finite.
    """
    try:
        features: np.ndarray = np.load(path, mmap_mode="r")
        if features.ndim != 2 or len(features) != count:
            raise ValueError("another shape")
        if not all(np.isfinite(features[start : start + BLOCK]).all() for start in range(0, count, BLOCK)):
            raise ValueError("not finite")
        return features
    except Exception as error:  # numpy reads a header as Python, which fails in many ways
        raise DdilError(f"the kept {what} {path} are damaged; delete the file to compute them again") from error


class _Rows:
    """A .npy file that is written row by row."""

    def __init__(self, file: BinaryIO, count: int, like: np.ndarray) -> None:
        self.file, self.dtype, self.done = file, like.dtype, 0
        header = {"descr": np.lib.format.dtype_to_descr(like.dtype), "fortran_order": False}
        np.lib.format.write_array_header_2_0(file, {**header, "shape": (count, *like.shape[1:])})

    def add(self, block: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(block, dtype=self.dtype).tobytes())
        self.done += len(block)


def cached_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a finished chunk; where it is not there yet, what ``make`` gives, kept for the next time.

    Raises:
        DdilError: the chunk is damaged, or holds numbers that are not finite.
    """
    if not path.is_file():
        arrays = make()
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stub takes every name for allow_pickle
        return arrays
    try:
        with np.load(path) as held:
            arrays = {name: held[name] for name in held.files}
        broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
        return arrays
    except Exception as error:  # numpy, zipfile and zlib each have kinds of their own
        raise DdilError(f"the finished chunk {path} is damaged; delete the file to make the chunk again") from error


def concatenate(parts: Sequence[Features]) -> Features:
    """Features of several batches, one after another, in memory; ``gather_features`` holds many of them on disk."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
