"""The pool of encoded images: interrupted anywhere, it goes on, and is the pool that nothing interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddil_core.data import pool as pools
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool, image_side
from ddil_core.models.model import Model, load_model
from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from tests.core.closed_form import distance
from tests.shards import picture, save_shard, save_shards

COUNT, BATCH = 9, 2
"""With two batches a part: two parts, and one that is not full."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PART", 2)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return save_shards(tmp_path, count=3, size=3)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Stopping:
    """A data set whose stream is killed before the batch ``last``; it counts what it gives."""

    side = None

    def __init__(self, reference: str, last: int | None = None) -> None:
        self.data, self.reference, self.last, self.given = open_data(reference), reference, last, list[int]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.data, name)

    def training(
        self, count: int, side: int, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        for index, batch in enumerate(self.data.training(count, side, batch_size, first), first):
            if index == self.last:
                raise Killed
            self.given.append(index)
            yield batch


def encode(model: Model, data: object, path: Path) -> LatentPool:
    return encode_pool(model, data, COUNT, path, BATCH)  # type: ignore[arg-type]


def equal(a: LatentPool, b: LatentPool) -> bool:
    return (
        torch.equal(a.mean, b.mean)
        and torch.equal(a.std, b.std)
        and a.condition.keys() == b.condition.keys()
        and all(torch.equal(a.condition[name], b.condition[name]) for name in a.condition)
    )


def test_an_interrupted_pool_goes_on_and_is_the_same(model: Model, shards: str, tmp_path: Path) -> None:
    whole = encode(model, Stopping(shards), tmp_path / "whole.safetensors")
    path = tmp_path / "data.safetensors"
    begun = []
    for last in (0, 3, 4, None):
        data = Stopping(shards, last)
        if last is None:
            found = encode(model, data, path)
        else:
            with pytest.raises(Killed):
                encode(model, data, path)
            assert not path.exists()
        begun.append(data.given)
    assert begun == [[], [0, 1, 2], [2, 3], [4]]  # two batches are a part; what is not yet a part is encoded again
    assert equal(found, whole) and len(found) == COUNT
    path.with_suffix(".parts").mkdir()  # as if killed before they were deleted
    assert equal(found, encode(model, Stopping(shards, 0), path))  # read, not made
    files = {p.name for p in tmp_path.iterdir() if p.suffix not in (".tar", ".sha256")}
    assert files == {"whole.safetensors", "data.safetensors"}


def test_images_are_encoded_in_the_precision_of_the_model(model: Model, shards: str, tmp_path: Path) -> None:
    seen = set[str]()
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    hook = model.pipeline.vae.encoder.register_forward_pre_hook(lambda *_: seen.add(switch.fp32_precision))
    encode(model, open_data(shards), tmp_path / "data.safetensors")
    hook.remove()
    assert seen == {"ieee"}  # a GPU's convolutions use TF32 where nothing is said


def test_the_pool_is_of_the_images_at_the_models_size(model: Model, shards: str, tmp_path: Path) -> None:
    pool = encode(model, open_data(shards), tmp_path / "data.safetensors")
    assert image_side(model) == 64
    images, captions = next(open_data(shards).training(COUNT, 64, COUNT))
    mean, _ = model.encode_images(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    told = model.encode(captions).tensors["encoder_hidden_states"]
    assert distance(pool.mean.float(), mean) < 1e-3  # float16
    assert distance(pool.condition["encoder_hidden_states"].float(), told) < 1e-3


def test_parts_of_other_data_are_not_gone_on_with(model: Model, shards: str, tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    with pytest.raises(Killed):
        encode(model, Stopping(shards, 4), path)
    save_shard(tmp_path / "train-0.tar", [{"png": picture(7), "txt": b"another, longer caption" * 99}] * 3)
    data = Stopping(shards)
    encode(model, data, path)
    assert data.given == [0, 1, 2, 3, 4]


def test_a_part_that_is_damaged_is_made_again(model: Model, shards: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "data.safetensors", encode(model, Stopping(shards), tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        encode(model, Stopping(shards, 4), path)
    part = path.with_suffix(".parts") / "00001.safetensors"
    assert set(load_file(part)) == {"mean", "std", "condition.encoder_hidden_states"}
    part.write_bytes(part.read_bytes()[:1000])
    data = Stopping(shards)
    assert equal(encode(model, data, path), whole)
    assert data.given == [2, 3, 4]


def test_a_damaged_image_keeps_what_was_encoded_before_it(model: Model, tmp_path: Path) -> None:
    """Mended, encoding goes on after the parts that were whole."""
    for place in range(COUNT):
        (tmp_path / f"{place}.txt").write_text(f"picture {place}")
        (tmp_path / f"{place}.png").write_bytes(picture(place))
    reference, path = f"folder:{tmp_path}", tmp_path / "encoded" / "data.safetensors"
    order = [captions[0][-1] for _, captions in open_data(reference).training(COUNT, 64, 1)]
    bad = tmp_path / f"{order[6]}.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DdilError, match=f"1 of 9 images of {reference} are damaged: {bad.name}; "):
        encode(model, Stopping(reference), path)
    bad.write_bytes(whole)
    data = Stopping(reference)
    assert len(encode(model, data, path)) == COUNT
    assert data.given == [2, 3, 4]


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_images_are_encoded_as_many_at_once_as_fit(
    at_once: int, model: Model, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode_pool(model, open_data(shards), COUNT, tmp_path / "whole.safetensors")
    sizes = list[int]()
    encode_images = Model.encode_images

    def counted(self: Model, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(pixels))
        return encode_images(self, pixels)

    monkeypatch.setattr(Model, "encode_images", counted)
    monkeypatch.setattr(pools, "decode_batch", lambda *told: at_once)
    found = encode_pool(model, open_data(shards), COUNT, tmp_path / "data.safetensors")
    assert max(sizes) == max(at_once, 1) and sum(sizes) == COUNT
    assert distance(found.mean.float(), whole.mean.float()) < 1e-3


@pytest.mark.usefixtures("a_gpu")
def test_the_pool_of_a_gpu_is_that_of_the_cpu(folder: Path, model: Model, shards: str, tmp_path: Path) -> None:
    """And the text encoders, which were there meanwhile, leave the GPU."""
    there = load_model(str(folder), "cuda")
    with full_precision():
        found = encode(there, open_data(shards), tmp_path / "gpu.safetensors")
    assert {p.device.type for part in there.text_encoders() if part is not None for p in part.parameters()} == {"cpu"}
    expected = encode(model, open_data(shards), tmp_path / "cpu.safetensors")
    assert distance(found.mean.float(), expected.mean.float()) < 1e-3  # float16
    for name, told in expected.condition.items():
        assert distance(found.condition[name].float(), told.float()) < 1e-3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_a_pool_is_mapped_from_its_file_and_not_copied(model: Model, tmp_path: Path) -> None:
    """So that processes of one machine share it, and a pool may be larger than the memory."""
    path = tmp_path / "data.safetensors"
    pool = encode_pool(model, open_data("shapes"), 4, path)
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for tensor in (pool.mean, pool.std, *pool.condition.values()):
        assert any(tensor.data_ptr() in part for part in mapped)
