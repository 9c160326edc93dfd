"""``ddil recreate``"""

from __future__ import annotations

import os
from pathlib import Path

import click

from ddil_core.support import ranks
from ddil_eval.cli import options


@click.command()
@click.argument("protocol", type=options.PROTOCOL)
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, cls=options.RequiredUnlessPrinted,
              help="The results folder: records, tables and figures.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
@click.option(
    "--jobs", type=options.COUNT, default=None,
    help="The number of distillations at once. The default is the number of cores, and 1 with a GPU.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the commands and how long they will take here, and stop.")
@options.print_option
@options.quiet_option
def recreate(protocol: Path, out: Path, settings: tuple[str, ...], jobs: int | None, dry_run: bool) -> None:
    """Make tables from nothing: run all distillations and measurements of a protocol.

    A protocol lists ddil's own commands: distill, eval and report. How long they will take here is measured and said
    first. Distillations run in parallel. The same command continues a stopped recreation. It runs no finished command
    again, unless one before it was changed or its files are gone.
    """
    ranks.require_one("a recreation")
    options.quiet_libraries()
    from ddil_core.support.lock import held
    from ddil_core.support.paths import output_folder
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_eval.cli.recreation import RecreationConfig, commands_of, describe, left, measure_speed
    from ddil_eval.cli.recreation import recreate as run

    config = validate(RecreationConfig, override(read_yaml(protocol), settings), str(protocol))
    options.print_if_asked(config, str(protocol))
    device, work = options.choose_device(None), output_folder(config.work, "the key 'work'")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (cores if device == "cpu" else 1)
    commands = commands_of(config, out)
    if dry_run:
        todo = left(commands)
        for command in commands:
            options.say(f"{command.text}  # {f'{command.core_minutes:g} core minutes' if command in todo else 'done'}")
        options.say(describe(config, commands, jobs, cores, measure_speed(device)))
        return
    with held(work):
        options.say(describe(config, commands, jobs, cores, measure_speed(device)))
        run(config, commands, jobs)
    options.say(f"All is in {out}; tables with: ddil report --results {out}")
