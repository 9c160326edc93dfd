"""The command line: one thin file a command, loaded when needed; errors become a sentence and an exit status here."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import click

from ddil_core import ranks
from ddil_core.ending import GO_ON, Interrupted, listen
from ddil_core.errors import DdilError

COMMANDS = {
    "distill": "ddil_eval.cli.distill:distill",
    "sample": "ddil_eval.cli.sample:sample",
    "eval": "ddil_eval.cli.evaluate:evaluate",
    "report": "ddil_eval.cli.report:report",
    "models": "ddil_eval.cli.models:models",
    "data": "ddil_eval.cli.listing:data",
    "metrics": "ddil_eval.cli.listing:metrics",
    "doctor": "ddil_eval.cli.doctor:doctor",
    "demo": "ddil_eval.cli.demo:demo",
}
"""A command's name to ``module:attribute``, in the order of the help page; a new command is one row and one file."""

INTERRUPTED = 130
"""The exit status of a command stopped by Ctrl-C, as shells have it: 128 + SIGINT."""


class Commands(click.Group):
    """A group that loads each command when it is needed and turns errors into a sentence and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = " or ".join(difflib.get_close_matches(args[0], COMMANDS, n=2))
            advice = f"did you mean {near}?" if near else "ddil --help lists them."
            ctx.fail(f"There is no command {args[0]!r}: {advice}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DdilError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_status)
        except Interrupted as error:
            if ranks.is_main():
                click.echo(str(error), err=True)
            ctx.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo(f"interrupted; {GO_ON}", err=True)
            ctx.exit(INTERRUPTED)


def _version() -> str:
    try:
        return installed_version("ddil")
    except PackageNotFoundError:
        return "of a folder that is not installed"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), prog_name="ddil", message="%(prog)s %(version)s")
def ddil() -> None:
    """Distil text-to-image diffusion models by imitation learning, and measure what distillation did to them.

    Results go to stdout or to files, progress and messages to stderr. Exit status: 0 done, 1 the work failed,
    2 the command was wrong, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """


def main() -> None:
    """The entry point of the ``ddil`` script."""
    listen()
    ddil(prog_name="ddil")
