"""Numbers that are not finite stop the work before they become images, training data or a choice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.parameterization import Reflection
from ddil_core.diffusion.rollout import pair_actors, rollout_latents
from ddil_core.diffusion.schedule import Schedule
from ddil_core.distillation.distill import distill
from ddil_core.distillation.matching import score_difference
from ddil_core.distillation.methods import METHODS
from ddil_core.distillation.student import Student, save_student
from ddil_core.distillation.training_log import require_finite
from ddil_core.inversion.problem import Best
from ddil_core.inversion.towers import Towers
from ddil_core.models.generate import sample
from ddil_core.models.model import Model, assemble, load_model
from ddil_core.models.sampling import Bounds
from ddil_core.models.system_specs import Files
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import Finite, all_finite, broken_weight, not_finite
from tests.core.closed_form import Gaussian, normal, shifts
from tests.pipelines import save_lora, spoilt

PROMPT = "a small red circle on a grey background"
NAN, INF = float("nan"), float("inf")


def test_the_first_place_is_named_and_forgotten() -> None:
    finite = Finite[str]()
    assert finite.first_broken() is None
    for place, value in (("one", 1.0), ("two", INF), ("three", NAN)):
        finite.see(place, torch.tensor([0.0, value]))
    assert finite.first_broken() == "two"
    assert finite.first_broken() is None
    assert all_finite([]) and all_finite([torch.ones(2)]) and not all_finite([torch.ones(2), torch.tensor(-INF)])


def test_the_cause_is_sought_in_the_weights_and_in_the_dtype() -> None:
    sound, broken = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    broken.bias.data[1] = NAN
    assert (broken_weight(sound), broken_weight(broken)) == (None, "bias")

    def said(*nets: torch.nn.Module | None) -> str:
        return str(not_finite("the latents", "after step 1", "the model 'x'", nets))

    start = "the latents of the model 'x', computed in {}, are not finite (NaN or infinity) after step 1: "
    assert said(None, sound, broken).startswith(
        start.format("float32") + "its weights hold such numbers too, first in bias"
    )
    assert said(sound.half()).startswith(start.format("float16") + "float16 has no number above 65,504")
    assert said(sound.bfloat16()).startswith(start.format("bfloat16") + "its weights or settings are too large")


@pytest.mark.parametrize(
    ("component", "value", "what", "place"),
    [
        ("unet", NAN, "the latents", "after step 1 of 4, at t = 999"),
        ("unet", INF, "the latents", "after step 1 of 4, at t = 999"),
        ("unet", 3e38, "the latents", "after step 1 of 4, at t = 999"),
        ("vae", NAN, "the images", "after its autoencoder decoded them"),
        ("vae", INF, "the images", "after its autoencoder decoded them"),
        ("text_encoder", NAN, "the embeddings", "after its text encoders"),
    ],
)
def test_a_damaged_component_gives_no_picture(
    folder: Path, tmp_path: Path, component: str, value: float, what: str, place: str
) -> None:
    model = load_model(str(spoilt(folder, tmp_path / "spoilt", component, value)))
    with pytest.raises(DdilError) as error:
        sample(model, [PROMPT], steps=4)
    reference = (
        f"{what} of the model '{tmp_path / 'spoilt'}', computed in float32, are not finite (NaN or infinity) {place}: "
    )
    assert str(error.value).startswith(reference)
    cause = "too large for its arithmetic" if value == 3e38 else "its weights hold such numbers too, first in "
    assert cause in str(error.value)


def test_a_later_step_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = type(model.denoiser).x0

    def late(self: Any, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return whole(self, output, z, t).where(t[0] != 500, NAN)

    monkeypatch.setattr(type(model.denoiser), "x0", late)
    with pytest.raises(DdilError, match=r"after step 3 of 4, at t = 500: "):
        sample(model, [PROMPT], steps=4)


def test_numbers_above_those_of_float16_are_told_as_such(folder: Path, tmp_path: Path) -> None:
    """The weights are finite in float16, and their products are not."""
    model = load_model(str(spoilt(folder, tmp_path / "large", "unet", 60000.0)), dtype=torch.float16)
    with pytest.raises(DdilError, match=r"computed in float16, are not finite .* float16 has no number above 65,504"):
        sample(model, [PROMPT], steps=2)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_damaged_lora_gives_no_picture(folder: Path, tmp_path: Path, fuse: bool) -> None:
    from safetensors.torch import load_file, save_file

    path = save_lora(tmp_path / "lora", load_model(str(folder)).pipeline)
    layers = load_file(path)
    name = sorted(layers)[0]
    save_file(layers | {name: layers[name] * NAN}, path)
    with pytest.raises(DdilError, match=r"^the LoRA .* has for the layer unet\..* numbers that are not finite; "):
        assemble("adapted", Files(folder, lora=path), fuse_lora=fuse)


def test_latents_are_looked_at_before_they_are_decoded(model: Model) -> None:
    for value in (NAN, INF):
        z = torch.zeros(2, *model.latent_shape)
        z[1, 0, 0, 0] = value
        with pytest.raises(DdilError, match=r"^the latents of the model .* before they are decoded"):
            model.decode(z)


@pytest.mark.parametrize("mode", ["none", "clamp", "dynamic", "fold"])
def test_a_reflection_hides_no_infinity(mode: Any) -> None:
    x0 = normal(2, 3, 2, 2)
    reflection = Reflection(mode, torch.zeros(3), torch.ones(3))
    assert all_finite([reflection(x0)])
    x0[0, 0, 0, 0] = INF
    assert not all_finite([reflection(x0)])


class Broken(Gaussian):
    """A denoiser that returns NaN from the time ``at`` on."""

    def __init__(self, schedule: Schedule, at: int) -> None:
        super().__init__(schedule)
        self.at = at

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return super().__call__(z, t, condition).where(t.view(-1, 1, 1, 1) > self.at, NAN)


def test_a_rollout_names_the_actor_and_the_transition() -> None:
    schedule = Schedule.stable_diffusion()
    actors = pair_actors(Gaussian(schedule), Broken(schedule, 500), schedule.grid(8), schedule.grid(4))
    told = {"T": "the teacher 'x'", "S": "the student 'y'"}
    z, condition = normal(2, 1, 2, 2), shifts(2)
    assert len(rollout_latents(actors, z, condition, [{"SSTT"}] * 2, batch_size=2, names=told).latents) == 2
    with pytest.raises(DdilError) as error:
        rollout_latents(actors, z, condition, [{"SSTT", "STST"}] * 2, batch_size=2, names=told)
    assert str(error.value).startswith(
        "the latents of the student 'y', computed in float32, are not finite (NaN or infinity) after transition 3 of "
        "4, with "
        "steps at t = 500: "
    )


def test_data_of_a_damaged_autoencoder_are_not_kept(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder))
    model.pipeline.vae.encoder.conv_out.weight.data.fill_(NAN)
    with pytest.raises(DdilError, match=r"^the latents of images of the model .* after its autoencoder encoded them"):
        encode_pool(model, open_data("shapes"), 4, tmp_path / "data.safetensors")
    assert not (tmp_path / "data.safetensors").exists()


def test_data_beyond_float16_are_not_kept(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder))
    model.pipeline.vae.register_to_config(scaling_factor=1e9)
    with pytest.raises(DdilError, match="are too large for float16"):
        encode_pool(model, open_data("shapes"), 4, tmp_path / "data.safetensors")
    assert not (tmp_path / "data.safetensors").exists()


def test_kept_data_are_looked_at_when_they_are_read(model: Model, pool: LatentPool, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "data.safetensors"
    tensors = {"mean": pool.mean.clone(), "std": pool.std} | {f"condition.{n}": t for n, t in pool.condition.items()}
    tensors["mean"][3, 0, 0, 0] = NAN
    save_file(tensors, path)
    with pytest.raises(DdilError, match="data.safetensors has values that are not finite; delete the file to encode"):
        encode_pool(model, open_data("shapes"), 24, path)


RUNS: dict[str, dict[str, Any]] = {
    "pd": {"stages": [{"steps": 2, "updates": 2}]},
    "lcm": {"updates": 2, "w_embedding": 16},
    "dmd2": {"updates": 2, "timesteps": [999, 499], "teacher_steps": 4, "critic_updates": 1, "gan": None},
    "dmd2 regression": {
        "updates": 2, "timesteps": [999], "critic_updates": 1, "gan": None,
        "regression": {"pairs": 4, "teacher_steps": 2, "updates": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("value", [NAN, 3e38])
@pytest.mark.parametrize("name", RUNS)
def test_no_student_comes_of_a_damaged_teacher(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    """Weights that are NaN, and finite weights with infinite products. The student starts as a copy of its teacher."""
    told = RUNS[name] | {"batch_size": 4, "pool": 8, "save_every": 1, "watch": None}
    config = METHODS[name.split()[0]].config.model_validate(told)
    teacher = spoilt(folder, tmp_path / "teacher", "unet", value)
    with pytest.raises(DdilError) as error:
        distill(str(teacher), "shapes", config, tmp_path / "run", device="cpu")
    reference = repr(str(teacher))
    sentences = {
        "weights": f"the teacher {reference} holds weights that are not finite, first in conv_out.weight; "
        "fetch or make it again",
        "pd": f"the targets of the teacher of the stage '4 → 2 steps', from {reference}, computed in float32, "
        "are not finite",
        "lcm": f"the targets of the teacher of the stage 'LCM', from {reference}, computed in float32, are not finite",
        "dmd2": "the weights of the stage 'DMD2, 2 steps' are ruined by update 1, first conv_out.weight: they are not "
        "finite, or larger than 65,504",
        "dmd2 regression": "the latents of the teacher's pairs for the regression, computed in float32, are not finite",
    }
    assert str(error.value).startswith(sentences["weights" if value is NAN else name])
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".safetensors", ".partial")}
    assert left == {"data.safetensors"}
    assert not (tmp_path / "run" / "student").exists()


def test_a_student_broken_by_its_last_update_is_not_saved(model: Model, tmp_path: Path) -> None:
    """No loss follows the last update, so only the weights show it."""
    net = copy.deepcopy(model.denoiser.net)
    next(net.parameters()).data.view(-1)[0] = NAN
    student = Student(net, "v_prediction", model.sampling)
    bounds = Bounds((0.0,) * 8, (1.0,) * 8, 1.0)
    with pytest.raises(
        DdilError, match=r"^the student's weights are not finite after training, first in .*lower learn"
    ):
        save_student(model, student, bounds, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_real_score_that_is_no_number_is_seen() -> None:
    """The gradient becomes 0 and the loss stays finite, so that only the check finds it.

    The loss shows what the generator broke.
    """
    schedule, x, eps, t = (
        Schedule.stable_diffusion(),
        normal(2, 1, 2, 2),
        normal(2, 1, 2, 2, seed=1),
        torch.tensor([500, 20]),
    )
    fake = Gaussian(schedule)
    for at, x0, expected in ((1000, x, "as the real score"), (0, x, None), (1000, x * NAN, None)):
        finite = Finite[str]()
        gradient = score_difference(Broken(schedule, at), fake, x0, eps, t, shifts(2), finite=finite)
        assert all_finite([gradient]) == (at == 0)
        place = finite.first_broken()
        assert place is None if expected is None else str(place).startswith(expected)


def test_a_gradient_that_is_no_number_stops_a_run() -> None:
    for key in ("gradient_norm", "critic_gradient_norm", "loss", "critic_loss"):
        with pytest.raises(
            DdilError, match=f"^the {key.replace('_', ' ')} of the stage 'LCM' is not finite at update 50"
        ):
            require_finite({"loss": 1.0, key: INF}, "LCM", 50, "nothing is kept")
    require_finite({"loss": 1.0, "clipped_fraction": NAN}, "LCM", 50, "nothing is kept")


def test_prompts_are_not_chosen_by_what_is_no_number() -> None:
    best = Best()
    best.update(torch.tensor([1.0, 1.0]), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(DdilError, match="^the loss of a prompt is NaN or infinite"):
        best.update(torch.tensor([0.5, NAN]), torch.ones(2, 3, dtype=torch.long))
    images: Callable[[np.ndarray], Tensor] = lambda pictures: torch.full((len(pictures), 4), NAN)  # noqa: E731
    towers = Towers("x", images, lambda texts: torch.zeros(len(texts), 4), (None, torch.nn.Identity()), {})
    with pytest.raises(DdilError, match="^the similarities of the CLIP 'x'"):
        towers.similarity(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8))


def test_one_broken_picture_of_a_batch_is_enough(model: Model) -> None:
    """A condition with two rows, one of them damaged."""
    condition = model.encode([PROMPT, "a large blue star"])
    condition.tensors["encoder_hidden_states"][1, 0, 0] = NAN
    student = replace(model)
    student.encode = lambda texts, **told: condition  # type: ignore[method-assign]
    with pytest.raises(DdilError, match=r"^the latents of the model"):
        sample(student, [PROMPT, "a large blue star"], steps=2)
