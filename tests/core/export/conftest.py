"""Finished runs of tiny students, each made when a test first asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.models.sampling import SYSTEM_FILE
from tests.pipelines import TEACHER, build, save_pipeline, tell_apart

BASE = {"batch_size": 2, "pool": 4, "warmup": 0, "learning_rate": 1e-2, "learning_rate_decay": False}
PD = {"method": "pd", "stages": [{"steps": 4, "updates": 1}]}
LORA = {"method": "lcm", "updates": 2, "w_embedding": None, "lora": {"rank": 4, "alpha": 8}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "pd": ("v", PD),
    "lcm": ("v", {"method": "lcm", "updates": 1}),
    "lora": ("eps", LORA),
    "dmd2": ("eps", {"method": "dmd2", "updates": 1, "critic_updates": 1, "teacher_steps": 4}),
    "tcd": ("v", {"method": "tcd", "updates": 2, "w_embedding": None, "lora": {"rank": 4, "alpha": 8}, "gamma": 0.5}),
    "xl-pd": ("xl", PD),
    "xl-lora": ("xl", LORA),
    "sd3": ("sd3", PD | {"lora": {"rank": 4, "alpha": 8}}),
}
"""Each run's teacher and its configuration."""


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Stable Diffusion's layout, predicting v or ε, SDXL's, predicting v, and SD3's, a flow."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name == "sd3":
            sampling = TEACHER | {"solver": "flow_euler"}
            return save_pipeline(folder, sampling, seed=1, layout="StableDiffusion3Pipeline")
        if name != "xl":
            prediction = {"v": "v_prediction", "eps": "epsilon"}[name]
            return save_pipeline(folder, TEACHER, seed=1, prediction=prediction)
        pipeline = build("StableDiffusionXLPipeline", folder / "words", prediction="v_prediction")
        tell_apart(pipeline).save_pretrained(folder / "pipeline")
        (folder / "pipeline" / SYSTEM_FILE).write_text(json.dumps(TEACHER))
        return folder / "pipeline"

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, teachers: Callable[[str], Path]) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        teacher, told = RUNS[name]
        out = tmp_path_factory.mktemp("runs") / name
        config = METHODS[told["method"]].config.model_validate(BASE | told)
        distill(str(teachers(teacher)), "shapes", config, out, device="cpu")
        return out

    return make
