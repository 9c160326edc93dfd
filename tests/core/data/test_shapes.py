"""Batches of the shapes world depend on (split, seed, index) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddil_core.data.shapes import ShapesData
from ddil_core.shapes.batches import draw_batch, to_pixels
from ddil_core.shapes.render import render
from ddil_core.shapes.scene import is_held_out, parse_caption


def test_a_batch_depends_on_split_seed_and_index_alone() -> None:
    kept = draw_batch(6, 3, seed=1)
    np.random.default_rng(99).random(1000)
    draw_batch(6, 2, seed=1)
    again = draw_batch(6, 3, seed=1)
    assert again.images.tobytes() == kept.images.tobytes() and again.captions == kept.captions
    others = [draw_batch(6, 4, seed=1), draw_batch(6, 3, seed=2), draw_batch(6, 3, seed=1, split="validation")]
    assert all(other.captions != kept.captions for other in others)


def test_a_smaller_batch_is_the_beginning_of_a_larger_one() -> None:
    assert draw_batch(4, 0).captions == draw_batch(9, 0).captions[:4]


def test_the_batch_shows_its_scenes() -> None:
    batch = draw_batch(5, 0)
    assert (batch.images.shape, batch.images.dtype) == ((5, 64, 64, 3), np.uint8)
    for image, scene in zip(batch.images, batch.scenes, strict=True):
        assert image.tobytes() == render(scene).tobytes()


def test_pixels_are_the_images_scaled() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images[0, 0, 0] = (0, 255, 128)
    pixels = to_pixels(images)
    assert (pixels.shape, pixels.dtype) == ((3, 3, 64, 64), torch.float32)
    assert pixels[0, :2, 0, 0].tolist() == [-1.0, 1.0]
    np.testing.assert_array_equal(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), images)


def test_the_data_set_trains_on_one_split_and_evaluates_on_the_other() -> None:
    data = ShapesData()
    images, captions = data.batch(16, 0)
    assert len(images) == len(captions) == 16
    assert not any(is_held_out(parse_caption(caption)) for caption in captions)
    prompts = data.prompts(16)
    assert all(is_held_out(parse_caption(prompt.text)) for prompt in prompts)
    assert [prompt.id for prompt in prompts[:2]] == ["shapes-validation-00000", "shapes-validation-00001"]


def test_prompts_and_images_keep_their_order_whatever_is_asked_for() -> None:
    data = ShapesData()
    assert data.prompts(3) == data.prompts(7)[:3]
    whole, parts = (np.concatenate(list(data.images(7, size))) for size in (64, 3))
    np.testing.assert_array_equal(whole, parts)
    for index, prompt in enumerate(data.prompts(7)):
        scene = data.scene(index)
        assert scene.meaning.caption == prompt.text
        np.testing.assert_array_equal(whole[index], render(scene))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(KeyError):
        draw_batch(1, 0, split="test")
