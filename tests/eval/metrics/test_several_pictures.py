"""Several pictures of each prompt: metrics that compare them see all, the others the first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample
from ddil_core.models.generate import resolve_sampling, sample_images
from ddil_core.models.model import load_model
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments.score import ScoreConfig, score_folders
from ddil_eval.experiments.systems import SystemsConfig, compare_systems, plan_comparison
from ddil_eval.metrics import METRICS
from ddil_eval.report.records import Record
from tests.pixels import NAMES

PROMPTS, NUMBER = 5, 3


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


def config(student: Path, **changes: object) -> SystemsConfig:
    content = {
        "systems": [{"name": "student", "model": str(student), "steps": 2}],
        "num_prompts": PROMPTS,
        "images_per_prompt": NUMBER,
        "reference_images": 20,
        "metrics": [*NAMES, "lpips_efflite0"],
        "batch_size": 8,
        "seed": 2,
    }
    return SystemsConfig.model_validate(content | changes)


@pytest.fixture(scope="module")
def measured(student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    out = tmp_path_factory.mktemp("several")
    (record,) = compare_systems(config(student), out, save_images=True)
    return out / "images" / "student", record


def test_diversity_is_the_mean_over_prompts_of_their_pictures_distances(
    measured: tuple[Path, Record], student: Path
) -> None:
    model, extract = load_model(str(student)), METRICS["lpips_efflite0"].network.open_on("cpu")
    found = []
    for prompt in open_data("shapes").prompts(PROMPTS):
        samples = [Sample(prompt.id, place) for place in range(NUMBER)]
        texts = [prompt.text] * NUMBER
        found.append(float(extract(sample_images(model, samples, texts, resolve_sampling(model, 2), 2), texts)[0, 0]))
    estimate = measured[1].metrics["lpips_efflite0"].estimate
    assert estimate.value == pytest.approx(np.mean(found), rel=1e-3)
    assert estimate.low < estimate.value < estimate.high and estimate.n == PROMPTS


def test_other_metrics_see_the_picture_that_a_prompt_has_where_it_has_one(
    measured: tuple[Path, Record], student: Path, tmp_path: Path
) -> None:
    (alone,) = compare_systems(config(student, images_per_prompt=1, metrics=NAMES), tmp_path)
    for name in NAMES:
        value = measured[1].metrics[name].estimate.value
        assert value == pytest.approx(alone.metrics[name].estimate.value, rel=1e-3)
    assert measured[1].n_done == alone.n_done == PROMPTS
    assert measured[1].protocol_hash != alone.protocol_hash


def test_kept_pictures_are_scored_to_the_same_numbers(measured: tuple[Path, Record], tmp_path: Path) -> None:
    kept, record = measured
    rows = [json.loads(line) for line in (kept / "index.jsonl").read_text().splitlines()]
    first = open_data("shapes").prompts(1)[0]
    assert [row["id"] for row in rows[:NUMBER]] == [f"{first.id}-{place}" for place in range(NUMBER)]
    assert {row["prompt"] for row in rows[:NUMBER]} == {first.text} and len(rows) == PROMPTS * NUMBER
    names = ("brightness", "fd_mosaic", "lpips_efflite0")
    content = {"folders": [str(kept)], "reference": "shapes", "reference_images": 20, "metrics": names}
    (scored,) = score_folders(
        ScoreConfig.model_validate(content | {"images_per_prompt": NUMBER, "batch_size": 8}), tmp_path
    )
    assert scored.metrics == record.metrics and (scored.n_asked, scored.n_done) == (PROMPTS, PROMPTS)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (
            1,
            "the metric 'lpips_efflite0' needs several images of each prompt, and each prompt has one; with 'ddil eval "
            "systems', 'run' and 'score', add --set images_per_prompt=10",
        ),
        (
            4,
            "the 15 images of {folder} are not 4 of each prompt; add the missing images, or change images_per_prompt",
        ),
        (
            5,
            "000000.png and 000003.png of {folder} have two captions, {first!r} and {second!r}; each 5 images that follow "
            "one another must have one prompt: put them in that order",
        ),
    ],
)
def test_pictures_that_are_not_so_many_of_each_prompt(
    number: int, sentence: str, measured: tuple[Path, Record], tmp_path: Path
) -> None:
    first, second = (prompt.text for prompt in open_data("shapes").prompts(2))
    content = {"folders": [str(measured[0])], "reference": "shapes", "metrics": ["lpips_efflite0"]}
    with pytest.raises(WrongCommand) as error:
        score_folders(ScoreConfig.model_validate(content | {"images_per_prompt": number}), tmp_path)
    assert str(error.value) == sentence.format(folder=measured[0], first=first, second=second)


def test_one_picture_of_each_prompt_is_refused_before_anything_is_opened(student: Path) -> None:
    with pytest.raises(WrongCommand, match="needs several images of each prompt"):
        plan_comparison(config(student, images_per_prompt=1))
