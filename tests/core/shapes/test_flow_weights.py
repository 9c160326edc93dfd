"""The shipped flow teacher: diffusers alone loads it, its card tells the truth, and its frame is the U-Net teacher's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddil_core.data.shapes import ShapesData
from ddil_core.distillation.shipped import world
from ddil_core.models.generate import sample
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import SHIPPED
from ddil_core.shapes.training.card import shares
from ddil_core.shapes.training.flow import GUIDANCE_SCALE, WEIGHTS

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("shapes-flow")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((WEIGHTS / "card.json").read_text())["measured"]
    return found


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    unique = {path.read_bytes() for path in files} - {
        path.read_bytes() for path in SHIPPED["shapes"].folder.rglob("*.*")
    }
    assert sum(map(len, unique)) <= 15e6  # git stores equal files once: the autoencoder, and the two text encoders


def test_diffusers_alone_loads_and_samples_it(tmp_path: Path) -> None:
    """In a folder of its own, where this project cannot be imported."""
    script = (
        "import sys; sys.modules['ddil_core'] = sys.modules['ddil_eval'] = None\n"
        "import torch\nfrom diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(WEIGHTS / 'teacher')!r}, text_encoder_3=None, tokenizer_3=None)\n"
        "pipeline.set_progress_bar_config(disable=True)\n"
        "picture = pipeline('a small red circle left of a large blue star on a grey background', guidance_scale=2.0,\n"
        "    max_sequence_length=0, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]\n"
        "print(type(pipeline).__name__, picture.size, len(set(picture.getdata())) > 50)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout == "StableDiffusion3Pipeline (64, 64) True\n", run.stderr


def test_it_is_a_model_of_the_shapes_world(model: Model) -> None:
    assert world("shapes-flow") == "shapes"
    assert (model.layout.pipeline, model.denoiser.prediction) == ("StableDiffusion3Pipeline", "flow")
    assert model.sampling.guidance_scale == GUIDANCE_SCALE


def test_the_readme_is_the_card(measured: dict[str, Any]) -> None:
    assert (measured["captions"], measured["guidance_scale"]) == (1000, GUIDANCE_SCALE)
    text = (WEIGHTS / "README.md").read_text()
    for steps in (32, 16, 8, 4):
        row = next(line for line in text.splitlines() if line.startswith(f"| teacher, {steps} Euler steps |"))
        assert row.endswith(f" {measured[f'teacher_{steps}_steps']['exact']:.1%} |")


@pytest.mark.parametrize("steps", [16, 4])
def test_the_teacher_draws_as_the_card_says(steps: int, model: Model, measured: dict[str, Any]) -> None:
    """The card's own first 48 captions; within four standard deviations of a binomial share."""
    scenes = [ShapesData().scene(index) for index in range(48)]
    drawn = sample(model, [scene.meaning.caption for scene in scenes], steps=steps, seed=0)[:, 0]
    expected = measured[f"teacher_{steps}_steps"]["exact"]
    spread = 4 * np.sqrt(max(expected * (1 - expected), 0.01) / len(scenes))
    assert shares(drawn, scenes)["exact"] == pytest.approx(expected, abs=spread)
