"""A device with too little memory: evaluation takes fewer rows at once, and training names what helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.out_of_memory import savings
from ddil_core.models.generate import sample
from ddil_core.models.model import Model, load_model
from ddil_core.support.errors import DdilError
from ddil_core.support.fitting import Fitting
from ddil_eval.features.extraction import Extractors

PROMPTS = [f"a small {colour} circle" for colour in ("red", "blue", "green", "yellow", "purple")]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_rows_are_halved_until_they_fit(most: int) -> None:
    seen = list[int]()

    def work(rows: slice) -> list[int]:
        places = [*range(7)][rows]
        seen.append(len(places))
        if len(places) > most:
            raise torch.cuda.OutOfMemoryError
        return places

    fitting = Fitting("a test")
    assert [place for part in fitting.parts(work, 7) for place in part] == [*range(7)]
    first = seen.index(next(size for size in seen if size <= most))
    assert max(seen[first:]) <= most  # what did not fit is not tried again
    if most == 1:
        with pytest.raises(torch.OutOfMemoryError):
            Fitting("a test").parts(lambda rows: work(slice(0, 2)), 1)


def limited(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, most: int) -> list[int]:
    """Let a method of a network fail as a GPU does where it gets more than ``most`` rows. Return the rows it got."""
    original, seen = getattr(owner, name), list[int]()

    def call(z: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(z))
        if len(z) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(z, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return seen


def test_sampling_goes_on_with_the_same_images(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser takes 2 of 5 prompts, each twice for its guidance; the decoder takes 3 images."""
    expected = sample(model, PROMPTS, steps=2).astype(int)
    small = load_model(str(folder))
    rows = limited(monkeypatch, small.denoiser.net, "forward", 4)
    images = limited(monkeypatch, small.pipeline.vae, "decode", 3)
    found = sample(small, PROMPTS, steps=2).astype(int)
    assert np.abs(found - expected).max() <= 1  # rounding of another batch
    assert rows[0] == 10 and max(rows[3:]) <= 4 and images == [5, 3, 2]


def test_features_do_not_depend_on_the_memory() -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8)
    whole, parts = (Extractors(["drawn_right"], "cpu") for _ in range(2))
    (name,) = parts.networks
    network = parts._loaded[name]

    def small(pictures: np.ndarray, captions: list[str]) -> np.ndarray:
        if len(pictures) > 2:
            raise torch.cuda.OutOfMemoryError
        return network(pictures, captions)

    parts._loaded[name] = small
    captions = [PROMPTS[0] + " on a grey background"] * 6
    np.testing.assert_array_equal(parts(images, captions)[name], whole(images, captions)[name])


def test_training_names_what_helps(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddil_core.distillation.progressive import ProgressiveStage

    def update(stage: Any, step: int) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ProgressiveStage, "_update", update)
    told = {"batch_size": 4, "pool": 6, "stages": [{"steps": 2, "updates": 2}], "teacher_batch_size": 8}
    with pytest.raises(DdilError) as error:
        distill(str(folder), "shapes", ProgressiveConfig.model_validate(told), tmp_path / "out", device="cpu")
    sentence = str(error.value)
    assert sentence.startswith(
        "the memory of cpu is too small for the stage '4 → 2 steps'; go on with --set gradient_accumulation=2 (the "
        "activations shrink to 50%), gradient_checkpointing=true (most activations are computed twice, and not kept), "
        "teacher_batch_size=4 (evaluations without gradients take half), offload=true (float32 weights, moments and "
        "average wait on the host, which takes longer); or begin another run with --set optimizer=8bit (about "
    )
    assert sentence.endswith(f"'ddil doctor --model {folder}' estimates the rest") and "\n" not in sentence


def test_the_savings_are_those_of_the_doctor() -> None:
    """For Stable Diffusion 1.5: 6 bytes a parameter and network for the moments, 2 for the teacher."""
    parameters = 860_000_000
    told = {"stages": [{"steps": 2, "updates": 2}], "batch_size": 1, "gradient_checkpointing": True}
    told |= {"offload": True, "optimizer": "fused"}
    go_on, anew = savings(ProgressiveConfig.model_validate(told | {"teacher_batch_size": 1}), parameters)
    assert go_on == [] and anew[0] == "teacher_dtype=bfloat16 (about 1.60 GiB less)"  # offload excludes 8bit
    _, anew = savings(
        ProgressiveConfig.model_validate(told | {"offload": False, "mixed_precision": "bf16"}), parameters
    )
    assert [setting.split("=")[0] for setting in anew] == ["optimizer"]  # autocast has rounded the teacher already
    assert anew == ["optimizer=8bit (about 4.81 GiB less)"]
    _, anew = savings(MatchingConfig.model_validate({"updates": 2}), parameters)
    assert anew[0] == "optimizer=8bit (about 9.61 GiB less)"
