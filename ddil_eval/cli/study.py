"""``ddil study``"""

from __future__ import annotations

from pathlib import Path

import click

from ddil_core.support import ranks
from ddil_core.support.errors import DdilError
from ddil_eval.cli import options


@click.command()
@click.argument("protocol", type=options.PROTOCOL)
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, cls=options.RequiredUnlessPrinted,
              help="The folder of the study.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
@click.option(
    "--jobs", type=options.COUNT, default=None,
    help="The number of worker processes, one core each. The default is the number of cores, and 1 with a GPU.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the matrix and its costs, and stop.")
@options.print_option
@options.device_option
@options.quiet_option
def study(
    protocol: Path, out: Path, settings: tuple[str, ...], jobs: int | None, dry_run: bool, device: str | None
) -> None:
    """Test a matrix of conditions and seeds: which training states help, on which measure, and where.

    A protocol names sources of training states, factors and seeds. Every unit is a distillation and the measurement of
    its students. Units run in parallel. Finished ones are never run again, so that the same command continues a stopped
    study and tries failed units again. OUT/study holds the tables, the figure and a page in words.
    """
    ranks.require_one("a study")
    options.quiet_libraries()
    from ddil_core.support.environment import cores
    from ddil_core.support.progress import warn
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_eval.study.config import StudyConfig
    from ddil_eval.study.matrix import units_of
    from ddil_eval.study.study import describe, matrix_lines, run_study, too_few_seeds

    config = validate(StudyConfig, override(read_yaml(protocol), settings), str(protocol))
    options.print_if_asked(config, str(protocol))
    if dry_run:
        units = units_of(config)
        options.say(describe(config, units))
        for line in matrix_lines(config, units):
            options.say(line)
        if (reason := too_few_seeds(config, units)) is not None:
            warn(reason)
        return
    device = options.choose_device(device)
    failed = run_study(config, out, jobs or (cores() if device == "cpu" else 1), device)
    if failed:
        raise DdilError(
            f"{len(failed)} unit{'s' * (len(failed) > 1)} failed, first {failed[0]}; the same command tries "
            f"{'them' if len(failed) > 1 else 'it'} again"
        )
    options.say(f"The page of the study is {out / 'study' / 'README.md'}")
