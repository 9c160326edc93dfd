"""Batches of images, generated or read, each alone; kept images with their index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample
from ddil_core.models.generate import sample_images
from ddil_core.models.model import load_model
from ddil_core.models.sampling import Sampling
from ddil_core.support.checksums import MANIFEST
from ddil_core.support.compute import FP32
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import replacing
from ddil_eval.experiments.image_batches import ImageBatch
from ddil_eval.experiments.image_sources import (
    INDEX,
    ORIGIN,
    FolderImages,
    GeneratedImages,
    ImageOrigin,
    ImageWriter,
    open_image_folder,
    slug,
)
from tests.coco import photograph

SAMPLING = Sampling("ddim", 2, 1.0)
MADE_BY = ImageOrigin("a", "b" * 64, "ddim", (999, 500), 1.0, 2.0, 3, compute=FP32)


@pytest.fixture(scope="module")
def generated(student: Path) -> GeneratedImages:
    return GeneratedImages(load_model(str(student)), open_data("shapes").prompts(5), SAMPLING, seed=3, batch_size=2)


def test_batches_follow_the_order_of_the_prompts(generated: GeneratedImages) -> None:
    assert len(generated) == 3
    assert [(batch.start, len(batch.images)) for batch in generated] == [(0, 2), (2, 2), (4, 1)]
    assert [text for batch in generated for text in batch.captions] == [p.text for p in generated.prompts]


def test_a_batch_alone_has_the_images_of_one_draw_of_all(generated: GeneratedImages) -> None:
    prompts = generated.prompts
    whole = sample_images(generated.model, [Sample(p.id) for p in prompts], [p.text for p in prompts], SAMPLING, 3)
    assert np.abs(generated[1].images.astype(int) - whole[2:4]).max() <= 1
    assert np.abs(generated[2].images.astype(int) - whole[4:]).max() <= 1


def test_there_is_no_batch_beyond_the_last(generated: GeneratedImages) -> None:
    with pytest.raises(IndexError):
        generated[3]


def test_kept_images_are_read_back_unchanged(generated: GeneratedImages, tmp_path: Path) -> None:
    keeper = ImageWriter(tmp_path / "kept", MADE_BY, generated.prompts)
    batches = list(generated)
    for batch in batches:
        keeper.keep(batch)
    assert not (tmp_path / "kept" / INDEX).exists()  # not before all are there
    keeper.close()
    rows = [json.loads(line) for line in (tmp_path / "kept" / INDEX).read_text().splitlines()]
    assert rows[4] == {
        "id": generated.prompts[4].id,
        "file": "000004.png",
        "prompt": generated.prompts[4].text,
        "seed": 3,
    }
    saved = FolderImages(open_image_folder(tmp_path / "kept", None)[0], batch_size=3)
    assert np.array_equal(np.concatenate([b.images for b in saved]), np.concatenate([b.images for b in batches]))
    assert [prompt for batch in saved for prompt in batch.prompts] == list(generated.prompts)
    assert ImageOrigin.read(tmp_path / "kept") == MADE_BY


def test_a_flipped_bit_in_kept_images_is_found(generated: GeneratedImages, tmp_path: Path) -> None:
    """While they are made, a damaged image is made again. Later it is refused, and so are the files beside it."""
    writer = ImageWriter(tmp_path / "kept", MADE_BY, generated.prompts)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    batch = ImageBatch(0, lambda: images, generated.prompts)
    writer.keep(batch)
    image = tmp_path / "kept" / "000002.png"
    content = image.read_bytes()
    assert writer.has(0, 5)
    for place in range(len(content)):
        image.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert not writer.has(2, 1) and writer.has(0, 2)
    writer.keep(batch)
    writer.close()
    for name, place in {"000002.png": 50, INDEX: 7, ORIGIN: -5, MANIFEST: 0}.items():
        path = tmp_path / "kept" / name
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DdilError) as error:
            ImageOrigin.read(tmp_path / "kept")
            for _ in FolderImages(open_image_folder(tmp_path / "kept", None)[0], 8):
                pass
        assert "does not match its checksum in sha256.json" in str(error.value) or name == MANIFEST
        path.write_bytes(whole)
    assert len(list(FolderImages(open_image_folder(tmp_path / "kept", None)[0], 8))) == 1


def test_a_folder_of_other_images_is_left_alone(generated: GeneratedImages, tmp_path: Path) -> None:
    ImageWriter(tmp_path / "kept", MADE_BY, generated.prompts)
    ImageWriter(tmp_path / "kept", MADE_BY, generated.prompts)  # the same again goes on
    with pytest.raises(WrongCommand) as error:
        ImageWriter(tmp_path / "kept", ImageOrigin("another"), generated.prompts)
    assert str(error.value) == (
        f"the folder {tmp_path / 'kept'} holds images of another model, sampling or seed (reference is "
        f"{MADE_BY.reference!r} there, weights_sha256, solver is {MADE_BY.solver!r} there, grid is {list(MADE_BY.grid)} there, "
        f"guidance_scale is {MADE_BY.guidance_scale} there, nfe is {MADE_BY.nfe} there, seed is {MADE_BY.seed} there); "
        "choose another --out"
    )
    with pytest.raises(
        WrongCommand, match=r"another model, sampling or seed \(captions_sha256\); "
    ):  # other captions under the same ids
        ImageWriter(tmp_path / "kept", MADE_BY, [replace(prompt, text="another") for prompt in generated.prompts])
    keeper = ImageWriter(tmp_path / "kept", MADE_BY, generated.prompts)
    keeper.keep(ImageBatch(0, lambda: np.zeros((5, 8, 8, 3), np.uint8), generated.prompts))
    keeper.close()
    ImageWriter(tmp_path / "kept", MADE_BY, generated.prompts)
    assert not (tmp_path / "kept" / INDEX).exists() and not (tmp_path / "kept" / MANIFEST).exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("keep me")
    with pytest.raises(WrongCommand) as error:
        ImageWriter(tmp_path / "other", MADE_BY, generated.prompts)
    assert str(error.value) == (
        f"the folder {tmp_path / 'other'} is not empty and holds no kept images; choose another --out"
    )


def test_images_of_another_program_are_named_by_their_folder(tmp_path: Path) -> None:
    for place in range(3):
        Image.fromarray(photograph(2 * place)[:60, :60]).save(tmp_path / f"{place}.png")
    assert ImageOrigin.read(tmp_path) == ImageOrigin(str(tmp_path))
    assert [len(batch.images) for batch in FolderImages(open_image_folder(tmp_path, 2)[0], 8)] == [2]
    (tmp_path / ORIGIN).write_text("{")
    with pytest.raises(DdilError) as error:
        ImageOrigin.read(tmp_path)
    assert str(error.value) == f"the file {tmp_path / ORIGIN} is damaged; delete it to score the images without it"


def test_folders_that_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(WrongCommand) as error:
        open_image_folder(tmp_path / "none", None)
    assert str(error.value) == f"there is no folder {tmp_path / 'none'} with images to score"
    Image.fromarray(photograph(0)[:40, :50]).save(tmp_path / "a.png")
    with pytest.raises(WrongCommand) as error:
        open_image_folder(tmp_path, 2)
    assert str(error.value) == (
        f"the folder {tmp_path} has 1 images, fewer than the 2 asked for; add images, or ask for fewer"
    )


def test_images_of_several_sizes_are_read_as_they_are(tmp_path: Path) -> None:
    """A batch of one size is one array, another one a list."""
    for place, (height, width) in enumerate([(40, 50), (50, 50), (50, 50)]):
        Image.fromarray(photograph(0)[:height, :width]).save(tmp_path / f"{place}.png")
    files, surveyed = open_image_folder(tmp_path, None)
    assert surveyed.sizes == {(50, 40): "0.png", (50, 50): "1.png"}
    first, second = FolderImages(files, 2)
    assert isinstance(first.images, list) and [image.shape for image in first.images] == [(40, 50, 3), (50, 50, 3)]
    assert isinstance(second.images, np.ndarray) and second.images.shape == (1, 50, 50, 3)


def test_a_name_becomes_the_name_of_a_folder() -> None:
    assert [slug(name) for name in ("PD + DDIL (4-step)", "runs/a", "…")] == ["PD-DDIL-4-step", "runs-a", "pictures"]


DAMAGE = (b"\xff\x00", b"", b"[]", b"3", b"[" * 9999, b'{"reference": 3, "grid": []}', b'{"reference": "a", "grid": "xyz"}',
          b'{"reference": "a", "grid": [999], "nfe": "four"}', b'{"grid": [999]}')  # fmt: skip


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_origin_file_is_reported_in_one_sentence(
    generated: GeneratedImages, tmp_path: Path, content: bytes
) -> None:
    """The reader of the images says it, and so does the writer of more images."""
    path = tmp_path / ORIGIN
    path.write_bytes(content)
    with pytest.raises(DdilError) as error:
        ImageOrigin.read(tmp_path)
    assert str(error.value) == f"the file {path} is damaged; delete it to score the images without it"
    with pytest.raises(DdilError) as error:
        ImageWriter(tmp_path, MADE_BY, generated.prompts)
    assert str(error.value) == (
        f"the file {path} is damaged, and it alone says how the images beside it were made; delete the folder "
        "to generate them again"
    )


def test_temporary_files_of_a_killed_process_do_not_block_a_folder(generated: GeneratedImages, tmp_path: Path) -> None:
    with replacing(tmp_path / ORIGIN) as temporary:
        temporary.write_text("half")
        left = temporary.name
    (tmp_path / ORIGIN).rename(tmp_path / left)
    ImageWriter(tmp_path, MADE_BY, generated.prompts)
    assert [path.name for path in tmp_path.iterdir()] == [ORIGIN]
