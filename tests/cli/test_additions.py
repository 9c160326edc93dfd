"""Another package adds one row to each registry, and each row runs through the command line.

The package is one file (``tests/toys.py``), copied out of the checkout, with entry points. One process runs all commands,
since the import of torch takes longer than they do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ddil_core.models.model import load_model
from ddil_eval.report.records import Record, read_records

ENTRY_POINTS = """
[ddil.solvers]
toy_ddim = toys:SOLVER
[ddil.metrics]
toy_redness = toys:METRIC
[ddil.methods]
toy_copy = toys:METHOD
[ddil.inverters]
toy_words = toys:INVERTER
[ddil.datasets]
toy_reds = toys:DATA
[ddil.experiments]
toy-sum = toys:EXPERIMENT
"""

RUN_ALL = """
import json, sys
from click.testing import CliRunner
from ddil_eval.cli import ddil
results = {}
for name, command in json.load(sys.stdin).items():
    result = CliRunner().invoke(ddil, command, catch_exceptions=False)
    results[name] = (result.exit_code, result.stdout, result.stderr)
print(json.dumps(results))
"""


class Outcome(NamedTuple):
    """What a command left: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with the other package, as pip installs one."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(root / "tests" / "toys.py", site / "toys.py")
    information = site / "toys-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def outcomes(site: Path, out: Path, root: Path, teacher: Path) -> dict[str, Outcome]:
    """Run every command that a test looks at, and return what each left."""
    (out / "toy_copy.yaml").write_text("method: toy_copy\npool: 8\nbatch_size: 4\n")
    (out / "toy-sum.yaml").write_text("experiment: toy-sum\nnumbers: [1, 2, 3]\n")
    commands: dict[str, list[object]] = {
        "help of sample": ["sample", "--help"],
        "help of distill": ["distill", "--help"],
        "help of run": ["eval", "run", "--help"],
        "help of prompt-inversion": ["eval", "prompt-inversion", "--help"],
        "metrics": ["metrics", "--json"],
        "data": ["data", "--json"],
        "sample": ["sample", "--model", teacher, "--prompt", "red", "--steps", 2, "--solver", "toy_ddim",
                   "--device", "cpu", "--out", out / "sample", "--json"],
        "ddim": ["sample", "--model", teacher, "--prompt", "red", "--steps", 2, "--solver", "ddim",
                 "--device", "cpu", "--out", out / "ddim", "--json"],
        "distill": ["distill", "--teacher", teacher, "--method", "toy_copy", "--protocol", out / "toy_copy.yaml",
                    "--no-ddil", "--data", "toy_reds", "--device", "cpu", "--out", out / "run", "--json"],
        "systems": ["eval", "systems", "--model", teacher, "--data", "toy_reds", "--recipe", "shapes", "--steps", 2,
                    "--num-images", 4, "--set", "reference_images=4", "--metrics", "toy_redness",
                    "--device", "cpu", "--out", out / "systems", "--json"],
        "inversion": ["eval", "prompt-inversion", "--teacher", teacher, "--model", teacher, "--data", "toy_reds",
                      "--inverter", "toy_words", "--towers", "shapes", "--num-images", 2, "--set", "inverters={}",
                      "--set", "images_per_prompt=2", "--set", "figures=1", "--set", "batch_size=2",
                      "--device", "cpu", "--out", out / "inversion", "--json"],
        "experiment": ["eval", "run", out / "toy-sum.yaml", "--device", "cpu", "--out", out / "experiment", "--json"],
    }  # fmt: skip
    words = {name: [str(word) for word in command] for name, command in commands.items()}
    path = os.pathsep.join(map(str, (site, root)))
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(words), env={**os.environ, "PYTHONPATH": path}, cwd=out,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return {name: Outcome(*result) for name, result in json.loads(run.stdout.splitlines()[-1]).items()}


def one_record(outcome: Outcome, folder: Path, **cell: object) -> Record:
    """Return the record of a cell, from a command that succeeded."""
    assert outcome.status == 0, outcome.stderr
    (record,) = (
        record for record in read_records(folder) if all(record.cell[key] == value for key, value in cell.items())
    )
    return record


def test_help_and_lists_show_the_additions(outcomes: dict[str, Outcome]) -> None:
    for name, row in (("sample", "toy_ddim"), ("distill", "toy_copy"), ("distill", "toy_reds"), ("run", "toy-sum"),
                      ("prompt-inversion", "toy_words")):  # fmt: skip
        assert row in outcomes[f"help of {name}"].stdout
    for name, row in (("metrics", "toy_redness"), ("data", "toy_reds")):
        assert row in [entry["name"] for entry in json.loads(outcomes[name].stdout)]


def test_a_solver_samples(outcomes: dict[str, Outcome], out: Path) -> None:
    for name in ("sample", "ddim"):
        assert outcomes[name].status == 0, outcomes[name].stderr
    images = [(out / name / "000-00.png").read_bytes() for name in ("sample", "ddim")]
    assert images[0] == images[1]


def test_a_distiller_trains_on_an_added_data_set(outcomes: dict[str, Outcome], out: Path) -> None:
    assert outcomes["distill"].status == 0, outcomes["distill"].stderr
    student = load_model(str(out / "run"))
    assert (student.sampling.steps, student.sampling.guidance_scale) == (2, 1.0)


def test_a_metric_is_measured_on_an_added_data_set(outcomes: dict[str, Outcome], out: Path) -> None:
    record = one_record(outcomes["systems"], out / "systems", kind="system")
    assert (record.data["reference"], record.n_done) == ("toy_reds", 4)
    assert 0 < record.metrics["toy_redness"].estimate.value < 1


def test_an_inverter_makes_the_prompts(outcomes: dict[str, Outcome], out: Path) -> None:
    record = one_record(outcomes["inversion"], out / "inversion", kind="inverter")
    assert (record.cell["name"], record.data["reference"], record.n_done) == ("toy_words", "toy_reds", 2)


def test_an_experiment_runs_from_its_protocol(outcomes: dict[str, Outcome], out: Path) -> None:
    record = one_record(outcomes["experiment"], out / "experiment", kind="sum")
    assert record.metrics["toy_sum"].estimate.value == 6
