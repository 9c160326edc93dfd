"""WebDataset shards to train on, ``webdataset:PATTERN``: tar files of pictures with captions, here or on the web.

A sample is a picture (.jpg, .png, .webp) and a caption of the same name: a .txt in UTF-8, or a .json with a "caption". A name ends
at its first dot, as the library has it, so that ``img_1.5.png`` is no picture of a sample. Nothing else in a shard is read, and
nothing is decoded but pictures, by Pillow, and text: no pickle, no array, no code. PATTERN is a path or an URL of http(s) with
braces, as the library ``webdataset`` expands them, or a path with ``*`` and ``?``; commands (``pipe:``) are refused. Shards on the
web are fetched whole, on consent, into the user's folder, and read from there.
"""

from __future__ import annotations

import glob
import hashlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys

from ddil_core.data.base import Prompt
from ddil_core.data.captioned import name_some, prepare_batches, refuse_bad, refuse_fewer, require_training
from ddil_core.data.captions import caption_of, decode, parse_json
from ddil_core.data.folder import ENDINGS, OTHER_ENDINGS
from ddil_core.data.images import Head, read_head, read_rgb
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import replacing
from ddil_core.support.lock import waiting_for
from ddil_core.support.paths import user_path
from ddil_core.support.progress import transfer, warn_once
from ddil_core.support.resources import require_cache, user_folder
from ddil_core.support.text import require_text

PICTURES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
CAPTIONS = ("txt", "json")
EXAMPLE = "webdataset:/data/train-{000000..000099}.tar"

_WEB = re.compile(r"https?://", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_SILENCE = 60.0
"""Seconds of silence after which a server is given up."""


class DamagedShard(DdilError):
    """A shard that is no whole tar file."""


@dataclass(frozen=True)
class ShardImage:
    """A sample of a shard: the picture's bytes and its cleaned caption, None where there is none or a blank one."""

    name: str
    content: bytes
    caption: str | None

    def head(self) -> Head:
        """See ``read_head``."""
        return read_head(io.BytesIO(self.content), FORMATS)

    def read(self) -> np.ndarray:
        """uint8 [H, W, 3]; see ``read_rgb``."""
        return read_rgb(io.BytesIO(self.content), self.name, FORMATS)


def read_shard(path: Path, left_out: list[str] | None = None) -> Iterator[ShardImage]:
    """The samples of a shard, in its order. Samples without a picture are none.

    The names of pictures that are not read are added to ``left_out``.

    Raises:
        DamagedShard: it is no tar file, or one that is cut short or damaged.
        WrongCommand: a name or a caption is no text.
    """
    left_out = [] if left_out is None else left_out
    try:
        for sample in group_by_keys(_members(path, left_out)):
            name, kinds = f"{path.name}/{sample['__key__']}", [kind for kind in PICTURES if kind in sample]
            left_out += [f"{name}.{kind}" for kind in kinds[1:]]
            if kinds:
                require_text(name, f"the name {name!r} of a picture")
                yield ShardImage(f"{name}.{kinds[0]}", sample[kinds[0]], _caption(sample, name))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = str(error.args[0] if type(error) is ValueError else error).partition("\n")[0].rstrip(":")
        raise DamagedShard(f"the shard {path} is damaged ({reason}); fetch or make it again") from error


def _members(path: Path, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """The files of a shard that are read, as ``group_by_keys`` takes them; other pictures are added to ``left_out``.

    The library's own reader takes a shard that is cut between two members, or has a damaged header, for one that ends there.
    """
    with tarfile.open(path) as tar:
        for member in tar:
            kind = base_plus_ext(member.name)[1] or ""
            file = tar.extractfile(member) if member.isfile() and not member.issparse() else None
            if file is not None and kind.lower() in (*PICTURES, *CAPTIONS):
                yield {"fname": member.name, "data": file.read(), "__url__": str(path)}
            elif member.isfile() and Path(member.name).suffix.lower() in (*ENDINGS, *OTHER_ENDINGS):
                left_out.append(f"{path.name}/{member.name}")
        end = tar.fileobj
        assert end is not None
        end.seek(tar.offset)
        if end.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends without the mark of a tar file's end")


def _caption(sample: dict[str, Any], name: str) -> str | None:
    """A sample's caption: that of its .txt, else of its .json. Raises WrongCommand: it is no text."""
    for kind, told in (("txt", decode), ("json", _told_by_json)):
        if kind in sample:
            where = f"the caption {name}.{kind}"
            try:
                found = caption_of(told(sample[kind]), where)
            except ValueError as error:
                raise WrongCommand(f"{where} cannot be read in UTF-8: {error}; write it again") from error
            if found is not None:
                return found
    return None


def _told_by_json(content: bytes) -> object:
    """What a .json holds as its "caption". Raises ValueError: it is no JSON object."""
    told = parse_json(decode(content))
    if not isinstance(told, dict):
        raise ValueError("it is no JSON object")
    return told.get("caption")


class Shards:
    """A data set (``ddil_core.data.base.DataSet``) in shards, for training; read in their order, which is not shuffled."""

    split = "all"
    side: int | None = None

    def __init__(self, reference: str, shards: list[str], download: bool) -> None:
        self.reference, self.shards, self.download = reference, shards, download

    def identity(self) -> str:
        """A hash of the shards' names, and of the sizes of those that are files of the user's."""
        sizes = ("" if _WEB.match(shard) else Path(shard).stat().st_size for shard in self.shards)
        content = "\n".join(f"{shard}\t{size}" for shard, size in zip(self.shards, sizes, strict=True))
        return hashlib.sha256(content.encode()).hexdigest()

    def require(self, count: int, side: int) -> None:
        """Read the shards that hold the first ``count`` pictures, and look at captions and heads; fetch those on the web.

        Raises:
            WrongCommand: there are fewer, some have no caption, or a shard is to be fetched and there is no consent.
            DdilError: shards or pictures are damaged.
        """
        damaged, left_out = list[str](), list[str]()
        there = require_training(
            islice(self._pictures(damaged, left_out), count),
            side,
            self.reference,
            "put a .txt of its name beside each in its shard",
        )
        if left_out:
            warn_once(
                f"{len(left_out):,} pictures of {self.reference} are not read: {name_some(left_out)}; a sample has one picture, "
                f"of the endings {', '.join(PICTURES)}, and no dot in its name but that before the ending"
            )
        refuse_bad(damaged, "damaged", len(self.shards), self.reference, "shards")
        refuse_fewer(there, count, self.reference)

    def training(
        self, count: int, side: int, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See ``DataSet``. Raises as ``require``."""
        pictures = islice(self._pictures(), first * batch_size, count)
        return prepare_batches(pictures, side, batch_size, count, self.reference)

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` captions, to watch a run with. Raises WrongCommand where there are fewer."""
        found = [
            Prompt(picture.name, picture.caption) for picture in islice(self._pictures(), count) if picture.caption
        ]
        if len(found) < count:
            raise WrongCommand(f"{self.reference} has no {count:,} captions to begin with; ask for fewer")
        return found

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """Refused: shards are trained on, not compared with."""
        raise WrongCommand(f"the data set {self.reference!r} is for training; unpack the shards and name folder:DIR")

    def _pictures(self, damaged: list[str] | None = None, left_out: list[str] | None = None) -> Iterator[ShardImage]:
        """All samples; damaged shards are passed over where they are to be gathered in ``damaged``.

        The names of pictures that are not read are added to ``left_out``.
        """
        for shard in self.shards:
            try:
                yield from read_shard(self._here(shard), left_out)
            except DamagedShard:
                if damaged is None:
                    raise
                damaged.append(_place(shard).name)

    def _here(self, shard: str) -> Path:
        path = _place(shard)
        if not path.is_file() and _WEB.match(shard):
            if not self.download:
                raise WrongCommand(
                    f"the shard {shard} is not here, and nothing is fetched without consent; say --download, or fetch it by hand "
                    "and name the file"
                )
            fetch_shard(shard, path)
        return path


def open_shards(reference: str, download: bool = False) -> Shards:
    """``webdataset:PATTERN``; nothing is read or fetched yet.

    Raises:
        WrongCommand: the pattern is none, matches nothing, or names a command or what is neither a file nor on the web.
        DdilError: some of the files are missing.
    """
    try:
        named = expand_urls(reference.partition(":")[2])
    except (ValueError, AssertionError) as error:
        raise WrongCommand(
            f"the data set {reference!r} has no pattern ({error}); write it as in {EXAMPLE!r}"
        ) from error
    shards = list[str]()
    for shard in named:
        if _WEB.match(shard):
            shards.append(shard)
        elif _SCHEME.match(shard):
            raise WrongCommand(
                f"the shard {shard!r} is refused: shards are files or URLs of http and https, and no command is ever run"
            )
        else:
            shards += _files(user_path(shard, "the shard") if shard else Path())
    missing = [shard for shard in shards if not _WEB.match(shard) and not Path(shard).is_file()]
    if len(missing) == len(shards):
        raise WrongCommand(f"the data set {reference!r} matches no file; write it as in {EXAMPLE!r}")
    refuse_bad(missing, "missing", len(shards), reference, "shards")
    return Shards(reference, shards, download)


def _files(path: Path) -> list[str]:
    if not glob.has_magic(str(path)):
        return [str(path)]
    root = Path(path.anchor)
    return [str(found) for found in sorted(root.glob(str(path.relative_to(root))))]


def _place(shard: str) -> Path:
    """Where a shard lies: one on the web in the user's folder, under a hash of its URL."""
    if not _WEB.match(shard):
        return Path(shard)
    name = re.sub(r"[^\w.-]", "_", shard.partition("?")[0].rpartition("/")[2])
    return user_folder() / "shards" / f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{name}"


def fetch_shard(url: str, path: Path) -> None:
    """Fetch a shard, with a bar on stderr; it has its name once it is whole.

    Raises:
        DdilError: it cannot be reached, breaks off, or there is no room.
    """
    require_cache()
    with waiting_for(path.parent):
        if path.is_file():
            return  # another command has fetched it meanwhile
        with replacing(path) as temporary, temporary.open("wb") as file:
            for block in _received(url):
                file.write(block)


def _received(url: str) -> Iterator[bytes]:
    """The content of a URL, block by block, with a bar. Raises DdilError where it cannot be reached or breaks off."""
    done = 0
    try:
        with urlopen(url, timeout=_SILENCE) as source:
            length = int(source.headers.get("Content-Length") or 0)
            with transfer(f"fetch {url}", length) as advance:
                while block := source.read(1 << 20):
                    yield block
                    done += len(block)
                    advance(len(block))
        if length not in (0, done):
            raise OSError(f"it broke off after {done:,} of {length:,} bytes")
    except (OSError, HTTPException, ValueError) as error:
        raise DdilError(
            f"the shard {url} could not be fetched ({getattr(error, 'reason', error)}); check the URL and run the command again"
        ) from error
