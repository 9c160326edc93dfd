"""Options that several commands share, and what commands do with them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ddil_core.support import paths, ranks
from ddil_core.support.devices import DTYPES
from ddil_core.support.devices import choose_device as choose_device
from ddil_core.support.devices import torch_dtype as torch_dtype
from ddil_core.support.text import is_hidden, one_line, printable

F = TypeVar("F", bound=Callable[..., Any])

DATA_HELP = "The data set to measure on (see 'ddil data')."
TRAINING_DATA_HELP = "The data set to train on (see 'ddil data')."
DOWNLOAD_HELP = (
    "Download missing models from the hub first, and print their size. Without this option nothing is downloaded."
)
MOST = 100_000_000
"""The largest count that an option takes. ``ddil_core.support.protocol`` has the same limit, but imports pydantic."""

MODEL_HELP = (
    "A model: a name that 'ddil models' lists, a pipeline folder, a run folder of 'ddil distill', a single-file "
    "checkpoint, or a hub id (see docs/models.md)."
)


class UserPath(click.ParamType):  # type: ignore[type-arg]  # generic in recent versions of click only
    """A path from the command line, checked before any work starts.

    Args:
        name: The word for the value in the command reference: "file", "path" or "directory".
        check: A function of :mod:`ddil_core.support.paths` that checks the path and expands it.
    """

    def __init__(self, name: str, check: Callable[[str | os.PathLike[str], str], Path] = paths.user_path) -> None:
        self.name, self._check = name, check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the expanded path.

        Raises:
            WrongCommand: The path cannot be used. The message names the option.
        """
        option = max(param.opts, key=len) if isinstance(param, click.Option) else None
        return self._check(value, option or (param.human_readable_name if param else "the path"))


def _protocol(text: str | os.PathLike[str], what: str) -> Path:
    """Return the file of a protocol, the user's or a shipped one (see ``find_protocol``)."""
    from ddil_core.support.resources import find_protocol

    return find_protocol(paths.user_path(text, what))


PROTOCOL = UserPath("file", _protocol)
INPUT = UserPath("path")
OUTPUT_FOLDER = UserPath("directory", paths.output_folder)
OUTPUT = UserPath("path", paths.output_file)


class Whole(click.ParamType):  # type: ignore[type-arg]  # generic in recent versions of click only
    """A whole number from ``least`` to ``most``; without ``least``, from −``most``."""

    name = "integer"

    def __init__(self, least: int | None = None, most: int = MOST) -> None:
        # click's message for a small number names the minimum alone, if the range has no maximum
        self._range = click.INT if least is None else click.IntRange(min=least)
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number. Fail as click's own types do."""
        number: int = self._range.convert(value, param, ctx)
        if abs(number) > self._most:
            self.fail(f"{paths.shown(number)} is larger than {self._most:,}.", param, ctx)
        return number


NUMBER = Whole()
SEED = Whole(0, 2**63 - 1)
COUNT = Whole(1)


PRINTS = "ddil.print_protocol"
"""Where a command's context says that ``--print-protocol`` is given."""


class RequiredUnlessPrinted(click.Option):
    """A required option that ``--print-protocol`` makes optional."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value. Without a value fail as click does, unless the protocol is printed."""
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter:
            if ctx.meta.get(PRINTS):
                return None
            raise


def print_option(command: F) -> F:
    """Add ``--print-protocol``."""

    def remember(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        ctx.meta[PRINTS] = given

    text = "Print the protocol that the command would use, with all its keys and a comment for each, and stop."
    return click.option(
        "--print-protocol", is_flag=True, is_eager=True, expose_value=False, callback=remember, help=text
    )(command)


def print_if_asked(config: Any, source: str) -> None:
    """With ``--print-protocol``, print a configuration as a commented protocol and end the command.

    Args:
        config: The configuration.
        source: What it was made from.
    """
    ctx = click.get_current_context()
    if ctx.meta.get(PRINTS):
        from ddil_core.support.commented import commented

        head = f"Made from {source}. docs/protocols.md explains the keys of all protocols."
        click.echo(printable(commented(config, head)), nl=False)
        ctx.exit()


def protocol_options(command: F) -> F:
    """Add ``--protocol``, ``--set`` and ``--print-protocol``."""
    settings = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
    protocol = click.option(
        "--protocol",
        type=PROTOCOL,
        default=None,
        help="A YAML protocol, yours or a shipped one, in place of the default.",
    )
    return protocol(settings(print_option(command)))


def device_option(command: F) -> F:
    """Add ``--device``."""
    return click.option(
        "--device", default=None, metavar="NAME", help="cpu or cuda. The default is cuda if the machine has a GPU."
    )(command)


def quiet_option(command: F) -> F:
    """Add ``--quiet``."""

    def silence(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            from ddil_core.support.progress import quiet

            ctx.with_resource(quiet())

    text = "Show neither progress nor notes. Results, warnings and errors stay."
    return click.option("--quiet", is_flag=True, is_eager=True, expose_value=False, callback=silence, help=text)(
        command
    )


def show_option(command: F) -> F:
    """Add ``--show``."""
    text = "Show the pictures in the terminal too, if it understands the protocol of Kitty, iTerm2 or Sixel."
    return click.option("--show", is_flag=True, help=text)(command)


def picture_protocol(show: bool, as_json: bool) -> str | None:
    """Return the protocol of the terminal for ``--show``; None without ``--show``.

    Raises:
        WrongCommand: Stdout is no terminal or shows no pictures, or ``--json`` is given too.
    """
    if not show:
        return None
    from ddil_core.support.errors import WrongCommand
    from ddil_core.support.terminal_pictures import require_pictures

    if as_json:
        raise WrongCommand("--json prints one document alone; leave out --show or --json")
    return require_pictures(sys.stdout)


def show_pictures(files: Iterable[Path], protocol: str | None) -> None:
    """Show picture files in the terminal, each below its name. Without a protocol show nothing."""
    if protocol is None or not ranks.is_main():
        return
    from ddil_core.support.terminal_pictures import show_picture

    for path in files:
        say(str(path))
        show_picture(path, protocol, sys.stdout)


def json_option(command: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")(command)


def variant_option(command: F) -> F:
    """Add ``--variant``."""
    text = "The variant of the weights, such as fp16. The default is the files without a variant, or the only variant."
    return click.option("--variant", default=None, metavar="NAME", help=text)(command)


def download_option(command: F) -> F:
    """Add ``--download``."""
    return click.option("--download", is_flag=True, help=DOWNLOAD_HELP)(command)


class GuidanceType(click.ParamType):  # type: ignore[type-arg]  # generic in recent versions of click only
    """A guidance scale, a finite number of at least 0."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from ddil_core.support.protocol import guidance_scale

        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        try:
            return guidance_scale(number)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def guidance_option(command: F) -> F:
    """Add ``--guidance``."""
    text = "The guidance scale g; 1 means no guidance. The default is the model's own."
    return click.option("--guidance", "guidance_scale", type=GuidanceType(), default=None, help=text)(command)


def teacher_guidance_option(command: F) -> F:
    """Add ``--guidance`` of a teacher."""
    text = "The teacher's guidance scale g; 1 means no guidance. The default is the protocol's, or the teacher's own."
    return click.option("--guidance", "guidance_scale", type=GuidanceType(), default=None, help=text)(command)


def reflection_option(command: F) -> F:
    """Add ``--reflection``."""
    modes = click.Choice(("none", "clamp", "dynamic", "fold"))
    text = "How to keep x̂ inside the range of the student's training data. The default is the model's own setting."
    return click.option("--reflection", type=modes, default=None, help=text)(command)


def dtype_option(command: F) -> F:
    """Add ``--dtype``."""
    text = "The number format that the model computes in."
    kinds = click.Choice(tuple(DTYPES))
    return click.option("--dtype", type=kinds, default="fp32", show_default=True, help=text)(command)


def compute_options(*dtypes: str) -> Callable[[F], F]:
    """Return a decorator that adds ``--dtype`` with these choices (all, if none), ``--tf32`` and ``--compile``.

    An option that is left out is None, so that a protocol may say it.
    """
    kinds = click.Choice(dtypes or tuple(DTYPES))
    rows: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("--dtype", "The number format that models compute in.  [default: fp32]", {"type": kinds}),
        ("--tf32/--no-tf32", "Whether a GPU computes float32 products in TF32.  [default: no-tf32]", {}),
        ("--compile/--no-compile", "Whether networks are compiled, for long runs.  [default: no-compile]", {}),
    )

    def add(command: F) -> F:
        for name, text, more in reversed(rows):
            command = click.option(name, default=None, help=text, **more)(command)
        return command

    return add


def size_options(command: F) -> F:
    """Add ``--height`` and ``--width``."""
    for side in ("width", "height"):
        text = f"The {side} of the images in pixels. The default is the model's own."
        command = click.option(f"--{side}", type=COUNT, default=None, metavar="PIXELS", help=text)(command)
    return command


def fetch_missing(references: Iterable[str], download: bool, variant: str | None = None) -> None:
    """With ``--download``, download the missing files of models on the hub. Complete models cause no request."""
    if download:
        from ddil_core.models.fetch import fetch_missing as fetch

        fetch(references, variant)


def deterministic_option(command: F) -> F:
    """Add ``--deterministic``, which holds until the command ends."""

    def enter(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            from ddil_core.support.environment import deterministic

            ctx.with_resource(deterministic())

    text = "Use algorithms alone that give the same bits each time on the same GPU. They are slower."
    return click.option("--deterministic", is_flag=True, expose_value=False, callback=enter, help=text)(command)


def numbers(text: str | None, kind: Callable[[str], Any], option: str) -> list[Any] | None:
    """Return a comma-separated list of numbers; None without a text.

    Raises:
        WrongCommand: One part is not a number. The message names the option.
    """
    from ddil_core.support.errors import WrongCommand

    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise WrongCommand(f"{option} takes numbers with commas between them, not {paths.shown(text)}") from error


def groups(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the members of each group from texts NAME=MEMBER,MEMBER.

    Raises:
        WrongCommand: A text has no name or no member, or a name stands twice.
    """
    from ddil_core.support.errors import WrongCommand

    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, members = (part.strip() for part in text.partition("="))
        if not name or not members or name in found:
            raise WrongCommand(
                f"--group takes NAME=REF,REF with a name of its own for each group, not {paths.shown(text)}"
            )
        found[name] = [member.strip() for member in members.split(",") if member.strip()]
    return found


def time(text: str) -> int | float:
    """Return a time of a grid: an integer, or a fraction on a flow.

    Raises:
        ValueError: The text is not a number.
    """
    value = float(text)
    return int(value) if value.is_integer() else value


def say(sentence: str, *, err: bool = False) -> None:
    """Print one line to stdout, or to stderr. Names in it may come from elsewhere: a terminal obeys no part of it."""
    click.echo(one_line(sentence), err=err)


def emit(document: Any) -> None:
    """Print one JSON document to stdout.

    Characters that a terminal obeys, and those that the encoding of stdout lacks, become JSON escapes.
    """
    plain = json.dumps(document, indent=2, ensure_ascii=False)
    text = "".join(f"\\u{ord(c):04x}" if c != "\n" and is_hidden(c) else c for c in plain)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    click.echo(text)


def quiet_libraries() -> None:
    """Keep the progress bars and the advice of the libraries off the terminal."""
    # matplotlib logs the place of its cache during its import
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
