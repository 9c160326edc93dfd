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
@click.option("--jobs", type=options.COUNT, default=None,
              help="The number of distillations at once. The default is the number of cores, and 1 with a GPU.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the commands and how long they will take here, and stop.")
@options.print_option
@options.quiet_option
def recreate(protocol: Path, out: Path, settings: tuple[str, ...], jobs: int | None, dry_run: bool) -> None:
    """Make tables from nothing: run all distillations and measurements of a protocol.

    A protocol lists ddil's own commands: distill, eval and report. How long they will take here is measured and said
    first. Distillations run in parallel. Finished commands are never run again, so that the same command continues a
    stopped recreation.
    """
    ranks.require_one("a recreation")
    options.quiet_libraries()
    from ddil_core.support.lock import held
    from ddil_core.support.paths import output_folder
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_eval.cli.recreation import RecreationConfig, commands_of, describe, measure_speed
    from ddil_eval.cli.recreation import recreate as run

    config = validate(RecreationConfig, override(read_yaml(protocol), settings), str(protocol))
    options.print_if_asked(config, str(protocol))
    device = options.choose_device(None)
    work, cores = output_folder(config.work, "the key 'work'"), jobs or (os.cpu_count() or 1 if device == "cpu" else 1)
    commands = commands_of(config, out)
    if dry_run:
        for command in commands:
            state = "done" if command.is_done else f"{command.core_minutes:g} core minutes"
            options.say(f"{command.text}  # {state}")
        options.say(describe(config, commands, cores, measure_speed(device)))
        return
    with held(work):
        options.say(describe(config, commands, cores, measure_speed(device)))
        run(config, commands, cores)
    options.say(f"All is in {out}; tables with: ddil report --results {out}")
