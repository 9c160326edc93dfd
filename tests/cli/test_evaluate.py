"""``ddil eval``: from pipelines to records, figures and the paper's tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from ddil_core.support.protocol import content_hash
from ddil_eval.cli import ddil
from ddil_eval.experiments.covariate_shift import NOT_HASHED
from ddil_eval.experiments.results import hashed
from ddil_eval.report.records import read_records
from ddil_eval.report.strips import read_strips

SMALL = [
    argument
    for setting in (
        "teacher_steps=8",
        "reference_images=12",
        "metrics=[drawn_right, fd_efflite0]",
        "figure_prompts=2",
        "chunk=4",
        "batch_size=16",
    )
    for argument in ("--set", setting)
]


def arguments(teacher: Path, student: Path, out: Path) -> list[str]:
    models = ["--teacher", str(teacher), "--student", str(student), "--device", "cpu"]
    return ["eval", "covariate-shift", *models, "--num-prompts", "6", "--out", str(out), *SMALL]


@pytest.fixture(scope="module")
def shift(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out, often = tmp_path_factory.mktemp("results"), {"DDIL_PROGRESS_EVERY": "0.001"}
    return out, CliRunner(env=often).invoke(ddil, arguments(teacher, student, out), catch_exceptions=False)


def test_covariate_shift_writes_records_and_figures(shift: tuple[Path, Result], student: Path) -> None:
    out, result = shift
    assert result.exit_code == 0, result.stderr
    (folder,) = (out / "covariate-shift").iterdir()
    assert folder.name.startswith(f"{student.name}-")
    assert {path.name for path in folder.iterdir()} == {
        *("figure2.png", "shift-curves.png", "evaluations.json", "strips", "protocol.yaml")
    }
    records = read_records(out)
    assert len(records) == 12
    assert {name for record in records for name in record.metrics} == {"drawn_right", "fd_efflite0"}
    assert all(record.metrics["fd_efflite0"].estimate.value > 0 for record in records)
    assert all(record.protocol["num_prompts"] == 6 and record.protocol["teacher_steps"] == 8 for record in records)
    for figure in ("figure2.png", "shift-curves.png"):
        with Image.open(folder / figure) as picture:
            assert picture.width > 300 and picture.height > 200
    strip = read_strips(folder / "strips" / "figure2")[0]
    assert (strip.columns[0], strip.columns[-1]) == ("student alone", "teacher alone")


def test_how_each_model_is_sampled_is_printed_and_recorded(
    shift: tuple[Path, Result], teacher: Path, student: Path
) -> None:
    out, result = shift
    said = result.stderr.splitlines()
    assert f"{teacher}: 8 steps of ddim, guidance 3" in said and f"{student}: 4 steps of ddim, guidance 1" in said
    for record in read_records(out):
        assert record.protocol["sampling"] == {
            "teacher": {"steps": 8, "solver": "ddim", "guidance_scale": 3.0},
            "student": {"steps": 4, "solver": "ddim", "guidance_scale": 1.0},
        }
        assert record.guidance_scale == 3.0
        assert record.protocol_hash == content_hash(hashed(record.protocol, NOT_HASHED))
        assert {"sampling", "teacher", "student"} <= NOT_HASHED


def test_covariate_shift_prints_its_tables(shift: tuple[Path, Result]) -> None:
    out, result = shift
    for title in ("Pure runs", "Table 2", "Table 3", "Table 4"):
        assert title in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Records, figures and the cost of the rollouts are in")
    assert f"ddil report --results {out}" in result.stdout
    assert "rollouts" not in result.stdout.split("Pure runs")[0]  # progress goes to stderr
    assert "rollouts" in result.stderr


def test_json_is_one_document_and_a_second_run_adds_no_record(
    cli: Callable[..., Result], shift: tuple[Path, Result], teacher: Path, student: Path
) -> None:
    out, _ = shift
    before = sorted((out / "records").iterdir())
    result = cli(*arguments(teacher, student, out), "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert sorted(json.dumps(row["cell"]) for row in document) == sorted(json.dumps(r.cell) for r in read_records(out))
    assert sorted((out / "records").iterdir()) == before


def test_the_report_makes_the_papers_tables(
    cli: Callable[..., Result], shift: tuple[Path, Result], tmp_path: Path
) -> None:
    out, _ = shift
    result = cli("report", "--results", out, "--csv", "--latex", "--out", tmp_path)
    assert result.exit_code == 0
    tables = {path.stem: path for path in tmp_path.rglob("*.csv")}
    assert {path.stem for path in tmp_path.rglob("*.tex")} == set(tables) >= {"pure", "table2", "table3", "table4"}
    for name, key, places in (
        ("table2", "p_teacher", [0.8, 0.6, 0.4, 0.2]),
        ("table3", "switch_t", [749, 500, 250]),
        ("table4", "switch_t", [749, 500, 250]),
    ):
        with tables[name].open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(row[key]) for row in rows] == places
        for row in rows:
            low, value, high = (float(row[f"fd_efflite0{end}"]) for end in ("_low", "", "_high"))
            assert low <= value <= high
    assert all("\\toprule" in path.read_text() for path in tmp_path.rglob("*.tex"))


def test_options_override_the_protocol(
    cli: Callable[..., Result], teacher: Path, student: Path, tmp_path: Path
) -> None:
    protocol = tmp_path / "mine.yaml"
    protocol.write_text(yaml.safe_dump({"teacher_steps": 4, "metrics": ["drawn_right"], "num_prompts": 50}))
    result = cli(
        *("eval", "covariate-shift", "--teacher", teacher, "--student", student, "--protocol", protocol),
        *("--p-teacher", "0.5", "--switch", "500", "--num-prompts", 4, "--seed", 3, "--factorial"),
        *("--set", "figure_prompts=0", "--out", tmp_path / "out", "--device", "cpu", "--json", "--guidance", 1.5),
    )
    assert result.exit_code == 0
    assert f"{teacher}: 4 steps of ddim, guidance 1.5" in result.stderr.splitlines()
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert [row["cell"] for row in rows[2:5]] == [
        {"kind": "p_teacher", "p_teacher": 0.5},
        {"kind": "teacher_then_student", "switch_t": 500},
        {"kind": "student_then_teacher", "switch_t": 500},
    ]
    kinds = [row["cell"]["kind"] for row in rows]
    assert (kinds.count("string"), kinds.count("effect"), len(rows)) == (16, 10, 31)
    assert {(row["n_done"], row["seeds"][0], row["protocol"]["teacher_steps"]) for row in rows} == {(4, 3, 4)}
    assert {row["guidance_scale"] for row in rows} == {1.5}
    assert list((tmp_path / "out").rglob("shift-curves.png")) and not list((tmp_path / "out").rglob("figure2.png"))


@pytest.fixture
def protocol(teacher: Path, student: Path, tmp_path: Path) -> Path:
    path = tmp_path / "systems.yaml"
    systems = [
        {"name": "teacher", "model": str(teacher), "steps": 4},
        {"name": "student", "model": str(student), "steps": 4},
    ]
    content = {
        "experiment": "systems",
        "systems": systems,
        "differences": [["student", "teacher"]],
        "num_prompts": 8,
        "metrics": ["drawn_right"],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_protocol_of_systems_runs(cli: Callable[..., Result], protocol: Path, tmp_path: Path) -> None:
    result = cli("eval", "run", protocol, "--set", "num_prompts=5", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0
    assert "Systems" in result.stdout and "Differences" in result.stdout
    assert {(record.kind, record.n_done) for record in read_records(tmp_path / "out")} == {
        ("system", 5),
        ("difference", 5),
    }


def test_a_protocol_of_covariate_shift_runs_with_the_student_that_it_names(
    cli: Callable[..., Result], teacher: Path, student: Path, root: Path, tmp_path: Path
) -> None:
    path = root / "protocols" / "shapes" / "covariate-shift.yaml"
    refused = cli("eval", "run", path, "--out", tmp_path / "out", "--device", "cpu")
    assert (refused.exit_code, refused.stdout) == (2, "")
    sentence = "error: the analysis needs a student; name one with --student, or with --set student=REF\n"
    assert refused.stderr == sentence and not (tmp_path / "out").exists()
    small = (
        "teacher_steps=4",
        "num_prompts=4",
        "metrics=[drawn_right]",
        "figure_prompts=0",
        "p_teacher=[0.5]",
        "switch=[]",
    )
    settings = [word for setting in (f"teacher={teacher}", f"student={student}", *small) for word in ("--set", setting)]
    result = cli("eval", "run", path, *settings, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert [record.kind for record in read_records(tmp_path / "out")] == ["p_teacher", "pure", "pure"]


def test_an_unknown_experiment_is_refused_with_those_that_there_are(
    cli: Callable[..., Result], protocol: Path, tmp_path: Path
) -> None:
    result = cli("eval", "run", protocol, "--set", "experiment=system", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: the experiment 'system' is not known; it may be one of systems, covariate-shift, drift, prompt-inversion, "
        "score; did you mean 'systems'?\n"
    )


def test_an_experiment_that_keeps_no_images_refuses_to(cli: Callable[..., Result], root: Path, tmp_path: Path) -> None:
    path = root / "protocols" / "shapes" / "table5.yaml"
    result = cli("eval", "run", path, "--save-images", "--out", tmp_path / "out", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: the experiment 'prompt-inversion' keeps no images; leave out --save-images\n"


def test_each_missing_thing_has_a_line_of_its_own(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``eval run`` lists them, with one sentence at the end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    models = ("--model", "sd15", "--model", "lcm")
    result = cli("eval", "coco", *models, "--data", f"coco2014:{tmp_path / 'none'}", "--out", tmp_path / "out")
    *lines, last = result.stderr.splitlines()
    assert (result.exit_code, last) == (1, "error: provide what is named above, and run the same command again")
    parts = ("data coco2014", "metric fid", "metric clip_score", "sd15", "lcm")
    assert len(lines) == len(parts)
    assert all(line.startswith(f"not here: {part}:") for line, part in zip(lines, parts, strict=True))
    assert not (tmp_path / "out").exists()
