"""The command line. Each command is one thin file, imported when needed. Errors become a sentence and exit status."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from ddil_core.support import ranks
from ddil_core.support.ending import GO_ON, Interrupted, listen
from ddil_core.support.errors import DdilError, Missing, WrongCommand, lacks_memory
from ddil_core.support.paths import shown
from ddil_core.support.text import one_line

COMMANDS = {
    "distill": "ddil_eval.cli.distill:distill",
    "sample": "ddil_eval.cli.sample:sample",
    "eval": "ddil_eval.cli.evaluate:evaluate",
    "study": "ddil_eval.cli.study:study",
    "recreate": "ddil_eval.cli.recreate:recreate",
    "report": "ddil_eval.cli.report:report",
    "export": "ddil_eval.cli.export:export",
    "models": "ddil_eval.cli.models:models",
    "data": "ddil_eval.cli.listing:data",
    "metrics": "ddil_eval.cli.listing:metrics",
    "doctor": "ddil_eval.cli.doctor:doctor",
    "demo": "ddil_eval.cli.demo:demo",
}
"""The place of each command, ``module:attribute``, in the order of the help page."""

PROVIDE = "provide what is named above, and run the same command again"
"""What to do where several things are missing."""

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C stopped: 128 + SIGINT, as in shells."""


class Commands(click.Group):
    """A group that imports a command when it is needed, and turns errors into a sentence and an exit status."""

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
        _require_readable(args)
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            nearest = " or ".join(difflib.get_close_matches(args[0], COMMANDS, n=2))
            advice = f"did you mean {nearest}?" if nearest else "ddil --help lists the commands."
            ctx.fail(f"There is no command {args[0]!r}: {advice}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _require_interval()
            return super().invoke(ctx)
        except click.UsageError as error:
            error.message = one_line(error.message)  # type: ignore[misc]  # final in recent versions of click only
            raise
        except Missing as error:
            for part in error.parts:
                click.echo(f"not here: {one_line(part)}", err=True)
            click.echo(f"error: {PROVIDE}", err=True)
            ctx.exit(error.exit_status)
        except DdilError as error:
            click.echo(f"error: {one_line(str(error))}", err=True)
            ctx.exit(error.exit_status)
        except Interrupted as error:
            if ranks.is_main():
                click.echo(one_line(str(error)), err=True)
            ctx.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo(f"interrupted; {GO_ON}", err=True)
            ctx.exit(INTERRUPTED)
        except OSError as error:
            if error.errno not in OF_THE_MACHINE or error.filename is None:
                raise
            click.echo(f"error: {one_line(str(error.filename))} cannot be used: {error.strerror}", err=True)
            ctx.exit(DdilError.exit_status)
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            click.echo(f"error: {LACKS_MEMORY}", err=True)
            ctx.exit(DdilError.exit_status)


OF_THE_MACHINE = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM,
    errno.EROFS, errno.ESTALE,
}  # fmt: skip
"""Errors of files that the machine causes: protected, full, broken or read-only places."""

LACKS_MEMORY = (
    "the machine has too little memory; generate fewer or smaller images at once, or set a smaller batch_size"
)


def _require_readable(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not text, since records and JSON cannot hold them, and a deleted working folder.

    Raises:
        WrongCommand: An argument is not text, or the working folder has been deleted.
    """
    for argument in arguments:
        if any("\ud800" <= c <= "\udfff" for c in argument):  # how Python represents bytes outside the encoding
            encoding = sys.getfilesystemencoding()
            cure = "rename the file, or write the text in UTF-8" if encoding == "utf-8" else "set PYTHONUTF8=1"
            raise WrongCommand(f"the argument {shown(argument)} is not text in {encoding}; {cure}")
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError as error:
        raise WrongCommand("the working folder of this command has been deleted; change into another folder") from error


def _require_interval() -> None:
    """Refuse a wrong ``DDIL_PROGRESS_EVERY`` before any work. Raises WrongCommand."""
    if "DDIL_PROGRESS_EVERY" in os.environ:
        from ddil_core.support.progress import interval

        interval()


def _say_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Print the version and exit. The import of `importlib.metadata` waits until then."""
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("ddil")
    except PackageNotFoundError:
        installed = "(not installed)"
    click.echo(f"ddil {installed}")
    ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_say_version,
              help="Show the version and exit.")  # fmt: skip
def ddil() -> None:
    """Distil text-to-image diffusion models by imitation learning, and measure the effect of distillation.

    Results go to stdout or to files. Progress and messages go to stderr. Exit status: 0 success, 1 the work failed,
    2 the command was wrong, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """


def main() -> None:
    """Run ``ddil``, as its script does. Characters outside the terminal's encoding are printed as escapes."""
    try:
        ranks.require_valid()
    except WrongCommand as error:
        click.echo(f"error: {one_line(str(error))}", err=True)
        sys.exit(error.exit_status)
    listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    ddil(prog_name="ddil")
