"""``ddil recreate``"""

from __future__ import annotations

from contextlib import nullcontext
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
    from ddil_core.support.environment import cores
    from ddil_core.support.lock import held
    from ddil_core.support.paths import output_folder
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_eval.cli.forecast import Forecast
    from ddil_eval.cli.recreating import describe
    from ddil_eval.cli.recreating import recreate as run
    from ddil_eval.cli.recreation import RecreationConfig, commands_of, left, require_valid
    from ddil_eval.cli.speed import this_machine
    from ddil_eval.report.records import read_records

    config = validate(RecreationConfig, override(read_yaml(protocol), settings), str(protocol))
    options.print_if_asked(config, str(protocol))
    work = output_folder(config.work, "the key 'work'")
    commands = commands_of(config, out)
    require_valid(commands)
    read_records(out)  # a damaged one is refused before hours of work, and measured again once it is moved away
    with nullcontext() if dry_run else held(work):
        todo = left(commands)
        if dry_run:
            for command in commands:
                state = f"{command.core_minutes:g} core minutes" if command in todo else "done"
                options.say(f"{command.text}  # {state}")
        if todo:
            machine = this_machine(cores())
            jobs = jobs or (machine.cores if machine.device == "cpu" else 1)
            forecast = Forecast(jobs, machine.cores, config.speed / machine.speed)
            options.say(describe(config, commands, forecast))
            if dry_run:
                return
            options.say(f"Logs are in {commands[0].log.parent}")
            run(commands, forecast)
        else:
            options.say(f"{config.title}: all {len(commands)} commands are done")
    if not dry_run:
        options.say(f"All is in {out}; tables with: ddil report --results {out}")
