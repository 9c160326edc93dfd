"""Data without end: images are encoded while a run trains, and the run reads a window that moves over them.

A stream holds as many images as the pool, and every batch brings new ones. Which images the window holds at a batch
depends on the number of the batch alone. So a resumed run reads the same data, and nothing of the stream has to be in a
checkpoint. Encoded images lie in parts of the folder ``stream``, which all processes read; a part that has left the
window is deleted, and encoded again where a state of a rollout still needs its caption.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddil_core.data.base import DataSet, Side, in_words
from ddil_core.data.captioned import prepare_batches
from ddil_core.data.folder import ImageFiles
from ddil_core.data.pool import CONDITION, LatentPool, delete_others, encode_batch, image_side
from ddil_core.data.shards import ShardImage, Shards
from ddil_core.models.memory import MOST_ENCODED, on_device
from ddil_core.models.model import Model
from ddil_core.support import ranks
from ddil_core.support.checksums import delete_with_checksum, with_checksum
from ddil_core.support.files import is_temporary, write_tensors, write_text

Batch = tuple[np.ndarray, list[str]]
COUNTS = "shards.json"
"""The file with the number of images of each shard that was read to its end, by which a resumed run finds its place."""
_PAUSE = 0.05
"""Seconds between two looks for a part that another process encodes."""
_PATIENCE = 120.0
"""Seconds that a process waits for such a part. Then it encodes the part itself."""


class Reader:
    """Reads the parts of endless data: part c holds the images from c · ``size`` on, and the data begin again at
    their end.

    The images of a folder that do not fill a part are left out. Shards are read in their order.
    """

    def __init__(self, data: DataSet, side: Side, size: int, folder: Path) -> None:
        """``folder`` keeps what is known of the shards."""
        self.data, self.side, self.size, self.folder = data, side, size, folder
        counts = folder / COUNTS
        self._counts: dict[str, int] = json.loads(counts.read_text(encoding="utf-8")) if counts.is_file() else {}
        self._images: Iterator[ShardImage] = iter(())
        self._place = -1

    def read(self, part: int) -> Batch:
        """Return the images uint8 [size, side, side, 3] and the captions of a part.

        Raises:
            DdilError: an image is damaged.
            WrongCommand: an image has no caption, or a shard is not here and may not be downloaded.
        """
        if isinstance(self.data, Shards):
            return self._of_shards(self.data, part)
        whole = len(self.data.training_files()) // self.size if isinstance(self.data, ImageFiles) else None
        index = part if whole is None else part % whole
        count = self.size * (index + 1 if whole is None else whole)
        return next(iter(self.data.training(count, self.side, self.size, first=index)))

    def _of_shards(self, shards: Shards, part: int) -> Batch:
        first = part * self.size
        if not 0 <= self._place <= first:
            self._images, self._place = shards.endless(first, self._counts), first
        images = list(islice(self._images, first - self._place, first - self._place + self.size))
        self._place = first + self.size
        if ranks.is_main():
            write_text(self.folder / COUNTS, json.dumps(self._counts))
        return next(prepare_batches(images, self.side, self.size, self.size, shards.reference))


class Stream:
    """The encoded parts of endless data."""

    def __init__(self, model: Model, data: DataSet, first: LatentPool, folder: Path, new: float) -> None:
        """Open the stream.

        Args:
            model: The model that encodes.
            data: The data.
            first: The window at the first batch, which is encoded already.
            folder: Where the parts lie. All processes share it.
            new: How many new images a batch brings.
        """
        self.model, self.first, self.folder, self.new = model, first, folder, new
        self.size = math.gcd(len(first), MOST_ENCODED)
        side = image_side(model)
        self._metadata = {"data": data.identity(), "of": f"{self.size} images of {in_words(side)} px of a stream"}
        if ranks.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            parts = sorted(path for path in folder.glob("*.safetensors") if not is_temporary(path))
            delete_others(folder, parts, self._metadata, keep=(COUNTS,))
        ranks.barrier()
        self._reader = Reader(data, side, self.size, folder)
        self._read = OrderedDict[int, dict[str, Tensor]]()
        self._start = 0
        self._lock = threading.RLock()  # the next batch is drawn in another thread

    @property
    def held(self) -> int:
        """The number of parts in the window."""
        return len(self.first) // self.size

    def window(self, batch: int) -> int:
        """Return the first image of the window at a batch. All parts of the window are encoded then.

        Each process encodes every R-th part, and waits for those of the others. A part that does not come, or that the
        first process has deleted since, it encodes itself: its content is the same.
        """
        start = int(batch * self.new) // self.size
        with self._lock:
            for part in range(max(start, self.held), start + self.held):
                if part % ranks.world() == ranks.rank():
                    self._encode(part)
            for part in range(max(start, self.held), start + self.held):
                asked = time.monotonic()
                while not self._file(part).is_file():
                    if time.monotonic() - asked > _PATIENCE:
                        self._encode(part)
                    time.sleep(_PAUSE)
            if start > self._start and ranks.is_main():
                self._forget(start - self.held)
            self._start = start
        return start * self.size

    def take(self, rows: Tensor, names: list[str]) -> list[Tensor]:
        """Return tensors of images by their numbers in the stream, int64 [B].

        Args:
            rows: The numbers.
            names: "mean", "std", or parts of the condition as the file names them.
        """
        places = [divmod(row, self.size) for row in rows.tolist()]
        with self._lock:
            read = {part: self._part(part) for part, _ in places}
        return [torch.stack([read[part][name][place] for part, place in places]) for name in names]

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:09d}.safetensors"

    def _part(self, part: int) -> dict[str, Tensor]:
        """Return the tensors of a part, mapped from its file."""
        if part < self.held:
            rows = slice(part * self.size, (part + 1) * self.size)
            condition = {CONDITION + name: tensor[rows] for name, tensor in self.first.condition.items()}
            return {"mean": self.first.mean[rows], "std": self.first.std[rows]} | condition
        if part in self._read:
            self._read.move_to_end(part)
        else:
            self._encode(part)  # where it has left the window
            try:
                self._read[part] = load_file(self._file(part))
            except FileNotFoundError:  # the main process has just deleted it
                return self._part(part)
            while len(self._read) > 2 * self.held:
                self._read.popitem(last=False)
        return self._read[part]

    @torch.no_grad()
    def _encode(self, part: int) -> None:
        """Encode a part, unless it is there."""
        path = self._file(part)
        if path.is_file():
            return
        images, captions = self._reader.read(part)
        networks = [self.model.pipeline.vae, *self.model.text_encoders()]
        with self.model.compute.precision(), on_device(networks, self.model.device):
            tensors, _ = encode_batch(self.model, images, captions)
        write_tensors(path, tensors, self._metadata, writing=with_checksum)

    def _forget(self, before: int) -> None:
        """Delete the files of parts before one."""
        for path in self.folder.glob("*.safetensors"):
            if not is_temporary(path) and int(path.stem) < before:  # another process may be writing
                delete_with_checksum(path)


@dataclass(frozen=True, eq=False)
class StreamedPool(LatentPool):
    """A window of a stream. ``mean``, ``std`` and ``condition`` are those of the first window, as are the figures.

    A row is the number of an image in the stream.
    """

    stream: Stream

    def rows(self, size: int, generator: torch.Generator, batch: int = 0) -> Tensor:
        return self.stream.window(batch) + super().rows(size, generator, batch)

    def posteriors(self, row: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.stream.take(row, ["mean", "std"])
        return mean, std

    def conditions(self, row: Tensor) -> dict[str, Tensor]:
        names = list(self.condition)
        taken = self.stream.take(row, [CONDITION + name for name in names])
        return dict(zip(names, taken, strict=True))


def open_stream(model: Model, data: DataSet, first: LatentPool, folder: Path, new: float) -> StreamedPool:
    """Return a pool that moves over the data, ``new`` images a batch. See ``Stream``."""
    return StreamedPool(first.mean, first.std, first.condition, Stream(model, data, first, folder, new))
