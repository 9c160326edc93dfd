"""The benchmarks of sampling, number formats and shared rollouts: what they compare, on small cases."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from click import ClickException
from diffusers import UNet2DConditionModel

from benchmarks import grid, precision, sampling
from benchmarks.random_models import SHAPES, random_model
from ddil_core.diffusion.noise import Sample
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.support.compute import FP32, Compute
from tests.core.closed_form import distance

SMALL = sampling.Case("small SD", 1, FP32)


@pytest.mark.parametrize(("name", "parameters"), [("SD 1.5", 859_520_964), ("SDXL", 2_567_463_684)])
def test_the_full_size_networks_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        net = UNet2DConditionModel(**SHAPES[name].unet)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_random_models_are_equal_each_time() -> None:
    samples = [Sample("a"), Sample("b")]
    first, second = (
        sample_latents(model, samples, ["a", "b"], resolve_sampling(model, 2), 0)
        for model in (random_model("small SD", "cpu") for _ in range(2))
    )
    assert torch.equal(first, second) and distance(first[0], first[1]) > 1e-3


def test_a_random_model_computes_as_it_is_told() -> None:
    """Precision, compiled batches of one size and TF32 all read ``Model.compute``."""
    model = random_model("small SD", "cpu", Compute("bf16"))
    assert model.compute == Compute("bf16") and model.denoiser.net.dtype is torch.bfloat16
    assert model.guidance_assumed is False


def test_sampling_compares_equal_latents_before_it_times_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "STEPS", 2)
    rows = pd.DataFrame(sampling.measure(SMALL, "cpu", rounds=1))
    assert rows["sampler"].tolist() == ["ours", "diffusers"]
    assert rows["latents_apart"].max() < 1e-5 and bool((rows["images_per_s"] > 0).all())
    (claim,) = sampling.summary(rows)
    assert (claim.claim, claim.bar) == ("images a second, small SD", 1.0)
    for factor in (1.0, float("nan")):
        monkeypatch.setattr(sampling, "draw", lambda pipeline, case, texts, noise, output, by=factor: noise * by)
        with pytest.raises(ClickException, match="so both do not compute the same"):
            sampling.measure(SMALL, "cpu", rounds=1)


def test_compiled_ours_is_compared_with_diffusers_eager_and_by_its_recipe() -> None:
    speeds = {"ours": 1.0, "ours, compiled": 3.0, "diffusers": 1.5, "diffusers, recipe": 2.0}
    frame = pd.DataFrame({"model": "SDXL", "sampler": list(speeds), "images_per_s": list(speeds.values())})
    eager, recipe = sampling.summary(frame)
    assert (eager.quotient, eager.bar, recipe.quotient, recipe.bar) == (2.0, 1.5, 1.5, 1.0)


def test_shared_rollouts_evaluate_less_than_half_of_the_settings_alone() -> None:
    frame = grid.measure(prompts=4, teacher_steps=4, device="cpu").set_index("rollouts")
    assert frame.index.tolist() == ["12 settings, each alone", "shared", "factorial"]
    assert frame.loc["12 settings, each alone", "evaluations_share"] == 1
    assert frame.loc["shared", "evaluations_share"] < 0.5
    nodes = sum(2**k for k in range(1, 5)) // 2  # of each actor, in the tree of all strings of length 4
    assert frame.loc["factorial", "evaluations"] == 4 * nodes * (2 + 1)  # a guided teacher evaluates two rows


def test_precision_measures_latents_and_paired_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LATENT_STEPS", (1, 2))
    monkeypatch.setattr(precision, "METRIC_STEPS", 2)
    chosen = {"fp32": FP32, "bf16": Compute("bf16")}
    apart = precision.distances("small SD", "cpu", chosen)
    assert set(apart["fp32"].values()) == {0.0}
    assert all(0 < value < 0.1 for value in apart["bf16"].values())
    found = precision.metrics(4, "cpu", chosen, reference_images=8)
    assert found["fp32"].keys() == {"fd_efflite0", "drawn_right"}
    assert found["bf16"]["fd_efflite0"] != found["fp32"]["fd_efflite0"]
    assert found["bf16"].keys() == {name + end for name in precision.METRICS for end in ("", " − fp32")}


def test_a_case_has_a_compiled_model() -> None:
    assert sampling.load(replace(SMALL, batch=1), "cpu").compute == FP32
