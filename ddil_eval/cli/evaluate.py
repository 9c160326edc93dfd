"""``ddil eval``: one sub-command for each experiment, and ``run`` for a whole protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_eval.cli import options

RESULTS = click.Path(path_type=Path, file_okay=False)


@click.group(name="eval")
def evaluate() -> None:
    """Measure models; records go to OUT/records, one JSON file for each cell."""


@evaluate.command("covariate-shift")
@click.option("--teacher", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option("--student", required=True, help=options.MODEL_HELP)
@click.option("--data", default=None, help=options.DATA_HELP)
@click.option("--p-teacher", default=None, metavar="P,P,…", help="Rates at which the teacher acts (Table 2).")
@click.option(
    "--switch", default=None, metavar="T,T,…", help="Times at which one hands over to the other (Tables 3, 4)."
)
@click.option("--num-prompts", type=int, default=None, help="How many prompts of the evaluation split.")
@click.option(
    "--factorial", is_flag=True, default=None, help="All teacher/student strings, with effects and interactions."
)
@click.option("--seed", type=int, default=None, help="The seed of noise and decisions, in place of the protocol's.")
@click.option("--out", type=RESULTS, required=True, help="The results folder.")
@options.protocol_options
@options.download_option
@options.device_option
@options.json_option
def covariate_shift(
    teacher: str, student: str, p_teacher: str | None, switch: str | None, out: Path, protocol: Path | None,
    settings: tuple[str, ...], download: bool, device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Let teacher and student take turns: Tables 2, 3, 4 and Figure 2.

    Each prompt follows strings of teacher and student; what strings share is computed once. The same command again goes on
    where it was interrupted.
    """
    from ddil_core.protocol import override, read_yaml, validate
    from ddil_core.resources import protocols
    from ddil_eval.experiments.covariate_shift import CovariateShiftConfig

    path = protocol or protocols() / "shapes" / "covariate-shift.yaml"
    content = override(read_yaml(path), settings)
    given["p_teacher"] = options.numbers(p_teacher, float, "--p-teacher")
    given["switch"] = options.numbers(switch, options.time, "--switch")
    given = {key: value for key, value in given.items() if value is not None}
    config = validate(CovariateShiftConfig, content | given, str(path), options=given)
    options.fetch_missing([teacher, student], download)
    _covariate_shift(teacher, student, config, out, options.choose_device(device), as_json)


@evaluate.command("run")
@click.argument("protocol", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
@click.option("--seed", type=int, default=None, help="The seed of the noise, in place of the protocol's.")
@click.option("--out", type=RESULTS, required=True, help="The results folder.")
@options.download_option
@options.device_option
@options.json_option
def run(
    protocol: Path, settings: tuple[str, ...], seed: int | None, out: Path, download: bool, device: str | None, as_json: bool
) -> None:  # fmt: skip
    """Measure a whole table, as a protocol says."""
    options.quiet_libraries()
    from ddil_core.errors import WrongCommand
    from ddil_core.protocol import override, read_yaml, validate
    from ddil_eval.experiments.systems import SystemsConfig, compare

    content = override(read_yaml(protocol), settings)
    if content.get("experiment", "systems") != "systems":
        raise WrongCommand(
            f"{protocol} is of the experiment {content['experiment']!r}, and 'ddil eval run' takes 'systems'; "
            "give it to its own command with --protocol"
        )
    if seed is not None:
        content["seed"] = seed
    config = validate(SystemsConfig, content, str(protocol))
    options.fetch_missing([system.model for system in config.systems], download)
    records = compare(config, out, options.choose_device(device))
    _show(records, out, as_json)


def _covariate_shift(teacher: str, student: str, config: Any, out: Path, device: str, as_json: bool) -> None:
    options.quiet_libraries()
    from ddil_eval import figures
    from ddil_eval.experiments.covariate_shift import analyse, figure_pictures

    records = analyse(teacher, student, config, out, device)
    if config.figure_prompts:
        figures.grid(*figure_pictures(teacher, student, config, device), out / "figure2.png")
    figures.shift_curves(records, out / "shift-curves.png")
    _show(records, out, as_json)


def _show(records: list[Any], out: Path, as_json: bool) -> None:
    from rich.console import Console

    from ddil_eval import render, tables

    if as_json:
        options.emit([record.model_dump(mode="json") for record in records])
        return
    for table in tables.build(records):
        Console().print(render.to_rich(table))
    click.echo(
        f"Records, figures and the cost of the rollouts are in {out}; tables with: ddil report --results {out} --csv --latex"
    )
