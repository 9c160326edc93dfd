"""Images from outside as 8-bit RGB: what 16-bit grey, other modes and damage become, and that each change is said once."""

from __future__ import annotations

import contextlib
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddil_core.data.captioned import read_image, survey
from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles, read_folder
from ddil_core.data.images import BAD_IMAGE, read_head, read_rgb
from ddil_core.data.shards import read_shard
from ddil_core.support.errors import DdilError
from ddil_eval.experiments.image_sources import FolderImages, open_image_folder
from ddil_eval.experiments.reference_images import check_reference
from ddil_eval.experiments.targets import read_targets
from ddil_eval.features.recipes import load_recipe
from tests.shards import picture, save_shard

few = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RAMP = np.linspace(0, 65_535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
GREY = np.repeat(np.round(RAMP / 257).astype(np.uint8)[..., None], 3, axis=2)
"""``RAMP`` in 8 bits: 65,535 is white as 255 is."""


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format=format, **options)
        return file.getvalue()


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow itself writes of grey alone: uint16 [H, W, C]."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read(content: bytes) -> np.ndarray:
    return read_rgb(io.BytesIO(content), "it")


# 16 bits


def tiff16(order: str, white: int = 65_535) -> bytes:
    """An uncompressed TIFF of ``RAMP`` in one byte order, in which the number ``white`` is white and the other end black."""
    entries = [
        (256, 3, 32), (257, 3, 32), (258, 3, 16), (259, 3, 1), (262, 3, int(white > 0)), (273, 4, 8), (277, 3, 1), (278, 3, 32),
        (279, 4, 2048),
    ]  # fmt: skip
    pixels = (RAMP if white else 65_535 - RAMP).astype(f"{order}u2").tobytes()
    table = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value))
        for tag, kind, value in entries
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(entries)) + table + struct.pack(f"{order}I", 0)


DEEP_GREY = {
    "PNG": encoded(Image.fromarray(RAMP), "PNG"),
    "TIFF": encoded(Image.fromarray(RAMP), "TIFF"),
    "TIFF, big-endian": tiff16(">"),
    "TIFF, little-endian": tiff16("<"),
    "TIFF, white is 0": tiff16("<", white=0),
    "PGM": b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_16_bit_grey_is_scaled(kind: str) -> None:
    found = read(DEEP_GREY[kind])
    assert np.array_equal(found, GREY) and found.dtype == np.uint8
    assert found.mean() == pytest.approx(127.5, abs=0.1)  # Pillow's own conversion clips: 254.5
    assert read_head(io.BytesIO(DEEP_GREY[kind])).grey16


def test_16_bit_grey_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(DEEP_GREY["PNG"])
    (folder / "a.txt").write_text("a ramp")
    shard = save_shard(tmp_path / "a.tar", [{"png": DEEP_GREY["PNG"], "txt": b"a ramp"}])
    data = open_data(f"folder:{folder}")
    for found in (
        read_image(folder / "a.png"),
        next(iter(data.images(1)))[0],
        next(iter(data.training(1, 32)))[0][0],
        next(iter(open_data(f"webdataset:{shard}").training(1, 32)))[0][0],
        FolderImages(open_image_folder(folder, None)[0], 1)[0].images[0],
        read_targets(data, 1, 32).images[0],
    ):
        assert np.array_equal(found, GREY)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_keeps_its_upper_byte(channels: int) -> None:
    pixels = np.full((4, 4, channels), 0x12FF, np.uint16)
    content = png16(pixels)
    assert (read(content) == 0x12).all()
    head = read_head(io.BytesIO(content))
    assert head.deep_colour and not head.rgb and not head.grey16


@pytest.mark.parametrize("kind", ["I", "F"])
def test_grey_of_no_known_range_is_refused(kind: str, tmp_path: Path) -> None:
    values = RAMP.astype(np.int32) if kind == "I" else RAMP.astype(np.float32) / 65_535
    (tmp_path / "a.tif").write_bytes(encoded(Image.fromarray(values), "TIFF"))
    (tmp_path / "index.jsonl").write_text('{"file": "a.tif", "text": "a"}')
    data = open_data(f"folder:{tmp_path}")
    with pytest.raises(DdilError) as error:
        data.require(1, 32)
    assert str(error.value) == (
        f"1 of 1 images of folder:{tmp_path} are 32-bit or 12-bit grey, in which it is not known which number is white: "
        "a.tif; fetch or make them again"
    )
    with pytest.raises(DdilError) as error:
        read_image(tmp_path / "a.tif")
    assert str(error.value) == (
        f"the image {tmp_path / 'a.tif'} has Pillow's mode {kind!r}, in which it is not known which number is white; "
        "save it with 8 or 16 bits"
    )


# Other modes


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("CMYK", "TIFF")],
)
def test_other_modes_are_as_pillow_converts_them(mode: str, format: str) -> None:
    content = encoded(Image.fromarray(COLOURS).convert(mode), format)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(read(content), np.asarray(image.convert("RGB")))
        assert read_head(io.BytesIO(content)).rgb == (image.mode == "RGB")


def test_transparency_is_left_out_and_the_colour_stays() -> None:
    alpha = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    rgba = Image.fromarray(np.concatenate([COLOURS, alpha], axis=2))
    assert np.array_equal(read(encoded(rgba, "PNG")), COLOURS)
    palette = rgba.convert("RGB").quantize(16)
    see_through = encoded(palette, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(read(see_through), np.asarray(palette.convert("RGB")))
    assert all(read_head(io.BytesIO(content)).alpha for content in (encoded(rgba, "PNG"), see_through))
    assert read_head(io.BytesIO(encoded(Image.fromarray(COLOURS), "PNG", transparency=(0, 0, 0)))).alpha


def test_of_several_frames_the_first_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("WEBP", "PNG", "GIF"):
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert (read(content) == (255, 0, 0)).all()
        assert read_head(io.BytesIO(content)).animated


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert read(content).shape == (4, 8, 3)


# What is said


def mixed(folder: Path) -> Path:
    """Five images, of which reading changes four."""
    contents = {
        "0.png": encoded(Image.fromarray(COLOURS), "PNG"),
        "1.png": DEEP_GREY["PNG"],
        "2.png": png16(np.zeros((8, 8, 3), np.uint16)),
        "3.png": encoded(Image.new("RGBA", (8, 8)), "PNG"),
        "4.png": encoded(Image.new("RGB", (8, 8)), "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]),
    }  # fmt: skip
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(name)
    return folder


CHANGES = (
    "are not RGB and are converted: 1.png, 2.png, 3.png; 1 of 16-bit colour, cut to the upper 8 bits; 1 of 16-bit grey, scaled "
    "to 8 bits; 1 with several frames, of which the first is read; 1 with transparency, which is dropped"
)


def test_changes_are_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(f"folder:{mixed(tmp_path / 'mixed')}")
    sentence = f"warning: 3 of 5 images of {data.reference} {CHANGES}\n"
    data.require(5, 8)
    assert capsys.readouterr().err == sentence
    check_reference(data, 5, load_recipe("gigagan"), ["fd_efflite0"])
    assert capsys.readouterr().err == sentence
    assert isinstance(data, ImageFiles)
    survey(data.files[4:], "these").warn_of_changes()
    assert (
        capsys.readouterr().err == "warning: of 1 images of these: 1 with several frames, of which the first is read\n"
    )
    survey(data.files[:1], "these").warn_of_changes()
    assert capsys.readouterr().err == ""


def test_a_folder_to_be_scored_says_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mixed(tmp_path / "mixed")
    for name in ("1.png", "1.txt"):
        (folder / name).unlink()
    open_image_folder(folder, None)
    assert capsys.readouterr().err == (
        f"warning: 2 of 4 images of {folder} are not RGB and are converted: 2.png, 3.png; 1 of 16-bit colour, cut to the upper 8 "
        "bits; 1 with several frames, of which the first is read; 1 with transparency, which is dropped\n"
    )


def test_what_a_folder_holds_and_is_not_read_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Image.new("RGB", (8, 8))
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.png").mkdir()
    for name in ("img_1.5.png", "a.GIF", "b.gif", "c.tif", ".hidden.png", "more/deep/x.png"):
        small.save(tmp_path / name)
    (tmp_path / "._img_1.5.png").write_bytes(b"what macOS leaves")
    (tmp_path / "img_1.5.txt").write_text("a name with a dot")
    (tmp_path / "img_2.txt").write_text("no picture of this name")
    assert [(one.id, one.caption) for one in read_folder(tmp_path)] == [("img_1.5", "a name with a dot")]
    read_folder(tmp_path)  # said once
    assert capsys.readouterr().err == (
        f"warning: in the folder {tmp_path} these are not read: .gif files (2), .tif files (1), .txt files without an image (1), "
        "hidden files (2), subfolders with images (1)\n"
    )
    (tmp_path / "index.jsonl").write_text('{"file": "img_1.5.png"}\n{"file": "more/deep/x.png"}\n')
    (tmp_path / "metadata.csv").write_text("file_name\n")
    assert [one.id for one in read_folder(tmp_path)] == ["img_1.5", "x"]
    assert capsys.readouterr().err == (
        f"warning: in the folder {tmp_path} with the index index.jsonl these are not read: .txt files beside images of the index "
        "(1), hidden files (2), images that the index does not name (3), other indexes (1)\n"
    )


def test_what_a_shard_holds_and_is_not_read_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = save_shard(tmp_path / "a.tar", [{"png": picture(0), "jpg": picture(0, "JPEG"), "txt": b"a"}])
    with tarfile.open(shard, "a") as tar:
        for name in ("img_1.5.png", "img_1.5.txt", "b.gif", "c.npy"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"a"))
    data = open_data(f"webdataset:{shard}")
    with pytest.raises(DdilError):  # so that all of the shard is looked at
        data.require(2, 32)
    assert f"warning: 3 images of webdataset:{shard} are not read: " in (said := capsys.readouterr().err)
    assert all(f"a.tar/{name}" in said for name in ("0000.png", "img_1.5.png", "b.gif"))
    assert "a sample has one image with an ending of jpg, jpeg, png, webp, and its name has no other dot" in said


# Damage


SEEDS = [
    encoded(Image.fromarray(COLOURS), "PNG"), encoded(Image.fromarray(COLOURS), "JPEG"), encoded(Image.fromarray(COLOURS), "WEBP"),
    encoded(Image.fromarray(COLOURS), "BMP"), encoded(Image.fromarray(COLOURS), "GIF"), encoded(Image.fromarray(COLOURS), "TIFF"),
    DEEP_GREY["PGM"], DEEP_GREY["PNG"], tiff16("<"), encoded(Image.fromarray(COLOURS).convert("P"), "PNG", transparency=b"\1\2"),
]  # fmt: skip


@st.composite
def damaged(draw: Callable[..., object]) -> bytes:
    """An image's file with some bytes changed, and perhaps cut."""
    content = bytearray(draw(st.sampled_from(SEEDS)))  # type: ignore[call-overload]
    for place, value in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)):  # type: ignore[attr-defined]
        content[place % len(content)] = value
    return bytes(content[: draw(st.integers(1, len(content)))])  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore")
@few
@given(content=st.one_of(damaged(), st.binary(max_size=60)))
def test_any_bytes_are_an_image_or_one_sentence(content: bytes, tmp_path: Path) -> None:
    with contextlib.suppress(*BAD_IMAGE):
        read_head(io.BytesIO(content))
    try:
        image = read(content)
    except DdilError as error:
        assert "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    shard = save_shard(tmp_path / "a.tar", [{"png": content, "txt": b"a"}])
    (sample,) = read_shard(shard)
    try:
        sample.read()
    except DdilError as error:
        assert "\n" not in str(error)
