"""The table of layouts, and a layout of another package."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from ddil_core.models import layouts, settings
from ddil_core.models.generate import sample
from ddil_core.models.layouts import LAYOUTS, Layout
from ddil_core.models.model import load_model
from ddil_core.support.errors import DdilError
from ddil_core.support.registry import Registry


@pytest.fixture
def toy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds two layouts: a pipeline class of diffusers, and a name that no library has."""
    info = tmp_path / "package" / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddil.layouts]\nimg2img = toy_layouts:ROW\nabsent = toy_layouts:ABSENT\n")
    (info.parent / "toy_layouts.py").write_text(
        "from dataclasses import replace\n"
        "from ddil_core.models.layouts import LAYOUTS\n"
        "ROW = replace(LAYOUTS['StableDiffusionPipeline'], pipeline='StableDiffusionImg2ImgPipeline', "
        "guidance_scale=2.0)\nABSENT = replace(ROW, pipeline='ToyPipeline')\n"
    )
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.delitem(sys.modules, "toy_layouts", raising=False)
    table = Registry("layout", "ddil.layouts", Layout, list(LAYOUTS.values())[:4], key=lambda row: row.pipeline)
    monkeypatch.setattr(layouts, "LAYOUTS", table)
    monkeypatch.setattr(settings, "LAYOUTS", table)


def with_layout(folder: Path, out: Path, name: str) -> Path:
    """A copy of a pipeline that names another class."""
    shutil.copytree(folder, out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    return out


def test_the_table_is_by_the_name_of_diffusers_class() -> None:
    names = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"]
    assert list(LAYOUTS)[:4] == [*names, "StableDiffusion3Pipeline"]
    assert all(LAYOUTS[name].pipeline == name for name in LAYOUTS)


def test_a_layout_that_nobody_knows_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DdilError, match=r"has the layout StableDiffusionImg2ImgPipeline; known here are Stable"):
        load_model(str(with_layout(folder, tmp_path / "model", "StableDiffusionImg2ImgPipeline")))


@pytest.mark.usefixtures("toy_package")
def test_a_layout_of_another_package_loads_and_samples(folder: Path, tmp_path: Path) -> None:
    added = load_model(str(with_layout(folder, tmp_path / "model", "StableDiffusionImg2ImgPipeline")))
    assert type(added.pipeline).__name__ == "StableDiffusionImg2ImgPipeline"
    ours, theirs = (sample(each, ["a small red circle"], steps=2) for each in (added, load_model(str(folder))))
    assert np.array_equal(ours, theirs)


@pytest.mark.usefixtures("toy_package")
def test_a_layout_without_a_class_in_diffusers_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    path = with_layout(folder, tmp_path / "model", "ToyPipeline")
    with pytest.raises(DdilError, match=r"has the layout ToyPipeline, and diffusers .* has no such pipeline class"):
        load_model(str(path))
