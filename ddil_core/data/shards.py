"""WebDataset shards for training, ``webdataset:PATTERN``: .tar files of images with captions, local or on the web.

A sample is an image (.jpg, .jpeg, .png, .webp) and a caption of the same name: a .txt in UTF-8, or a .json with a
"caption". A name ends at its first dot, as in the library ``webdataset``, so ``img_1.5.png`` is not read.
Other files of a shard are never read. Pillow decodes the images; pickles, arrays and code are never loaded.

A shard may have its SHA-256 in NAME.sha256 beside it or in a line of SHA256SUMS in its folder, as the command
``sha256sum`` writes both. It is compared once in a run. A downloaded shard has one.

PATTERN is a path or an http(s) URL with braces, which the library expands, or a path with ``*`` and ``?``. Commands
(``pipe:``) are refused. With the user's consent, shards on the web are downloaded whole into the user's folder.
"""

from __future__ import annotations

import glob
import hashlib
import io
import lzma
import math
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys

from ddil_core.data.base import Prompt, Side
from ddil_core.data.captioned import name_some, prepare_batches, refuse_bad, refuse_fewer, require_training
from ddil_core.data.captions import CAPTION_FILE, caption_of, decode, parse_json, read_text
from ddil_core.data.folder import ENDINGS, OTHER_ENDINGS
from ddil_core.data.images import Head, read_head, read_rgb
from ddil_core.data.shard_download import fetch_shard
from ddil_core.support.checksums import Damaged, require_checksum, sha256
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.outside import MEGABYTE, require_regular, size_words
from ddil_core.support.paths import shown, user_path
from ddil_core.support.progress import warn_once
from ddil_core.support.resources import user_folder
from ddil_core.support.text import require_text

IMAGES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
CAPTIONS = ("txt", "json")
LONGEST_PATTERN = 10_000
"""The most characters of a pattern."""
EXAMPLE = "webdataset:/data/train-{000000..000099}.tar"

MOST_SHARDS = 100_000
"""The most shards of a pattern."""
LARGEST_IMAGE = 200 * MEGABYTE
"""The largest file of an image in a shard."""
EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
"""The kinds of extended headers of a tar file."""
LARGEST_HEADER = MEGABYTE
"""The largest extended header of a tar file, which tarfile reads into memory."""
MOST_GROWTH = 100
"""The most that a compressed shard may grow. Images and captions hardly shrink."""

SUMS = "SHA256SUMS"
"""A file with the checksums of the shards beside it."""

_WEB = re.compile(r"https?://", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)


class _Member(tarfile.TarInfo):
    """A header of a tar file, which refuses an extended header that would fill the memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in EXTENDED and self.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header is larger than {size_words(LARGEST_HEADER)}")
        return super()._proc_member(archive)  # type: ignore[misc]  # the entry point for subclasses


class DamagedShard(DdilError):
    """A shard is not a complete tar file."""


@dataclass(frozen=True)
class ShardImage:
    """A sample of a shard: the image file's bytes, and the cleaned caption or None."""

    name: str
    content: bytes
    caption: str | None

    def head(self) -> Head:
        """See ``read_head``."""
        return read_head(io.BytesIO(self.content), FORMATS)

    def read(self) -> np.ndarray:
        """Return uint8 [H, W, 3]; see ``read_rgb``."""
        return read_rgb(io.BytesIO(self.content), self.name, FORMATS)


def read_shard(path: Path, ignored: list[str] | None = None) -> Iterator[ShardImage]:
    """Yield the samples of a shard, in their order. A sample without an image is skipped.

    The names of images that are not read are appended to ``ignored``.

    Raises:
        DamagedShard: the file is not a tar file, is incomplete, or is damaged.
        WrongCommand: a name or a caption is not a text.
    """
    ignored = [] if ignored is None else ignored
    try:
        for sample in group_by_keys(_members(path, ignored)):
            name, kinds = f"{path.name}/{sample['__key__']}", [kind for kind in IMAGES if kind in sample]
            ignored += [f"{name}.{kind}" for kind in kinds[1:]]
            if kinds:
                require_text(name, f"the name {name!r} of an image")
                yield ShardImage(f"{name}.{kinds[0]}", sample[kinds[0]], _caption(sample, name))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = str(error.args[0] if type(error) is ValueError else error).partition("\n")[0].rstrip(":")
        raise DamagedShard(f"the shard {path} is damaged ({reason}); fetch or make it again") from error


def require_listed(path: Path) -> None:
    """Compare a shard with its SHA-256, in NAME.sha256 or in SHA256SUMS. A shard without one passes.

    Raises:
        DamagedShard: it has another SHA-256.
    """
    sums, cure = path.with_name(SUMS), "fetch or make it again"
    try:
        if require_checksum(path, "the shard", cure) or not sums.is_file():
            return
        line = re.compile(rf"^([0-9a-fA-F]{{64}}) [ *](?:\./)?{re.escape(path.name)}\r?$", re.MULTILINE)
        digests = [digest.lower() for digest in line.findall(read_text(sums))]
    except (Damaged, OSError, ValueError) as error:
        raise DamagedShard(str(error)) from error
    if digests and sha256(path) not in digests:
        raise DamagedShard(f"the shard {path} does not match its checksum in {SUMS}; {cure}")


def _members(path: Path, ignored: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the images and captions of a shard for ``group_by_keys``; append the names of other images to ``ignored``.

    The library's own reader raises no error where a shard is cut between two files or a header is damaged.
    """
    require_regular(path)
    most = MOST_GROWTH * (path.stat().st_size + MEGABYTE)
    with tarfile.open(path, tarinfo=_Member) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            kind = base_plus_ext(member.name)[1] or ""
            largest = CAPTION_FILE if kind.lower() in CAPTIONS else LARGEST_IMAGE
            if kind.lower() in (*IMAGES, *CAPTIONS) and member.size > largest:
                raise tarfile.ReadError(f"its file {shown(member.name)} is larger than {size_words(largest)}")
            if member.offset_data + member.size > most:
                raise tarfile.ReadError(f"it grows to more than {MOST_GROWTH} times its size")
            file = tar.extractfile(member) if member.isfile() and not member.issparse() else None
            if file is not None and kind.lower() in (*IMAGES, *CAPTIONS):
                yield {"fname": member.name, "data": file.read(), "__url__": str(path)}
            elif member.isfile() and Path(member.name).suffix.lower() in (*ENDINGS, *OTHER_ENDINGS):
                ignored.append(f"{path.name}/{member.name}")
        end = tar.fileobj
        assert end is not None
        end.seek(tar.offset)
        if end.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the tar file's end is missing")


def _caption(sample: dict[str, Any], name: str) -> str | None:
    """Return the caption in the sample's .txt, or else in its .json. Raises WrongCommand: it is not a text."""
    for kind, read in (("txt", decode), ("json", _json_caption)):
        if kind in sample:
            where = f"the caption {name}.{kind}"
            try:
                caption = caption_of(read(sample[kind]), where)
            except ValueError as error:
                raise WrongCommand(f"{where} cannot be read in UTF-8: {error}; write it again") from error
            if caption is not None:
                return caption
    return None


def _json_caption(content: bytes) -> object:
    """Return the "caption" of a .json file. Raises ValueError: the file is not a JSON object."""
    values = parse_json(decode(content))
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values.get("caption")


class Shards:
    """A ``ddil_core.data.base.DataSet`` in shards, for training. The samples are not shuffled."""

    split = "all"
    side: int | None = None

    def __init__(self, reference: str, shards: list[str], download: bool) -> None:
        self.reference, self.shards, self.download = reference, shards, download
        self._sound = set[Path]()

    def identity(self) -> str:
        """Return a hash of the shards' names, and of the sizes of the local shards."""
        sizes = ("" if _WEB.match(shard) else Path(shard).stat().st_size for shard in self.shards)
        content = "\n".join(f"{shard}\t{size}" for shard, size in zip(self.shards, sizes, strict=True))
        return hashlib.sha256(content.encode()).hexdigest()

    def require(self, count: int, side: Side) -> None:
        """Read the shards that hold the first ``count`` images, and check heads and captions. Download missing shards.

        Raises:
            WrongCommand: there are too few images, an image has no caption, or a shard is missing and downloads are not
                allowed.
            DdilError: shards or images are damaged.
        """
        damaged, ignored = list[str](), list[str]()
        images = islice(self._images(damaged, ignored), count)
        available = require_training(images, side, self.reference, "add a .txt of the same name to the shard for each")
        if ignored:
            warn_once(
                f"{len(ignored):,} images of {self.reference} are not read: {name_some(ignored)}; a sample has one "
                f"image with an ending of {', '.join(IMAGES)}, and its name has no other dot"
            )
        refuse_bad(damaged, "damaged", len(self.shards), self.reference, "shards")
        refuse_fewer(available, count, self.reference)

    def training(
        self, count: int, side: Side, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See ``DataSet``. Raises as ``require``."""
        images = islice(self._images(), first * batch_size, count)
        return prepare_batches(images, side, batch_size, count, self.reference)

    def endless(self, first: int, counts: dict[str, int]) -> Iterator[ShardImage]:
        """Yield the images from number ``first`` on, and after the last one the first again, without end.

        Args:
            first: The number of the first image, counted over all rounds.
            counts: The number of images of each shard, as far as it is known; such shards are skipped unread. The
                number of each shard that is read to its end is added.

        Raises:
            WrongCommand: an image has no caption, or the shards hold no images.
        """
        place = 0
        while True:
            begun = place
            for shard in self.shards:
                if place + counts.get(shard, 0) <= first and shard in counts:
                    place += counts[shard]
                    continue
                number = 0
                for number, image in enumerate(read_shard(self._compared(shard)), 1):
                    if place + number <= first:
                        continue
                    if image.caption is None:
                        raise WrongCommand(f"the image {image.name} of {self.reference} has no caption; add one")
                    yield image
                counts[shard] = number
                place += number
            if place == begun:
                raise WrongCommand(f"{self.reference} holds no images to train on")

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first ``count`` captions as prompts, to watch a run. Raises WrongCommand where there are fewer."""
        images = islice(self._images(), count)
        prompts = [Prompt(image.name, image.caption) for image in images if image.caption]
        if len(prompts) < count:
            raise WrongCommand(
                f"the first {count:,} images of {self.reference} have {len(prompts):,} captions; ask for fewer prompts"
            )
        return prompts

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        """Refuse: shards have no evaluation split. Raises WrongCommand."""
        raise WrongCommand(f"the data set {self.reference!r} is for training; unpack the shards and name folder:DIR")

    def _images(self, damaged: list[str] | None = None, ignored: list[str] | None = None) -> Iterator[ShardImage]:
        """Yield all samples.

        The names of damaged shards are appended to ``damaged``; without that list the first one is an error. The names
        of images that are not read are appended to ``ignored``.
        """
        for shard in self.shards:
            try:
                yield from read_shard(self._compared(shard), ignored)
            except DamagedShard:
                if damaged is None:
                    raise
                damaged.append(_place(shard).name)

    def _compared(self, shard: str) -> Path:
        """Return a shard's local file, which is compared with its checksum once. Raises as ``require_listed``."""
        path = self._local(shard)
        if path not in self._sound:
            require_listed(path)
            self._sound.add(path)
        return path

    def _local(self, shard: str) -> Path:
        """Return a shard's local file; download the shard where it is missing. Raises WrongCommand without consent."""
        path = _place(shard)
        if not path.is_file() and _WEB.match(shard):
            if not self.download:
                raise WrongCommand(
                    f"the shard {shard} is not here, and nothing is fetched without consent; say --download, or fetch "
                    "it by hand and name the file"
                )
            fetch_shard(shard, path)
        return path


def open_shards(reference: str, download: bool = False) -> Shards:
    """Open ``webdataset:PATTERN``. Nothing is read or downloaded yet.

    Raises:
        WrongCommand: the pattern is empty, matches no file, or names a command or another kind of URL.
        DdilError: some of the files are missing.
    """
    pattern = reference.partition(":")[2]
    if _count_shards(pattern) > MOST_SHARDS:
        raise WrongCommand(f"the data set {shown(reference)} names more than {MOST_SHARDS:,} shards; name fewer")
    try:
        named = expand_urls(pattern)
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
                f"the shard {shard!r} is refused: name a file or a URL of http or https; commands are never run"
            )
        else:
            shards += _files(user_path(shard, "the shard") if shard else Path())
    missing = [shard for shard in shards if not _WEB.match(shard) and not Path(shard).is_file()]
    if len(missing) == len(shards):
        raise WrongCommand(f"the data set {reference!r} matches no file; write it as in {EXAMPLE!r}")
    refuse_bad(missing, "missing", len(shards), reference, "shards")
    return Shards(reference, shards, download)


def _count_shards(pattern: str) -> float:
    """Return an upper bound of the number of names in a pattern with braces, without expanding it."""
    if len(pattern) > LONGEST_PATTERN:
        return math.inf
    count, innermost = float(pattern.count("::") + 1), re.compile(r"\{([^{}]*)\}")
    while braces := innermost.search(pattern):
        ends = re.fullmatch(r"(.+?)\.\.(.+?)(\.\..*)?", braces[1])
        if ends is None:
            count *= braces[1].count(",") + 1
        elif len(ends[1]) == len(ends[2]) == 1:  # letters, or digits
            count *= abs(ord(ends[1]) - ord(ends[2])) + 1
        elif max(map(len, ends.groups(default=""))) > 18:
            return math.inf
        elif all(re.fullmatch(r"-?\d+", end, re.ASCII) for end in ends.groups()[:2]):
            count *= abs(int(ends[1]) - int(ends[2])) + 1
        pattern = pattern[: braces.start()] + "x" + pattern[braces.end() :]
    return count


def _files(path: Path) -> list[str]:
    if not glob.has_magic(str(path)):
        return [str(path)]
    root = Path(path.anchor)
    return [str(match) for match in sorted(root.glob(str(path.relative_to(root))))]


def _place(shard: str) -> Path:
    """Return the local path of a shard. A shard on the web lies in the user's folder under a hash of its URL."""
    if not _WEB.match(shard):
        return Path(shard)
    name = re.sub(r"[^\w.-]", "_", shard.partition("?")[0].rpartition("/")[2])
    return user_folder() / "shards" / f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{name}"
