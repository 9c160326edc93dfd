"""``ddil demo``"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from ddil_core.support import ranks
from ddil_eval.cli import options

NOTICE = "This is a demonstration. Its students train for minutes only, so its numbers say nothing about the methods."


@click.command()
@click.option(
    "--out", type=options.OUTPUT_FOLDER, default=Path("runs/demo"), show_default=True,
    help="The folder for students, records, tables and figures.",
)  # fmt: skip
@options.device_option
@options.quiet_option
def demo(out: Path, device: str | None) -> None:
    """Distil two 4-step students of the shapes teacher, with and without DDIL, and analyse them.

    The demonstration takes some minutes on two CPU cores. After an interruption, the same command continues.
    """
    ranks.require_one("the demonstration")
    options.quiet_libraries()
    from ddil_core.support.lock import held

    with held(out):
        _demonstrate(out, options.choose_device(device))


def _demonstrate(out: Path, device: str) -> None:
    """Train both students, measure them, and write the tables and figures."""
    from ddil_core.distillation.config import ProgressiveConfig
    from ddil_core.distillation.distill import distill
    from ddil_core.support.progress import console, note
    from ddil_core.support.protocol import read_yaml, validate
    from ddil_core.support.resources import protocols
    from ddil_eval.experiments.covariate_shift import CovariateShiftConfig, analyse_covariate_shift
    from ddil_eval.experiments.systems import SystemsConfig, compare_systems

    path = protocols() / "shapes" / "demo.yaml"
    content = read_yaml(path)
    console.print(NOTICE)
    students = {}
    for name in ("PD", "DDIL"):
        console.rule(f"distil a 4-step student: {name}")
        settings = {key: value for key, value in content["distill"].items() if key != "ddil" or name == "DDIL"}
        students[name] = out / name.lower()
        encoded = _share_encoded_data(students["PD"], students[name])
        config = validate(ProgressiveConfig, settings, str(path))
        distill("shapes", "shapes", config, students[name], resume=encoded, device=device)
    console.rule("systems side by side")
    systems = _with_students(content["systems"], students)
    if _measured(out, "systems") < len(systems["systems"]) + len(systems["differences"]):
        compare_systems(validate(SystemsConfig, systems, str(path)), out, device)
    console.rule("teacher and student take turns")
    shift = content["covariate_shift"] | {"teacher": "shapes", "student": str(students["DDIL"])}
    analysis = validate(CovariateShiftConfig, shift, str(path))
    measured = _measured(out, "covariate-shift") >= 2 + len(analysis.p_teacher) + 2 * len(analysis.switch)
    if not (measured and (analysis.figures_folder(out) / "figure2.png").is_file()):
        analyse_covariate_shift(analysis, out, device)
    _report(out)
    note(f"Figure 2 is {analysis.figures_folder(out) / 'figure2.png'}")
    console.print(NOTICE)


def _share_encoded_data(first: Path, student: Path) -> bool:
    """Give a run the data that the first run encoded: both encode the same images with the same teacher.

    Returns:
        Whether the run folder of ``student`` has begun, so that a distillation must go on in it.
    """
    from ddil_core.support.checksums import require_checksum, with_checksum

    theirs, ours = (folder / "checkpoints" / "data.safetensors" for folder in (first, student))
    if theirs.is_file() and not ours.is_file() and not (student / "student").is_dir():
        ours.parent.mkdir(parents=True, exist_ok=True)
        require_checksum(theirs, "the file of the encoded data", "delete it to make it again")
        with with_checksum(ours) as temporary:
            shutil.copyfile(theirs, temporary)
    return ours.is_file()


def _with_students(systems: dict[str, Any], students: dict[str, Path]) -> dict[str, Any]:
    """Return the comparison, with run folders in place of the names of the two students."""
    rows = [row | {"model": str(students.get(row["model"], row["model"]))} for row in systems["systems"]]
    return systems | {"systems": rows}


def _measured(out: Path, experiment: str) -> int:
    """Return the number of cells of an experiment that an earlier demo in this folder measured."""
    from ddil_eval.report.records import read_records

    return sum(record.experiment == experiment and record.kind != "pair" for record in read_records(out))


def _report(out: Path) -> None:
    """Print the tables and write them as CSV and LaTeX."""
    from ddil_eval.cli.report import report

    click.get_current_context().invoke(
        report, results=out, as_csv=True, as_latex=True, figures=False, out=out / "report", as_json=False
    )
