"""What a format cannot hold is refused in one sentence, before weights are read and before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddil_core.export.export import export, prepare
from ddil_core.export.finished import FinishedRun
from ddil_core.support.checksums import Damaged
from ddil_core.support.errors import DdilError, WrongCommand

Runs = Callable[[str], Path]


def refused(run: Path, to: str, kind: type[DdilError] = WrongCommand, **more: Any) -> str:
    out = run.parent / "refused"
    with pytest.raises(DdilError) as error:
        prepare(run, to, out, **more)
    assert type(error.value) is kind and "\n" not in str(error.value)
    assert not out.exists()
    return str(error.value).replace(str(run), "RUN")


@pytest.fixture
def light(runs: Runs, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run without any weights, with other values in its files."""

    def make(name: str, settings: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> Path:
        out = tmp_path / name
        shutil.copytree(runs(name), out, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints"))
        for file, values in (("ddil.json", settings), ("scheduler/scheduler_config.json", scheduler)):
            path = out / "student" / file
            path.write_text(json.dumps(json.loads(path.read_text()) | (values or {})))
        return out

    return make


def test_what_is_no_finished_run(light: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", "diffusers") == (
        "RUN is no run of 'ddil distill', as it has no run.yaml; name the --out of one"
    )
    run = light("pd")
    (run / "student" / "ddil.json").unlink()
    assert "has no ddil.json, which says how it is sampled" in refused(run, "diffusers", DdilError)
    shutil.rmtree(run / "student")
    assert "has no student yet; finish it with 'ddil distill … --resume'" in refused(run, "diffusers")


def test_names_and_folders(light: Callable[..., Path]) -> None:
    run = light("pd")
    assert "the format 'zip' is not known; it may be one of diffusers, single-file, lora, comfyui" in refused(
        run, "zip"
    )
    assert "is no name of a model" in refused(run, "diffusers", name="a/b")
    assert "belongs to --to comfyui" in refused(run, "lora", checkpoint="a.safetensors")
    with pytest.raises(WrongCommand, match="exists and is not overwritten; name another --out"):
        prepare(run, "diffusers", run)


def test_a_whole_student_is_no_lora(light: Callable[..., Path]) -> None:
    assert refused(light("pd"), "lora") == (
        "the run in RUN trained a whole student and no LoRA; distil one with --lora, or export it --to diffusers"
    )


@pytest.mark.parametrize("to", ["single-file", "comfyui"])
def test_a_guidance_embedding_has_no_name_in_a_single_file(light: Callable[..., Path], to: str) -> None:
    assert "has an embedding of its guidance scale" in refused(light("lcm"), to)


@pytest.mark.parametrize(
    ("to", "settings", "words"),
    [
        ("diffusers", {"reflection": "clamp"}, "is sampled with reflection clamp, which no other program does"),
        ("diffusers", {"ends_clean": False}, "is sampled with an end at timestep 0"),
        ("diffusers", {"solver": "heun"}, "is sampled with heun, and export knows no scheduler of diffusers for it"),
        ("single-file", {"prediction": "sample"}, "predicts sample, which no single file can say"),
        ("comfyui", {"guidance_scale": 2.0}, "is sampled with guidance 2"),
        (
            "comfyui",
            {"timesteps": [399], "steps": 1},
            "starts from pure noise at t = 399, and ComfyUI does so at t = 999",
        ),
        (
            "comfyui",
            {"timesteps": [999, 4], "steps": 2},
            "takes a step at t = 4, where LCM's boundary conditions count",
        ),
    ],
)
def test_a_student_that_would_be_sampled_in_another_way(
    light: Callable[..., Path], to: str, settings: dict[str, Any], words: str
) -> None:
    assert words in refused(light("dmd2", settings), to)


def test_comfyui_has_one_noise_schedule(light: Callable[..., Path]) -> None:
    assert "has another noise schedule than Stable Diffusion's" in refused(
        light("pd", scheduler={"beta_end": 0.013}), "comfyui"
    )


def test_the_base_of_a_workflow(runs: Runs, light: Callable[..., Path]) -> None:
    assert "give it, as in --checkpoint" in refused(runs("lora"), "comfyui")
    assert "--checkpoint names the base of a LoRA" in refused(light("pd"), "comfyui", checkpoint="a.safetensors")


def test_damaged_weights_are_found(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("pd"), run)
    (weights,) = (run / "student" / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    finished, options = prepare(run, "diffusers", tmp_path / "out")
    with pytest.raises(Damaged):
        export(finished, options, "diffusers", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_export_leaves_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder gets its name when all is in it."""

    def dies(run: FinishedRun, *rest: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    finished, options = prepare(runs("pd"), "single-file", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("ddil_core.export.single_file.write_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            export(finished, options, "single-file", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export(finished, options, "single-file", tmp_path / "out").folder.is_dir()
