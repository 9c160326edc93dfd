"""Finished runs of tiny students, each made when a test first asks for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ddil_core.distillation.distill import distill
from ddil_core.distillation.methods import METHODS
from ddil_core.models.sampling import SYSTEM_FILE
from tests.pipelines import TEACHER, build, save_pipeline, tiny_unet

BASE = {"batch_size": 2, "pool": 4, "warmup": 0, "learning_rate": 1e-2, "learning_rate_decay": False}
PD = {"method": "pd", "stages": [{"steps": 4, "updates": 1}]}
LORA = {"method": "lcm", "updates": 2, "w_embedding": None, "lora": {"rank": 4, "alpha": 8}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "pd": ("v", PD),
    "lcm": ("v", {"method": "lcm", "updates": 1}),
    "lora": ("eps", LORA),
    "dmd2": ("eps", {"method": "dmd2", "updates": 1, "critic_updates": 1, "teacher_steps": 4}),
    "xl-pd": ("xl", PD),
    "xl-lora": ("xl", LORA),
}
"""Each run's teacher and its configuration."""


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Stable Diffusion's layout, predicting v or ε, and SDXL's, predicting v."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name != "xl":
            prediction = {"v": "v_prediction", "eps": "epsilon"}[name]
            return save_pipeline(folder, TEACHER, seed=1, prediction=prediction)
        pipeline = build("StableDiffusionXLPipeline", folder / "words", prediction="v_prediction")
        # diffusers tells the encoders in a single file apart by their width
        wide = copy.deepcopy(pipeline.text_encoder_2.config)
        wide.hidden_size = 24
        unet = tiny_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=40,
            projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
        )  # fmt: skip
        pipeline.register_modules(text_encoder_2=type(pipeline.text_encoder_2)(wide), unet=unet)
        pipeline.save_pretrained(folder / "pipeline")
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
