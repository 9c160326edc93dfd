"""Grids of images keep the pixels and show whole captions; many images wrap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.support import image_grids
from ddil_core.support.image_grids import LARGEST, image_grid, overview

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
    canvas = pixels(image_grid(images, [PROMPT, "short"], ["student only", "at 749", "x"], tmp_path / "g.png", cell=40))
    for picture in images.reshape(-1, 16, 16, 3):
        assert holds(canvas, picture.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("row", [PROMPT, PROMPT * 4, "W" * 60], ids=["prompt", "long prompt", "long word"])
@pytest.mark.parametrize("column", ["teacher → student at 749", "W" * 40], ids=["words", "long word"])
def test_captions_are_not_cut_off(tmp_path: Path, row: str, column: str) -> None:
    images = np.full((1, 2, 8, 8, 3), 255, np.uint8)
    canvas = pixels(image_grid(images, [row], [column, column], tmp_path / "g.png"))
    assert (canvas < 128).any()  # the captions are all that is dark here
    edges = (canvas[:2], canvas[-2:], canvas[:, :2], canvas[:, -2:])
    assert all((edge == 255).all() for edge in edges)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 8, 8, 3), (1, 1, 8, 8, 1)])
def test_pictures_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be|do not fit"):
        image_grid(np.zeros(shape, np.uint8), ["a"], ["b"], tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []


def packed(colours: np.ndarray) -> np.ndarray:
    """The colours uint8 [..., 3] as numbers."""
    return colours.astype(int) @ np.array([65536, 256, 1])


def marked(count: int, side: int = 8) -> np.ndarray:
    """uint8 [count, side, side, 3]: an image of its own colour for each place."""
    colours = np.random.default_rng(0).integers(0, 200, (count, 1, 1, 3), dtype=np.uint8)
    return np.broadcast_to(colours, (count, side, side, 3)).copy()


def test_few_prompts_have_a_row_each(tmp_path: Path) -> None:
    """The overview is the grid with numbered columns."""
    images = marked(6).reshape(2, 3, 8, 8, 3)
    assert overview(images, ["a", "b"], tmp_path / "a.png") == 6
    image_grid(images, ["a", "b"], ["no. 0", "no. 1", "no. 2"], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("prompts", "number"), [(9, 1), (40, 1), (1, 9), (3, 12)])
def test_many_images_wrap_and_all_of_them_are_shown(prompts: int, number: int, tmp_path: Path) -> None:
    images = marked(prompts * number)
    texts = [f"prompt {place}" for place in range(prompts)]
    shown = overview(images.reshape(prompts, number, 8, 8, 3), texts, tmp_path / "a.png")
    canvas = pixels(tmp_path / "a.png")
    assert shown == prompts * number
    assert 0.5 < canvas.shape[1] / canvas.shape[0] < 2
    assert set(packed(images[:, 0, 0]).tolist()) <= set(np.unique(packed(canvas)).tolist())


def test_images_keep_their_order_from_left_to_right(tmp_path: Path) -> None:
    images = marked(9)
    overview(images.reshape(9, 1, 8, 8, 3), [""] * 9, tmp_path / "a.png")
    canvas = pixels(tmp_path / "a.png")
    places = [np.argwhere((canvas == image[0, 0]).all(-1)).mean(0) for image in images]
    assert np.argsort([round(y) * canvas.shape[1] + x for y, x in places]).tolist() == list(range(9))


def test_images_beyond_the_most_are_left_out_and_large_ones_shrink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_grids, "MOST_IMAGES", 16)
    images = np.broadcast_to(np.uint8(90), (200, 1, 512, 384, 3))
    assert overview(images, [PROMPT * 9] * 200, tmp_path / "a.png") == 16
    canvas = pixels(tmp_path / "a.png")
    assert canvas.shape[1] < 5 * LARGEST and canvas.shape[0] < 8 * LARGEST  # 4 × 4, and captions of 6 lines
    assert (canvas[:12] == 255).all() and (canvas[-12:] == 255).all() and (canvas[:, -12:] == 255).all()
