"""Unusable captions and images, at the commands that read them: one sentence, status 2, and no files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from ddil_eval.report.records import read_records
from tests.shards import picture, save_shard

Cli = Callable[..., Result]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images of one size with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(8):
        pixels = np.random.default_rng(place).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(f"picture {place}")
    return folder


def refused(result: Result, sentence: str, out: Path) -> None:
    assert (result.stderr.splitlines()[-1], result.exit_code, result.stdout) == (f"error: {sentence}", 2, "")
    assert "Traceback" not in result.stderr and not out.exists()


FEW = (
    "--recipe",
    "shapes",
    "--num-images",
    4,
    "--set",
    "reference_images=8",
    "--metrics",
    "fd_efflite0",
    "--device",
    "cpu",
)


def test_no_command_takes_captions_that_are_none(cli: Cli, student: Path, teacher: Path, photos: Path) -> None:
    out, data = photos.parent / "out", f"folder:{photos}"
    systems = ("eval", "systems", "--model", student, "--data", data, *FEW, "--out", out)
    prompts = photos.parent / "prompts.csv"
    prompts.write_text("id,prompt\n1,a cat\n2,a cat, sitting\n3,b\n4,c\n")
    sentence = (
        f"{prompts} cannot be read as csv in UTF-8: the row in line 3 has 3 fields, but the header has 2; put quotes around a "
        "field that holds a comma"
    )
    refused(cli(*systems, "--prompts", prompts), sentence, out)
    (photos / "1.txt").write_text(" \u00a0\u200b\n")
    sentence = f"1 of 4 images of {data} have no caption: 1.png; put a .txt beside each, or take --prompts where the command has it"
    refused(cli(*systems), sentence, out)
    sentence = f"1 of 8 images of {data} have no caption: 1.png; put a .txt beside each, or leave them out"
    distil = ("distill", "--teacher", teacher, "--device", "cpu", "--set", "pool=8", "--out", out)
    refused(cli(*distil, "--data", data), sentence, out)
    rows = [{"file_name": f"{place}.png", "text": ["a cat", "a dog"]} for place in range(8)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = (
        f"the 'text' of row 1 of {photos / 'metadata.jsonl'} is a list, but a caption is one text; write it as one text"
    )
    score = ("eval", "score", photos, "--reference", photos, *FEW, "--out", out)
    invert = ("eval", "prompt-inversion", "--teacher", teacher, "--data", data, "--device", "cpu", "--out", out)
    for command in (systems, score, (*distil, "--data", data)):
        refused(cli(*command), sentence, out)
    result = cli(*invert)
    assert f"not here: data {data}: {sentence}" in result.stderr and result.exit_code != 0
    shard = save_shard(photos.parent / "a.tar", [{"png": picture(0), "json": b'{"caption": ["a"]}'}])
    sentence = "the caption a.tar/0000.json is a list, but a caption is one text; write it as one text"
    refused(cli(*distil, "--data", f"webdataset:{shard}"), sentence, out)


def test_16_bit_grey_measures_as_8_bit_grey_does(cli: Cli, photos: Path, tmp_path: Path) -> None:
    """The same images with 16 bits and with 8 bits have a distance of 0."""
    deep = tmp_path / "deep"
    deep.mkdir()
    for path in photos.glob("*.png"):
        grey = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(grey).save(path)
        Image.fromarray(grey.astype(np.uint16) * 257).save(deep / path.name)
    result = cli("eval", "score", deep, "--reference", photos, "--recipe", "shapes", "--metrics", "fd_efflite0", "--device", "cpu",
                 "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (record,) = read_records(tmp_path / "out")
    assert record.metrics["fd_efflite0"].estimate.value == pytest.approx(0, abs=1e-6)
    said = [line for line in result.stderr.splitlines() if line.startswith("warning: ") and str(deep) in line]
    assert len(said) == 1 and said[0].endswith("; 8 of 16-bit grey, scaled to 8 bits")
