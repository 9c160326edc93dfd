"""WebDataset shards: which samples come in which order, what is never read or run, and what is bad is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from ddil_core.data.base import Prompt
from ddil_core.data.captioned import prepare_image
from ddil_core.data.datasets import open_data
from ddil_core.support.checksums import sha256
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.resources import user_folder
from tests.coco import photograph
from tests.shards import picture, save_shard, save_shards

EXAMPLE = "'webdataset:/data/train-{000000..000099}.tar'"


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three shards of four images."""
    return save_shards(tmp_path)


def captions(reference: str, count: int) -> list[str]:
    return [caption for _, some in open_data(reference).training(count, 32) for caption in some]


def refused(reference: str, count: int = 12, kind: type[DdilError] = DdilError, download: bool = False) -> str:
    with pytest.raises(kind) as error:
        open_data(reference, download).require(count, 32)
    assert "\n" not in str(error.value)
    return str(error.value)


# Samples


def test_samples_come_in_the_order_of_the_shards_and_prepared(shards: str) -> None:
    data = open_data(shards)
    data.require(10, 32)
    batches = list(data.training(10, 32, batch_size=4))
    assert [some for _, some in batches] == [
        [f"picture {place}" for place in places] for places in (range(4), range(4, 8), range(8, 10))
    ]
    for place, image in enumerate(np.concatenate([images for images, _ in batches])):
        assert np.array_equal(image, prepare_image(photograph(place), 32))
    assert data.prompts(2) == [Prompt("train-0.tar/0000.png", "picture 0"), Prompt("train-0.tar/0001.png", "picture 1")]


def test_a_batch_depends_on_its_index_alone(shards: str) -> None:
    """A restart in the middle of a shard, and another count, change nothing."""
    whole = list(open_data(shards).training(12, 32, batch_size=3))
    data = open_data(shards)
    for first, count in ((3, 12), (1, 12), (2, 9), (0, 6)):
        found = list(data.training(count, 32, batch_size=3, first=first))
        assert [some for _, some in found] == [some for _, some in whole[first : count // 3]]
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, whole[first:], strict=False))


def test_images_and_captions_of_every_kind(tmp_path: Path) -> None:
    samples = [
        {"jpg": picture(0, "JPEG"), "json": json.dumps({"caption": " a\ncat ", "url": "x"}).encode()},
        {"webp": picture(1, "WEBP"), "txt": "\ufeffa café".encode()},
        {"JPEG": picture(2, "JPEG"), "txt": b"text first", "json": b'{"caption": "not this"}'},
        {"txt": b"a caption without a picture"},
        {"seg.png": picture(3), "png": picture(3), "txt": b"not the mask"},
    ]
    save_shard(tmp_path / "a.tar", samples)
    assert captions(f"webdataset:{tmp_path}/a.tar", 4) == ["a cat", "a café", "text first", "not the mask"]


def test_compressed_shards_read(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.tar.gz", [{"png": picture(0), "txt": b"a"}])
    assert captions(f"webdataset:{tmp_path}/a.tar.gz", 1) == ["a"]


class Mine:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_but_images_and_text_is_decoded(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    bad = pickle.dumps(Mine(proof))
    sample = dict.fromkeys(("pyd", "pkl", "pickle", "pth", "npy", "npz", "cbor", "cls"), bad)
    save_shard(tmp_path / "a.tar", [sample | {"png": picture(0), "txt": b"a"}])
    assert captions(f"webdataset:{tmp_path}/a.tar", 1) == ["a"]
    assert not proof.exists()
    pickle.loads(bad)
    assert proof.is_dir()  # it would have


def test_an_image_that_pillow_would_hand_to_another_program_is_none(tmp_path: Path) -> None:
    with io.BytesIO() as file:
        Image.new("RGB", (64, 64)).save(file, format="EPS")
        save_shard(tmp_path / "a.tar", [{"jpg": file.getvalue(), "txt": b"a"}])
    assert refused(f"webdataset:{tmp_path}/a.tar", 1) == (
        f"1 of 1 images of webdataset:{tmp_path}/a.tar are damaged: a.tar/0000.jpg; fetch or make them again"
    )


def test_links_and_sparse_files_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        caption = tarfile.TarInfo("0.txt")
        caption.size = 1
        tar.addfile(caption, io.BytesIO(b"a"))
    assert refused(f"webdataset:{tmp_path}/a.tar", 1) == f"webdataset:{tmp_path}/a.tar holds no images to train on"


# Patterns


def test_patterns_with_braces_and_with_stars(shards: str, tmp_path: Path) -> None:
    every = [f"picture {place}" for place in range(12)]
    assert captions(shards, 12) == every
    assert captions(f"webdataset:{tmp_path}/train-*.tar", 12) == every
    assert captions(f"webdataset:{tmp_path}/train-?.tar", 12) == every
    assert captions(f"webdataset:{tmp_path}/train-{{2,0}}.tar", 8) == every[8:] + every[:4]


@pytest.mark.parametrize("pattern", ["", "train.tar", "*.tar", "{0..3}.tar", "none/*.tar"])
def test_a_pattern_that_matches_nothing(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for reference in (f"webdataset:{pattern}", f"webdataset:{tmp_path}/{pattern}"):
        assert refused(reference, kind=WrongCommand) == (
            f"the data set {reference!r} matches no file; write it as in {EXAMPLE}"
        )


def test_a_pattern_that_is_none() -> None:
    for pattern in ("{0..3.tar", "${NOWHERE}/a.tar"):
        message = refused(f"webdataset:{pattern}", kind=WrongCommand)
        assert message.startswith(f"the data set 'webdataset:{pattern}' has no pattern (")
        assert message.endswith(f"); write it as in {EXAMPLE}")


def test_missing_shards_are_named(shards: str, tmp_path: Path) -> None:
    (tmp_path / "train-1.tar").unlink()
    assert refused(shards) == (
        f"1 of 3 shards of {shards} are missing: {tmp_path}/train-1.tar; fetch or make them again"
    )


@pytest.mark.parametrize("shard", ["pipe:touch proof", "s3://bucket/a.tar", "file:/etc/passwd", "gs://b/a.tar"])
def test_commands_and_other_places_are_refused(shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(f"webdataset:{shard}", kind=WrongCommand, download=True) == (
        f"the shard {shard!r} is refused: name a file or a URL of http or https; commands are never run"
    )
    assert list(tmp_path.iterdir()) == []


# Faults


def test_too_few_images(shards: str) -> None:
    assert refused(shards, 13, WrongCommand) == (
        f"{shards} has 12 images to train on, fewer than the pool of 13; add others, or say --set pool=12"
    )


def test_images_without_captions_are_named(tmp_path: Path) -> None:
    silent = [
        {},
        {"txt": b" "},
        {"txt": "\ufeff\u200b".encode()},
        {"json": b'{"caption": null}'},
        {"json": b'{"caption": "\\u00a0"}'},
        {"json": b'{"a": 1}'},
    ]
    save_shard(tmp_path / "a.tar", [{"png": picture(0), "txt": b"a"}, *({"png": picture(1)} | more for more in silent)])
    reference = f"webdataset:{tmp_path}/a.tar"
    assert refused(reference, 7, WrongCommand) == (
        f"6 of 7 images of {reference} have no caption: a.tar/0001.png, a.tar/0002.png, a.tar/0003.png, a.tar/0004.png, "
        "a.tar/0005.png and 1 more; add a .txt of the same name to the shard for each, or leave them out"
    )


def test_damaged_images_are_named(tmp_path: Path) -> None:
    whole = picture(2)
    save_shard(
        tmp_path / "a.tar",
        [
            {"png": content, "txt": b"a"}
            for content in (picture(0), b"no picture", picture(1), whole[: len(whole) // 2])
        ],
    )
    reference = f"webdataset:{tmp_path}/a.tar"
    assert refused(reference, 4) == (
        f"1 of 4 images of {reference} are damaged: a.tar/0001.png; fetch or make them again"
    )
    with pytest.raises(DdilError) as error:
        list(open_data(reference).training(4, 32))
    assert str(error.value) == (
        f"2 of 4 images of {reference} are damaged: a.tar/0001.png, a.tar/0003.png; fetch or make them again"
    )


def ends(path: Path) -> list[int]:
    """Where the members of a shard begin, and where its end is marked."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar] + [tar.offset]


DAMAGE = {
    "in a picture": lambda content, at: content[: at[2] + 700],
    "between two members": lambda content, at: content[: at[2]],
    "in a header": lambda content, at: content[: at[2] + 100],
    "before its end": lambda content, at: content[: at[-1]],
    "a header overwritten": lambda content, at: content[: at[2]] + b"?" * 512 + content[at[2] + 512 :],
    "no tar": lambda content, at: b"no tar at all",
    "empty": lambda content, at: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named(damage: str, shards: str, tmp_path: Path) -> None:
    path = tmp_path / "train-1.tar"
    path.write_bytes(DAMAGE[damage](path.read_bytes(), ends(path)))
    open_data(shards).require(4, 32)  # they are in the first shard
    assert refused(shards) == f"1 of 3 shards of {shards} are damaged: train-1.tar; fetch or make them again"
    with pytest.raises(DdilError) as error:
        list(open_data(shards).training(12, 32))
    message = str(error.value)
    assert message.startswith(f"the shard {path} is damaged (") and message.endswith("); fetch or make it again")
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["beside it", "in SHA256SUMS"])
def test_a_shard_that_does_not_match_its_checksum_is_named(shards: str, tmp_path: Path, kind: str) -> None:
    """The flipped bit changes a caption, which nothing else would notice."""
    path = tmp_path / "train-1.tar"
    line = f"{sha256(path)} *train-1.tar\n" if kind == "in SHA256SUMS" else f"{sha256(path)}  train-1.tar\n"
    (tmp_path / ("SHA256SUMS" if kind == "in SHA256SUMS" else "train-1.tar.sha256")).write_text(line)
    assert captions(shards, 12)[5] == "picture 5"
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"picture\n5", b"picture\n4"))
    assert refused(shards) == f"1 of 3 shards of {shards} are damaged: train-1.tar; fetch or make them again"
    with pytest.raises(DdilError, match="the shard .*train-1.tar does not match its checksum .*; fetch or make it aga"):
        captions(shards, 12)
    assert captions(shards, 4) == [f"picture {place}" for place in range(4)]  # that shard is not read
    path.write_bytes(sound)
    for listed in (tmp_path / "SHA256SUMS", tmp_path / "train-1.tar.sha256"):
        if listed.exists():
            listed.write_text(line.replace(sha256(path), sha256(path).upper()))  # as PowerShell writes it
    assert captions(shards, 12)[5] == "picture 5"


def test_a_name_twice_in_a_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("0.txt")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"a"))
    with pytest.raises(DdilError) as error:
        captions(f"webdataset:{tmp_path}/a.tar", 1)
    assert str(error.value).startswith(
        f"the shard {tmp_path}/a.tar is damaged (0.txt: duplicate file name in tar file txt"
    )


def test_shards_are_not_compared_with(shards: str) -> None:
    with pytest.raises(WrongCommand) as error:
        open_data(shards).images(3)
    assert str(error.value) == f"the data set {shards!r} is for training; unpack the shards and name folder:DIR"


# On the web


class Server(SimpleHTTPRequestHandler):
    """Serves a folder without a word; of ``short-…`` it promises more bytes than it sends."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/short-"):
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 1))
            self.end_headers()
            self.wfile.write(content)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        return None


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the folder with the shards; what is fetched lies in ``cache``."""
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Server, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_fetched_without_consent(shards: str, web: str) -> None:
    assert refused(f"webdataset:{web}/train-{{0..2}}.tar", kind=WrongCommand) == (
        f"the shard {web}/train-0.tar is not here, and nothing is fetched without consent; say --download, or fetch it by hand "
        "and name the file"
    )
    assert Server.asked == []


def test_shards_that_are_needed_are_fetched_once_and_kept(shards: str, web: str) -> None:
    reference = f"webdataset:{web}/train-{{0..2}}.tar"
    data = open_data(reference, download=True)
    data.require(8, 32)
    assert Server.asked == ["/train-0.tar", "/train-1.tar"]  # the third is not needed
    identity = data.identity()
    assert captions(reference, 8) == [f"picture {place}" for place in range(8)]  # without consent: they are here
    data.require(12, 32)
    assert Server.asked == ["/train-0.tar", "/train-1.tar", "/train-2.tar"]
    assert data.identity() == identity != open_data(shards).identity()
    assert len(list((user_folder() / "shards").glob("*.tar"))) == 3


def test_shards_that_cannot_be_fetched(shards: str, web: str, tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").rename(tmp_path / "short-0.tar")
    size = (tmp_path / "short-0.tar").stat().st_size
    for name, reason in (
        ("none.tar", "File not found"),
        ("short-0.tar", f"the download broke off after {size:,} of {size + 1:,} bytes"),
    ):
        assert refused(f"webdataset:{web}/{name}", download=True) == (
            f"the shard {web}/{name} could not be fetched ({reason}); check the URL and run the command again"
        )
        assert list((user_folder() / "shards").glob("*")) == []
    assert refused("webdataset:http://127.0.0.1:9/a.tar", download=True).startswith(
        "the shard http://127.0.0.1:9/a.tar could not be fetched ("
    )
