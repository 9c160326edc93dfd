"""A tiny real pipeline and what is made from it: nothing here is trained, and all of it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.models.model import Model, load_model
from tests.pipelines import TEACHER, save_pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in Stable Diffusion's layout that predicts v, meant to be sampled with guidance 3."""
    return save_pipeline(tmp_path_factory.mktemp("tiny"), TEACHER, seed=1)


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return load_model(str(folder))


@pytest.fixture(scope="session")
def pool(model: Model, tmp_path_factory: pytest.TempPathFactory) -> LatentPool:
    """24 encoded pictures of the shapes world."""
    return encode_pool(model, open_data("shapes"), 24, tmp_path_factory.mktemp("pool") / "data.safetensors")
