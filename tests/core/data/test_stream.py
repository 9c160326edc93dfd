"""Data without end: a window that moves over the data, whose place depends on the number of the batch alone."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddil_core.data.datasets import open_data
from ddil_core.data.folder import ImageFiles
from ddil_core.data.pool import encode_pool
from ddil_core.data.shards import Shards
from ddil_core.data.stream import Reader, StreamedPool, open_stream
from ddil_core.distillation.distill import distill
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from tests.core.distillation.test_methods import UNET
from tests.shards import picture, save_shards

HELD, NEW = 4, 2.0
DDIL = {"collect_every": 2, "capacity": 64, "phases": [{"until": 1, "aggregated": 0.5, "p_teacher": 0.5}]}
CONFIG = {
    "method": "pd",
    "stages": [{"steps": 4, "updates": 6}],
    "batch_size": 4,
    "pool": HELD,
    "stream": 0.5,
    "save_every": 2,
    "warmup": 0,
    "teacher_batch_size": 2,
    "ddil": DDIL,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_shards(tmp_path_factory.mktemp("shards"), count=3, size=3)


@pytest.fixture
def stream(model: Model, shards: str, tmp_path: Path) -> StreamedPool:
    data = open_data(shards)
    return open_stream(model, data, encode_pool(model, data, HELD, tmp_path / "first.safetensors"), tmp_path / "s", NEW)


def test_shards_begin_again_at_their_end_and_a_known_shard_is_not_read(shards: str, tmp_path: Path) -> None:
    data = open_data(shards)
    assert isinstance(data, Shards)
    once = [image.name for image in islice(data.endless(0, {}), 9)]
    assert len(set(once)) == 9
    counts: dict[str, int] = {}
    assert [image.name for image in islice(data.endless(0, counts), 25)] == (once * 3)[:25]
    assert set(counts.values()) == {3} and len(counts) == 3
    opened: list[str] = []
    local = data._local
    data._local = lambda shard: opened.append(shard) or local(shard)  # type: ignore[method-assign, func-returns-value]
    assert next(data.endless(22, counts)).name == once[22 % 9]
    assert opened == [data.shards[22 % 9 // 3]]


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_a_part_depends_on_its_number_alone(kind: str, shards: str, tmp_path: Path) -> None:
    """Read in any order, and over the end of the data."""
    for place in range(5):
        (tmp_path / f"{place}.png").write_bytes(picture(place))
        (tmp_path / f"{place}.txt").write_text(f"picture {place}")
    data = open_data(shards if kind == "webdataset" else f"folder:{tmp_path}")
    order = Reader(data, 64, 2, tmp_path)
    parts = [order.read(part) for part in range(12)]
    other = Reader(data, 64, 2, tmp_path)
    for part in (7, 2, 3, 11, 0):
        images, captions = other.read(part)
        np.testing.assert_array_equal(images, parts[part][0])
        assert captions == parts[part][1]
    again = 9 if kind == "webdataset" else 2  # 9 images are 4 1/2 parts; the fifth image of 5 is left out
    first = [caption for _, captions in parts for caption in captions]
    assert first[:2] == first[2 * again : 2 * again + 2]


def test_the_window_moves_and_its_rows_are_the_encoded_images(
    model: Model, shards: str, stream: StreamedPool, tmp_path: Path
) -> None:
    whole = encode_pool(model, open_data(shards), 9, tmp_path / "whole.safetensors")
    generator = torch.Generator().manual_seed(0)
    assert len(stream) == HELD
    for batch, first in ((0, 0), (1, 0), (2, 4), (3, 4), (4, 8)):  # 2 images a batch, in parts of 4
        (tmp_path / "s" / ".000000003.1a2b3c4d.partial.safetensors").touch()  # another process is writing it
        rows = stream.rows(200, generator, batch)
        assert set(rows.tolist()) == set(range(first, first + HELD))
        mean, std = stream.posteriors(rows)
        torch.testing.assert_close(mean.float(), whole.mean[rows % 9].float(), atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(std.float(), whole.std[rows % 9].float(), atol=2e-3, rtol=1e-2)
        for name, told in stream.conditions(rows).items():
            torch.testing.assert_close(told.float(), whole.condition[name][rows % 9].float(), atol=2e-3, rtol=1e-2)
    assert {path.name for path in (tmp_path / "s").glob("[!.]*.safetensors")} == {
        "000000001.safetensors",
        "000000002.safetensors",
    }
    before = stream.conditions(torch.tensor([5]))
    shutil.rmtree(tmp_path / "s")
    (tmp_path / "s").mkdir()
    reopened = open_stream(model, open_data(shards), stream.stream.first, tmp_path / "s", NEW)
    for name, told in reopened.conditions(torch.tensor([5])).items():  # encoded again, bit for bit
        assert torch.equal(told, before[name])


def test_a_killed_run_goes_on_with_the_same_data_bit_for_bit(
    folder: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(str(folder), shards, CONFIG, tmp_path / "whole", device="cpu")
    update = ProgressiveStage.update

    def killed(stage: ProgressiveStage, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return update(stage, step)

    monkeypatch.setattr(ProgressiveStage, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(str(folder), shards, CONFIG, tmp_path / "killed", device="cpu")
    monkeypatch.setattr(ProgressiveStage, "update", update)
    stream = tmp_path / "killed" / "checkpoints" / "stream"
    assert len(list(stream.glob("*.safetensors"))) > 1
    for path in [*stream.glob("*.safetensors")][:1]:
        path.write_bytes(path.read_bytes()[:100])
    distill(str(folder), shards, CONFIG, tmp_path / "killed", device="cpu")
    one, two = (load_file(tmp_path / name / "student" / UNET) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not stream.exists()


def test_a_stream_of_all_images_is_refused(folder: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a stream holds a number of images at once, and not all; set pool, as in"):
        distill(str(folder), shards, CONFIG | {"pool": "all"}, tmp_path / "out", device="cpu")


def test_a_folders_later_images_are_checked_before_training(folder: Path, tmp_path: Path) -> None:
    """The window holds 4 images. One of the others has no caption."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        (images / f"{number}.png").write_bytes(picture(number))
        (images / f"{number}.txt").write_text("a red circle")
    data = open_data(f"folder:{images}")
    assert isinstance(data, ImageFiles)
    Path(data.training_files()[-1].path).with_suffix(".txt").unlink()
    with pytest.raises(WrongCommand, match="have no caption"):
        distill(str(folder), f"folder:{images}", CONFIG, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_part_that_another_process_never_encodes_is_encoded_here(
    stream: StreamedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddil_core.support.ranks.world", lambda: 2)
    monkeypatch.setattr("ddil_core.data.stream._PATIENCE", 0.0)
    first = stream.stream.window(3)
    rows = torch.arange(first, first + HELD)
    expected = stream.stream.take(rows, ["mean"])[0]
    assert expected.shape[0] == HELD and torch.isfinite(expected.float()).all()
