"""The rollout of the Python API: pure strings equal sampling, mixed strings differ, and wrong strings are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddil_core.models.generate import sample
from ddil_core.models.model import Model, load_model
from ddil_core.models.turns import rollout, take_turns
from ddil_core.support.errors import WrongCommand
from tests.pipelines import STUDENT as STUDENT_SAMPLING
from tests.pipelines import save_pipeline

PROMPTS = ["a small red circle", "a large blue star", ""]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(save_pipeline(tmp_path_factory.mktemp("student"), STUDENT_SAMPLING, seed=2)))


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_pure_strings_are_each_model_by_itself(model: Model, student: Model) -> None:
    images = rollout(model, student, PROMPTS, ["TTTT", "TTSS", "SSSS"], teacher_steps=8, seed=3)
    assert images.shape == (3, 3, 64, 64, 3) and images.dtype == np.uint8
    assert apart(images[:, 0], sample(model, PROMPTS, steps=8, seed=3)[:, 0]) <= 1
    assert apart(images[:, 2], sample(student, PROMPTS, seed=3)[:, 0]) <= 1
    assert min(apart(images[:, 1], images[:, other]) for other in (0, 2)) > 1


def test_an_image_depends_on_its_prompt_and_string_alone(model: Model, student: Model) -> None:
    together = rollout(model, student, PROMPTS, ["TSTS", "STST"], teacher_steps=8, guidance_scale=2.0, batch_size=4)
    alone = rollout(model, student, PROMPTS[1:2], ["STST"], teacher_steps=8, guidance_scale=2.0, batch_size=1)
    assert apart(together[1, 1], alone[0, 0]) <= 1
    other = rollout(model, student, PROMPTS[1:2], ["STST"], teacher_steps=8, guidance_scale=4.0)
    assert apart(other, alone) > 1


def test_a_small_rollout_evaluates_no_more_rows_than_it_has(model: Model, student: Model) -> None:
    rows: list[int] = []
    hook = student.denoiser.net.register_forward_hook(lambda _, args, output: rows.append(len(output.sample)))
    try:
        rollout(model, student, PROMPTS[:1], ["SSSS", "TTSS"], teacher_steps=8, batch_size=64)
    finally:
        hook.remove()
    assert rows == [2, 2, 2, 2]  # one row of "SSSS", filled up to two, then one each of "SSSS" and "TTSS"


def test_a_solver_with_a_second_evaluation_takes_turns(model: Model, student: Model) -> None:
    """The guided teacher evaluates its network twice as often. The step to the clean end takes one evaluation less."""
    actors, _ = take_turns(model, student, 8, None, "heun")
    assert {name: actor.nfe for name, actor in actors.items()} == {"T": [8, 8, 8, 6], "S": [2, 2, 2, 1]}
    plain, _ = take_turns(model, student, 8)
    condition, z = model.encode(PROMPTS[:1]), torch.randn(1, *model.latent_shape)
    with torch.no_grad():
        ends = [pair["S"].act(0, z, condition) for pair in (actors, plain)]
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) > 1e-4
    with pytest.raises(WrongCommand, match="the solver 'lcm' carries state or noise"):
        take_turns(model, student, 8, None, "lcm")


@pytest.mark.parametrize("string", ["TTS", "TTSX", ""])
def test_a_string_that_does_not_fit_is_refused(model: Model, student: Model, string: str) -> None:
    with pytest.raises(WrongCommand) as error:
        rollout(model, student, PROMPTS, ["TTSS", string], teacher_steps=8)
    assert str(error.value) == (
        f"the string {string!r} does not fit: write one letter for each of the student's 4 steps, "
        "'T' where the teacher acts and 'S' where the student acts"
    )


def test_no_prompt_or_no_string_is_refused(model: Model, student: Model) -> None:
    for prompts, strings in (([], ["TTSS"]), (PROMPTS, [])):
        with pytest.raises(WrongCommand, match="at least one prompt and one string"):
            rollout(model, student, prompts, strings, teacher_steps=8)
