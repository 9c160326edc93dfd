"""``ddil export``: what it prints, its exit status, and the records that go into the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ddil_core.distillation.distill import distill
from ddil_core.models.model import load_model
from ddil_eval.report.records import save_record
from tests.records import record

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "my-run"
    config = {"method": "pd", "stages": [{"steps": 4, "updates": 1}], "batch_size": 2, "pool": 4}
    distill(str(teacher), "shapes", config, out, device="cpu")
    return out


def test_a_pipeline_with_a_card(cli: Cli, run: Path, tmp_path: Path) -> None:
    model = {"my student": {"reference": "runs/x", "weights_sha256": load_model(str(run)).weights_sha256()}}
    cell = {"kind": "system", "name": "my student", "steps": 4}
    save_record(record(cell, experiment="systems", systems=model), tmp_path / "results")
    out = tmp_path / "out"
    result = cli("export", run, "--to", "diffusers", "--out", out, "--results", tmp_path / "results", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["to"], told["folder"]) == ("diffusers", str(out))
    assert told["weights_sha256"] == model["my student"]["weights_sha256"]
    assert sorted(told["files"]) == sorted(
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
    )
    card = (out / "README.md").read_text()
    assert "# my-run\n" in card and "| my student | 4 | ddim |" in card and "12.50 [12.00, 13.00]" in card


def test_the_folder_of_its_own_and_a_second_time(cli: Cli, run: Path) -> None:
    result = cli("export", run, "--to", "single-file")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"The student is in {run / 'export' / 'single-file'}; README.md says how to sample it.\n"
    assert (run / "export" / "single-file" / "my-run.safetensors").is_file()
    again = cli("export", run, "--to", "single-file")
    assert (again.exit_code, again.stdout) == (2, "")
    assert (
        again.stderr == f"error: {run / 'export' / 'single-file'} exists and is not overwritten; name another --out\n"
    )


def test_records_of_other_weights_are_no_measurement(cli: Cli, run: Path, tmp_path: Path) -> None:
    save_record(record({"kind": "system", "name": "x", "steps": 4}, experiment="systems"), tmp_path / "results")
    result = cli("export", run, "--to", "comfyui", "--out", tmp_path / "out", "--results", tmp_path / "results")
    assert result.exit_code == 0, result.stderr
    assert f"no record in {tmp_path / 'results'} measured this student's weights" in result.stderr
    assert "ComfyUI will not load this student" in result.stderr  # it is tiny
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing: no record of these weights was given." in card and "will not load these weights" in card


def test_a_refusal_is_one_sentence(cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("export", run, "--to", "lora", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: the run in {run} trained a whole student and no LoRA")
    assert not (tmp_path / "out").exists()
