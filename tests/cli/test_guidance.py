"""A guidance scale is a finite number from 0 to 1000, in options and in protocols."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.models.generate import sample
from ddil_core.models.model import load_model
from ddil_core.models.sampling import Sampling
from ddil_core.models.system_specs import SystemSpec
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.protocol import Strict, validate
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig
from ddil_eval.experiments.system_configs import SeededSystemConfig
from tests.pipelines import edited

WRONG = ("nan", "inf", "-inf", "-1", "1e300", "1e999", "1001")
Cli = Callable[..., Result]


@pytest.mark.parametrize("told", [*WRONG, "seven"])
@pytest.mark.parametrize("command", ["sample", "eval systems"])
def test_commands_take_no_other(cli: Cli, student: Path, tmp_path: Path, command: str, told: str) -> None:
    more = ("--prompt", "a ring") if command == "sample" else ("--data", "shapes", "--num-images", 4)
    result = cli(*command.split(), "--model", student, *more, "--guidance", told, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    *_, last = result.stderr.splitlines()
    said = "'seven' is not a number" if told == "seven" else "a guidance scale is a finite number from 0 to 1000, not "
    assert last.startswith(f"Error: Invalid value for '--guidance': {said}")
    assert not (tmp_path / "out").exists()


STAGES = {"stages": [{"steps": 2, "updates": 2}]}
CONFIGS: dict[str, tuple[type[Strict], dict[str, Any]]] = {
    "pd": (ProgressiveConfig, STAGES),
    "lcm": (ConsistencyConfig, {"updates": 2}),
    "dmd2": (MatchingConfig, {"updates": 2}),
    "a row": (SeededSystemConfig, {"name": "x", "model": "shapes"}),
    "a row of systems.yaml": (SystemSpec, {"title": "x"}),
    "covariate shift": (CovariateShiftConfig, {}),
}


@pytest.mark.parametrize("told", [float(word) for word in WRONG])
@pytest.mark.parametrize("name", CONFIGS)
def test_protocols_take_no_other(name: str, told: float) -> None:
    config, rest = CONFIGS[name]
    validate(config, rest | {"guidance_scale": 7.5}, "the protocol")
    with pytest.raises(WrongCommand, match=r"^the protocol has a value that does not fit at 'guidance_scale'"):
        validate(config, rest | {"guidance_scale": told}, "the protocol")


@pytest.mark.parametrize("told", [[2, float("nan")], [2, 1e300], [float("inf"), 3], [-1, 3]])
def test_ranges_take_no_other(told: list[float]) -> None:
    with pytest.raises(WrongCommand, match=r"^the protocol has a value that does not fit"):
        validate(ConsistencyConfig, {"updates": 2, "guidance_range": told}, "the protocol")


@pytest.mark.parametrize("told", [float(word) for word in WRONG])
def test_a_model_brings_no_other_and_is_given_no_other(student: Path, tmp_path: Path, told: float) -> None:
    folder = edited(student, tmp_path / "student", "ddil.json", guidance_scale=told)
    with pytest.raises(DdilError) as error:
        load_model(str(folder))
    assert str(error.value).startswith(
        f"the file {folder / 'ddil.json'} has a value that does not fit at 'guidance_scale': "
    )
    with pytest.raises(WrongCommand, match="^a guidance scale is a finite number from 0 to 1000, not "):
        sample(load_model(str(student)), ["a ring"], guidance_scale=told)
    for make in (lambda: Sampling(guidance_scale=told), lambda: load_model(str(student)).guided(told)):
        with pytest.raises(WrongCommand, match="^a guidance scale"):
            make()


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("steps", 0, "steps"),
        ("steps", "four", "steps"),
        ("timesteps", [999, float("nan")], "timesteps.1"),
        ("bounds", {"centre": [0.0], "bound": [float("inf")], "quantile": 1.0}, "bounds.bound.0"),
        ("bounds", {"centre": [0.0] * 8, "bound": [0.0] * 8, "quantile": 1.0}, "bounds.bound.0"),
        ("bounds", {"centre": [0.0] * 8, "bound": [-1.0] * 8, "quantile": 1.0}, "bounds.bound.0"),
        ("bounds", {"centre": [0.0], "bound": [1.0] * 8, "quantile": 1.0}, "bounds"),
        ("bounds", {"centre": [0.0], "bound": [1.0], "quantile": -5}, "bounds.quantile"),
        ("reflection", "mirror", "reflection"),
    ],
)
def test_the_rest_of_ddil_json_is_looked_at_too(
    student: Path, tmp_path: Path, key: str, value: Any, place: str
) -> None:
    folder = edited(student, tmp_path / "student", "ddil.json", **{key: value})
    with pytest.raises(DdilError) as error:
        load_model(str(folder))
    assert str(error.value).startswith(f"the file {folder / 'ddil.json'} has a value that does not fit at '{place}': ")
    assert "\n" not in str(error.value)


def test_bounds_of_another_width_and_misspelt_keys_are_refused(student: Path, tmp_path: Path) -> None:
    """One number would hold for all channels, and a misspelt setting for nothing."""
    bounds = {"centre": [0.0], "bound": [1.0], "quantile": 1.0}
    folder = edited(student, tmp_path / "one", "ddil.json", bounds=bounds)
    with pytest.raises(DdilError, match="has bounds for 1 channels, and the model's latents have 8"):
        load_model(str(folder))
    folder = edited(student, tmp_path / "misspelt", "ddil.json", guidance=7.0)
    with pytest.raises(DdilError, match="has the unknown key 'guidance'; did you mean 'guidance_scale'?"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", "1e38"), ("learning_rate", "2"), ("betas.0", "1.5"), ("betas.1", "1.0"), ("betas.0", "-0.1")],
)
def test_settings_of_the_optimiser_that_overflow_are_refused(cli: Cli, tmp_path: Path, key: str, value: str) -> None:
    result = cli("distill", "--set", "betas=[0.9,0.99]", "--set", f"{key}={value}", "--out", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"has a value that does not fit at '{key}': it takes a number " in result.stderr


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "gradient_clip", "betas.0", "reflection.quantile"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_no_number_of_a_protocol_is_nan_or_infinite(cli: Cli, tmp_path: Path, key: str, value: str) -> None:
    base = ("--set", "betas=[0.9,0.99]", "--set", "reflection={}")
    result = cli("distill", *base, "--set", f"{key}={value}", "--out", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"has a value that does not fit at '{key}': it takes a finite number " in result.stderr
    assert not (tmp_path / "run").exists()


def test_guidance_that_is_meant_is_taken(cli: Cli, student: Path, tmp_path: Path) -> None:
    for told in ("0", "1", "7.5", "1000"):
        result = cli("sample", "--model", student, "--prompt", "a ring", "--steps", 1, "--guidance", told, "--device", "cpu",
                     "--out", tmp_path / told, "--json")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert len(json.loads(result.stdout)["images"]) == 1


@pytest.fixture
def without_scale(student: Path, tmp_path: Path) -> Path:
    """A pipeline whose folder says nothing of its sampling."""
    folder = edited(student, tmp_path / "without", "unet/config.json")
    (folder / "ddil.json").unlink()
    return folder


ASSUMED = "names no guidance scale, so that diffusers' default 7.5 is assumed; say another with --guidance or with "


@pytest.mark.parametrize("command", ["sample", "eval systems"])
def test_the_guidance_of_a_model_is_printed_and_an_assumed_one_is_a_warning(
    cli: Cli, without_scale: Path, tmp_path: Path, command: str
) -> None:
    more = ("--prompt", "a ring") if command == "sample" else (
        "--data", "shapes", "--num-images", 4, "--metrics", "drawn_right"
    )  # fmt: skip
    shared = (*command.split(), "--model", without_scale, *more, "--steps", 2, "--device", "cpu", "--json")
    assumed = cli(*shared, "--out", tmp_path / "assumed")
    assert assumed.exit_code == 0, assumed.stderr
    assert assumed.stderr.count(f"warning: '{without_scale}' {ASSUMED}") == 1
    assert f"{without_scale}: 2 steps of ddim, guidance 7.5" in assumed.stderr.splitlines()
    said = cli(*shared, "--guidance", 7.5, "--out", tmp_path / "said")  # the same value, but meant
    assert ASSUMED not in said.stderr
    for result in (assumed, said):
        document = json.loads(result.stdout)
        if command == "sample":
            assert document["sampling"] == {"steps": 2, "solver": "ddim", "guidance_scale": 7.5}
        else:
            assert (document[0]["solver"], len(document[0]["grid"]), document[0]["guidance_scale"]) == ("ddim", 2, 7.5)


def test_python_is_warned_too(without_scale: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(load_model(str(without_scale)), ["a ring"], steps=1)
    assert ASSUMED in capsys.readouterr().err


def test_the_guidance_of_a_distillation(cli: Cli, tmp_path: Path) -> None:
    """For LCM it is that of the student, inside the range; a LoRA has none."""
    refused = cli("distill", "--method", "lcm", "--guidance", 3, "--out", tmp_path / "run")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.endswith(
        "guidance_scale is 3, outside guidance_range, 1.5 to 2.25, in which the student is trained; choose one inside, or "
        "another range\n"
    )
    for lcm in (("--method", "lcm"), ("--protocol", "shapes/lcm.yaml")):  # the latter has no section `lora` of its own
        refused = cli("distill", *lcm, "--lora", "--guidance", 2, "--out", tmp_path / "run")
        assert refused.exit_code == 2
        assert refused.stderr.endswith("has no effect; say --set 'guidance_range=[G, G]'\n")
    assert not (tmp_path / "run").exists()
