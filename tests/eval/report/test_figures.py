"""Figures keep the pixels and show whole captions. The same input gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.support.errors import DdilError
from ddil_eval.report import figures
from tests.records import p_teacher, record, system

PROMPT = "a small red circle left of a large blue striped star above a $5 sign on a grey background"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def holds(canvas: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the canvas contains the image, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(canvas, picture.shape)[:, :, 0]
    corner = (windows[:, :, 0, 0] == picture[0, 0]).all(-1)
    return any((windows[y, x] == picture).all() for y, x in np.argwhere(corner))


def test_a_grid_holds_every_picture_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16, 3), dtype=np.uint8)
    canvas = pixels(
        figures.image_grid(images, [PROMPT, "short"], ["student only", "at 749", "x"], tmp_path / "g.png", cell=40)
    )
    for picture in images.reshape(-1, 16, 16, 3):
        assert holds(canvas, picture.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("row", [PROMPT, PROMPT * 4, "W" * 60], ids=["prompt", "long prompt", "long word"])
@pytest.mark.parametrize("column", ["teacher → student at 749", "W" * 40], ids=["words", "long word"])
def test_captions_are_not_cut_off(tmp_path: Path, row: str, column: str) -> None:
    images = np.full((1, 2, 8, 8, 3), 255, np.uint8)
    canvas = pixels(figures.image_grid(images, [row], [column, column], tmp_path / "g.png"))
    assert (canvas < 128).any()  # the captions are all that is dark here
    edges = (canvas[:2], canvas[-2:], canvas[:, :2], canvas[:, -2:])
    assert all((edge == 255).all() for edge in edges)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 8, 8, 3), (1, 1, 8, 8, 1)])
def test_pictures_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be|do not fit"):
        figures.image_grid(np.zeros(shape, np.uint8), ["a"], ["b"], tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []


def test_curves_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    records = [p_teacher(p, fd=20 - 5 * p) for p in (0.8, 0.6, 0.4, 0.2)]
    records += [record({"kind": "teacher_then_student", "switch_t": t}) for t in (749, 500, 250)]
    records += [record({"kind": "pure", "model": model}) for model in ("teacher", "student")]
    first, second = (figures.shift_curves(records, tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    colours = {tuple(colour) for colour in pixels(first).reshape(-1, 3)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x44, 0x44, 0x44)} <= colours  # teacher, student, mixed


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        DdilError, match=r"^No record of a covariate-shift analysis can be drawn in .+a\.png: run `ddil eval"
    ):
        figures.shift_curves([system("PD", 4)], tmp_path / "a.png")
