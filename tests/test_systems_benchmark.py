"""The table of systems: its rows on tiny networks, and its full-size networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import systems as benchmark
from ddil_core.models.system_specs import load_systems
from tests.reference import random_files


@pytest.mark.parametrize("name", ["sd21", "instaflow"])
def test_a_row_says_what_was_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REFUSALS", [])
    system = load_systems()[name]
    row = benchmark.row(name, system, random_files(system, tmp_path), tmp_path)
    assert row["latents"] < 1e-5
    assert 0 < row["levels"] < 0.5
    assert row["analyses"] == f"yes, {2 ** (1 if name == 'instaflow' else 4)} strings"
    if name == "sd21":
        assert (row["distils"], benchmark.REFUSALS) == ("yes, to 4 steps", [])
    else:
        assert row["distils"] == "refused"
        (sentence,) = benchmark.REFUSALS
        assert sentence.startswith(
            "instaflow: the teacher 'instaflow' predicts rectified_flow, and progressive distillation"
        )


@pytest.mark.parametrize(("name", "parameters"), [("SD 1.5", 859_520_964), ("SDXL", 2_567_463_684)])
def test_the_full_size_networks_are_the_published_ones(name: str, parameters: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(**benchmark.FULL_SIZE[name][0])
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.gpu
def test_full_size_networks_run_on_a_gpu() -> None:
    frame = benchmark.full_size("cuda", batch_size=1, steps=2)
    assert frame["U-Net"].tolist() == ["SD 1.5", "SDXL"]
    assert bool((frame["images_per_second"] > 0).all())
    assert frame["peak_GiB"].is_monotonic_increasing
    assert bool((frame["peak_GiB"] > frame["parameters_1e9"] * 2e9 / 2**30).all())  # bfloat16: two bytes a weight
