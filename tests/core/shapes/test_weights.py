"""The shipped networks: what the package carries, that diffusers alone loads it, and that its card tells the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddil_core.data.shapes import ShapesData
from ddil_core.models.generate import sample
from ddil_core.models.model import Model, load_model
from ddil_core.shapes.batches import to_pixels
from ddil_core.shapes.render import render
from ddil_core.shapes.training.card import caption_preferred, shares
from ddil_core.shapes.training.train import WEIGHTS

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("shapes")


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((WEIGHTS / "card.json").read_text())["measured"]
    return found


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file() and WEIGHTS / "flow" not in path.parents]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == {
        "unet", "vae", "text_encoder", "scorer",
    }  # fmt: skip


def test_diffusers_alone_loads_and_samples_it(tmp_path: Path) -> None:
    """In a folder of its own, where this project cannot be imported."""
    script = (
        "import sys; sys.modules['ddil_core'] = sys.modules['ddil_eval'] = None\n"
        "import torch\nfrom diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(WEIGHTS / 'teacher')!r})\n"
        "pipeline.set_progress_bar_config(disable=True)\n"
        "picture = pipeline('a small red circle left of a large blue star on a grey background', guidance_scale=3.0,\n"
        "    num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]\n"
        "print(type(pipeline).__name__, picture.size, len(set(picture.getdata())) > 50)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout == "StableDiffusionPipeline (64, 64) True\n", run.stderr


def test_the_card_holds_the_bars(measured: dict[str, dict[str, float]]) -> None:
    assert measured["captions"] == 1000
    assert measured["rendered"]["exact"] >= 0.995
    assert measured["round_trips"]["exact"] >= 0.985
    assert measured["autoencoder_psnr_db"] >= 32


def test_the_card_holds_the_teacher_s_bars(measured: dict[str, dict[str, float]]) -> None:
    assert measured["teacher_32_steps"]["exact"] >= 0.90
    assert measured["teacher_32_steps"]["exact"] - measured["teacher_4_steps"]["exact"] >= 0.20


def test_the_scorer_tells_a_caption_from_one_with_another_word(measured: dict[str, dict[str, float]]) -> None:
    found = caption_preferred(WEIGHTS / "scorer", 300)
    assert found >= 0.95 and found == pytest.approx(measured["scorer_caption_preferred"], abs=0.03)


def test_the_readme_is_the_card(measured: dict[str, dict[str, float]]) -> None:
    text = (WEIGHTS / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| teacher, 32 DDIM steps |"))
    assert row.endswith(f" {measured['teacher_32_steps']['exact']:.1%} |")


def test_round_trips_are_as_the_card_says(model: Model, measured: dict[str, dict[str, float]]) -> None:
    data = ShapesData()
    scenes = [data.scene(index) for index in range(96)]
    pictures = np.stack([render(scene) for scene in scenes])
    mean, _ = model.encode_images(to_pixels(pictures))
    again = model.decode(mean)
    error = np.square(again.astype(np.float64) - pictures).mean()
    assert 10 * np.log10(255**2 / error) == pytest.approx(measured["autoencoder_psnr_db"], abs=0.7)
    assert shares(again, scenes)["exact"] >= 0.95


@pytest.mark.parametrize("steps", [32, 4])
def test_the_teacher_draws_as_the_card_says(steps: int, model: Model, measured: dict[str, dict[str, float]]) -> None:
    """The card's own first 48 captions; within four standard deviations of a binomial share."""
    data = ShapesData()
    scenes = [data.scene(index) for index in range(48)]
    drawn = sample(model, [scene.meaning.caption for scene in scenes], steps=steps, seed=0)[:, 0]
    expected = measured[f"teacher_{steps}_steps"]["exact"]
    spread = 4 * np.sqrt(max(expected * (1 - expected), 0.01) / len(scenes))
    assert shares(drawn, scenes)["exact"] == pytest.approx(expected, abs=spread)
