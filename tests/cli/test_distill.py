"""``ddil distill``: one command makes a student that diffusers loads, and continues after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file

from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.distillation.training_log import Logs
from ddil_core.models.model import load_model

Cli = Callable[..., Result]

TINY = [
    argument
    for setting in (
        "stages=[{steps: 8, updates: 2}, {steps: 4, updates: 3}]",
        "pool=16",
        "batch_size=8",
        "save_every=1",
        "ddil.collect_every=2",
        "ddil.capacity=128",
    )
    for argument in ("--set", setting)
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def distill(cli: Cli, teacher: Path) -> Cli:
    return lambda out, *more: cli("distill", "--teacher", teacher, "--out", out, "--device", "cpu", *TINY, *more)


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with DDIL."""
    from click.testing import CliRunner

    from ddil_eval.cli import ddil

    out = tmp_path_factory.mktemp("runs") / "ddil"
    arguments = ["distill", "--teacher", str(teacher), "--out", str(out), "--device", "cpu", *TINY]
    result = CliRunner().invoke(ddil, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        f"The student is in {out / 'student'}; sample it with: ddil sample --model {out} --prompt '…' --out images\n"
    )
    return out


def test_the_student_is_a_pipeline_of_four_steps(run: Path, teacher: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(run / "student")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    student = load_model(str(run))
    assert (student.sampling.steps, student.sampling.guidance_scale) == (4, 1.0)
    kept, made = load_model(str(teacher)), load_model(str(run / "student"))
    assert equal(kept.pipeline.vae.state_dict(), made.pipeline.vae.state_dict())
    assert equal(kept.pipeline.text_encoder.state_dict(), made.pipeline.text_encoder.state_dict())
    assert not equal(kept.pipeline.unet.state_dict(), made.pipeline.unet.state_dict())


def test_the_run_folder_says_what_was_run(run: Path, teacher: Path) -> None:
    held = yaml.safe_load((run / "run.yaml").read_text())
    assert (held["teacher"], held["data"]) == (str(teacher), "shapes")
    assert held["teacher_sha256"] == load_model(str(teacher)).weights_sha256()
    assert held["config"]["stages"] == [{"steps": 8, "updates": 2}, {"steps": 4, "updates": 3}]
    assert held["config"]["ddil"]["collect_every"] == 2 and held["config"]["seed"] == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("16 → 8 steps", 2), ("8 → 4 steps", 3)]
    assert all(line["loss"] > 0 and line["aggregated_fraction"] > 0 for line in lines)


def test_a_finished_run_is_not_made_again(run: Path, distill: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for more in ((), ("--resume",)):
        result = distill(run, *more)
        assert result.exit_code == 0
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_without_ddil_it_trains_on_data_alone(
    run: Path, distill: Cli, teacher: Path, root: Path, tmp_path: Path
) -> None:
    result = distill(tmp_path / "pd", "--no-ddil", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "run": str(tmp_path / "pd"),
        "student": str(tmp_path / "pd" / "student"),
        "steps": 4,
        "protocol": str(root / "protocols" / "shapes" / "pd.yaml"),
        "sampling": {"steps": 4, "solver": "ddim", "guidance_scale": 1.0},
        "teacher": {"reference": str(teacher), "steps": 16, "solver": "ddim", "guidance_scale": 3.0},
    }
    said = result.stderr.splitlines()
    assert f"{teacher}, the teacher: 16 steps of ddim, guidance 3" in said
    assert f"{tmp_path / 'pd'}, the student: 4 steps of ddim, guidance 1" in said
    held = yaml.safe_load((tmp_path / "pd" / "run.yaml").read_text())
    assert held["config"]["ddil"] is None
    assert "aggregated_fraction" not in (tmp_path / "pd" / "log.jsonl").read_text()
    assert not equal(weights(tmp_path / "pd"), weights(run))


@pytest.mark.parametrize("updates", [1, 4])
def test_an_interrupted_run_ends_with_the_same_weights(
    updates: int, run: Path, distill: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the first stage and in the second."""
    done: list[int] = []
    update = ProgressiveStage.update

    def interrupted(self: ProgressiveStage, step: int) -> Logs:
        if len(done) == updates:
            raise KeyboardInterrupt
        done.append(step)
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressiveStage, "update", interrupted)
        result = distill(tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert not (tmp_path / "run" / "student").exists()
    assert distill(tmp_path / "run", "--resume").exit_code == 0
    assert equal(weights(tmp_path / "run"), weights(run))


def test_the_seed_option_is_the_seed(run: Path, distill: Cli, tmp_path: Path) -> None:
    assert distill(tmp_path / "other", "--seed", 1).exit_code == 0
    assert yaml.safe_load((tmp_path / "other" / "run.yaml").read_text())["config"]["seed"] == 1
    assert not equal(weights(tmp_path / "other"), weights(run))


def test_the_method_is_the_protocols_and_must_be_it(cli: Cli, teacher: Path, root: Path, tmp_path: Path) -> None:
    one = root / "protocols" / "shapes" / "dmd2-1step.yaml"
    told = ("distill", "--teacher", teacher, "--out", tmp_path / "run", "--device", "cpu")
    other = f"{one} is a protocol for the method 'dmd2', not 'lcm'; leave out --method, or name another protocol"
    cases = {
        ("--method", "lcm", "--protocol", one): other,
        (
            "--teacher",
            "gaussians",
            "--method",
            "pd",
            "--lora",
        ): "no shipped protocol trains a LoRA of 'gaussians'; leave out --lora, or name a protocol",
        ("--protocol", one): f"{one} has no 'ddil' section, which --ddil needs; add one, or use --no-ddil",
        ("--method", "dmd"): "the method 'dmd' is not known; it may be one of pd, lcm, tcd, dmd2; did you mean 'dmd2'?",
    }
    for more, sentence in cases.items():
        result = cli(*told, *more)
        assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")
    assert not (tmp_path / "run").exists()


def test_a_printed_protocol_is_what_the_command_uses(cli: Cli, teacher: Path, root: Path, tmp_path: Path) -> None:
    """It needs no --out, starts nothing, and gives the same run again."""
    result = cli("distill", "--method", "dmd2", "--seed", 3, "--set", "pool=99", "--print-protocol")
    assert (result.exit_code, result.stderr) == (0, "")
    content = yaml.safe_load(result.stdout)
    assert (content["method"], content["seed"], content["pool"], content["updates"]) == ("dmd2", 3, 99, 300)
    (tmp_path / "mine.yaml").write_text(result.stdout)
    again = cli("distill", "--protocol", tmp_path / "mine.yaml", "--print-protocol")
    assert yaml.safe_load(again.stdout) == content
    assert yaml.safe_load(cli("distill", "--no-ddil", "--print-protocol").stdout)["ddil"] is None
    assert cli("distill").exit_code == 2
    assert "Missing option '--out'" in cli("distill").stderr


def test_lora_turns_any_protocol_of_lcm_into_one_of_adapters(cli: Cli, root: Path) -> None:
    lcm = ("distill", "--protocol", root / "protocols" / "shapes" / "lcm.yaml", "--lora", "--print-protocol")
    content = yaml.safe_load(cli(*lcm).stdout)
    assert (content["lora"], content["w_embedding"]) == (
        {"rank": 64, "alpha": 64, "targets": None},
        None,
    )
    assert yaml.safe_load(cli(*lcm, "--set", "lora.rank=8").stdout)["lora"]["rank"] == 8
    for setting, sentence in (
        ("w_embedding=256", "a LoRA has no embedding of its guidance; set w_embedding to null"),
        ("lora=null", "--lora trains a LoRA, and --set takes its section away; leave out one of the two"),
    ):
        result = cli(*lcm, "--set", setting)
        assert result.exit_code == 2 and result.stderr.endswith(f"{sentence}\n")


def test_every_protocol_of_a_distillation_fits_its_method(root: Path) -> None:
    from ddil_core.distillation.methods import METHODS
    from ddil_core.support.protocol import read_yaml, validate

    found = {
        path: read_yaml(path) for world in ("shapes", "paper") for path in (root / "protocols" / world).glob("*.yaml")
    }
    distilling = {path: content for path, content in found.items() if "method" in content}
    assert {content["method"] for content in distilling.values()} == set(METHODS)
    for path, content in distilling.items():
        unprinted = {} if "updates" in content or content["method"] == "pd" else {"updates": 1}
        assert not unprinted or path.parent.name == "paper"
        validate(METHODS[content["method"]].config, content | unprinted, str(path))


def test_a_lora_from_the_command(cli: Cli, teacher: Path, tmp_path: Path) -> None:
    tiny = [
        a for s in ("updates=2", "pool=16", "batch_size=4", "ddil.capacity=256", "watch=null") for a in ("--set", s)
    ]
    result = cli(
        "distill",
        "--method",
        "lcm",
        "--lora",
        "--teacher",
        teacher,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--json",
        *tiny,
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 4
    assert (tmp_path / "run" / "student" / "pytorch_lora_weights.safetensors").is_file()
