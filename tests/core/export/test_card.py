"""The model card says what the run and the records say, names what they do not say, and tells no path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddil_core.export.base import Base, base_of
from ddil_core.export.card import Measured, write_card
from ddil_core.export.finished import open_finished
from ddil_core.export.options import Options
from ddil_core.support.files import write_text
from ddil_eval.report.model_card import measured_of
from tests.records import record

Runs = Callable[[str], Path]


def card_of(run: Path, out: Path, kind: str = "diffusers", measured: Measured | None = None, **changed: Any) -> str:
    finished = open_finished(run)
    finished.content |= changed
    write_card(finished, out, kind, Options("student"), "How to sample it.", measured or Measured())
    return (out / "README.md").read_text()


def header_of(card: str) -> dict[str, Any]:
    start, header, _ = card.split("---\n", 2)
    assert start == ""
    content: dict[str, Any] = yaml.safe_load(header)
    return content


def test_a_card_says_what_the_run_says(runs: Runs, tmp_path: Path) -> None:
    run = open_finished(runs("pd"))
    card = card_of(runs("pd"), tmp_path)
    assert header_of(card) == {
        "license": "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "safetensors", "distillation", "few-step", "ddil-pd"],
    }
    for fact in (
        "| timesteps | 999, 749, 500, 250 |",
        "| guidance scale | 1 (none) |",
        "| predicts | v_prediction |",
        "| teacher | a local model, `pipeline` |",
        f"| its weights, SHA-256 | {run.content['teacher_sha256']} |",
        f"| weights of the student, SHA-256 | {run.model.weights_sha256()} |",
        "| licence of the teacher | unverified: nobody read it at its source for ddil |",
        "| training data | `shapes`, 4 images |",
        "| licence of the data | not recorded |",
        "| how the teacher was used | steps 8, solver ddim, guidance scale 3.0 |",
        "Nothing: no record of these weights was given.",
        "How to sample it.",
    ):
        assert fact in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config == run.content["config"]


def test_a_card_tells_no_path_of_the_machine(runs: Runs, tmp_path: Path) -> None:
    card = card_of(runs("pd"), tmp_path, data="folder:/home/someone/secret/train")
    assert "folder:train" in card
    assert not any(part in card for part in ("/home", "secret", str(runs("pd").parent)))


def test_what_a_run_does_not_say_is_named_as_missing(runs: Runs, tmp_path: Path) -> None:
    card = card_of(runs("pd"), tmp_path, commit=None, versions=None)
    assert "| commit of ddil | not recorded |" in card and "| versions | not recorded |" in card


def test_the_base_of_a_lora_is_named_to_the_hub(runs: Runs, tmp_path: Path) -> None:
    card = card_of(runs("lora"), tmp_path, "lora", teacher="lcm")
    header = header_of(card)
    assert (header["license"], header["base_model"]) == ("mit", "SimianLuo/LCM_Dreamshaper_v7")
    assert header["base_model_relation"] == "adapter" and "lora" in header["tags"]
    assert "| licence of the teacher | mit |" in card


def test_bases(runs: Runs, tmp_path: Path) -> None:
    assert base_of("shapes") == Base("`shapes`, shipped with ddil", None, "apache-2.0")
    assert base_of("sd15").hub == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert base_of("sd15").licence is None
    assert base_of("SimianLuo/LCM_Dreamshaper_v7").licence == "mit"
    # Another checkpoint in a system's layout is not that system, and a path is no id of the hub.
    assert base_of("sd15:/home/someone/mine.safetensors").hub is None
    assert base_of("runs/teacher") == Base("a local model, `teacher`")
    write_text(tmp_path / "first" / "run.yaml", "{teacher: lcm, data: shapes, config: {}}")
    assert base_of(str(tmp_path / "first")) == Base("`first`, itself a student of LCM (`lcm`)", None, "mit")


def measured(name: str, sha256: str, **changes: Any) -> Any:
    cell = {"kind": "system", "name": name, "steps": 4}
    model = {name: {"reference": "/home/someone/run", "weights_sha256": sha256}}
    return record(cell, **({"experiment": "systems", "systems": model, "nfe": 4.0} | changes))


def test_measurements_are_those_of_these_weights_and_of_the_teacher() -> None:
    records = [
        measured("PD", "b" * 64),
        measured("teacher", "a" * 64),
        measured("LCM", "c" * 64),
        record({"kind": "x"}),
    ]
    found = measured_of(records, "b" * 64, "a" * 64)
    (table,) = found.tables
    lines = table.splitlines()
    assert lines[2] == "| System | Steps | Solver | Guidance | Recipe | fd_efflite0 ↓ | drawn_right ↑ | N | NFE |"
    assert lines[4:6] == [
        f"| {name} | 4 | ddim | 3 | shapes-64 | 12.50 [12.00, 13.00] | 0.750 [0.719, 0.781] | 256 | 4 |"
        for name in ("PD", "teacher")
    ]
    assert "LCM" not in table and "Not measured" not in table and "/home" not in table
    assert found.others == 1  # the record that is no system's, which has the student beside the teacher
    assert measured_of(records, "d" * 64, "a" * 64) == Measured()


@pytest.mark.parametrize("name", ["a|b", "<script>", "a\nb"])
def test_a_name_of_a_record_is_text(name: str) -> None:
    (table,) = measured_of([measured(name, "b" * 64)], "b" * 64, None).tables
    row = table.splitlines()[4]
    assert row.replace("\\|", "").count("|") == 10 and "<" not in row
