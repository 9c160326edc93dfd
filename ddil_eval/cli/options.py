"""Options that several commands share."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from ddil_core.support import paths
from ddil_core.support.devices import DTYPES
from ddil_core.support.devices import choose_device as choose_device
from ddil_core.support.devices import torch_dtype as torch_dtype

F = TypeVar("F", bound=Callable[..., Any])

DATA_HELP = "A data set: 'shapes', coco2014:DIR, coco2017:DIR or folder:DIR (see 'ddil data')."
TRAINING_DATA_HELP = (
    "The data set to train on: 'shapes', coco2014:DIR, coco2017:DIR, folder:DIR or webdataset:PATTERN, as in "
    "'webdataset:/data/train-{000000..000099}.tar' (see 'ddil data')."
)
DOWNLOAD_HELP = (
    "Fetch models that are not here from the hub first; the size is said before. Without it nothing is fetched."
)
MOST = 100_000_000
"""The largest count that an option takes, as in ``ddil_core.support.protocol``, which a help page does not import."""

MODEL_HELP = (
    "A model: a name of 'ddil models', a pipeline folder, a run folder of 'ddil distill', a single-file checkpoint, or a hub id "
    "(see docs/models.md)."
)


class UserPath(click.ParamType):
    """A path that a user names, checked before any work by :mod:`ddil_core.support.paths`. ``name`` stands in the reference."""

    def __init__(self, name: str, look: Callable[[str | os.PathLike[str], str], Path] = paths.user_path) -> None:
        self.name, self._look = name, look

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, expanded.

        Raises:
            WrongCommand: it cannot be used; the message names the option.
        """
        option = max(param.opts, key=len) if isinstance(param, click.Option) else None
        return self._look(value, option or (param.human_readable_name if param else "the path"))


INPUT_FILE = UserPath("file")
INPUT = UserPath("path")
OUTPUT_FOLDER = UserPath("directory", paths.output_folder)
OUTPUT = UserPath("path", paths.output_file)


class Whole(click.IntRange):
    """A whole number from ``least`` (None: any) to ``most``."""

    def __init__(self, least: int | None = None, most: int = MOST) -> None:
        super().__init__(min=least)  # the messages of click for what is too small; it has another one for ranges
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Fails as click's own types do."""
        number: int = super().convert(value, param, ctx)
        if abs(number) > self.most:
            self.fail(f"{paths.shown(number)} is larger than {self.most:,}.", param, ctx)
        return number


NUMBER = Whole()
SEED = Whole(0, 2**63 - 1)
COUNT = Whole(1)


def protocol_options(command: F) -> F:
    """``--protocol`` and ``--set``."""
    file = INPUT_FILE
    command = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")(
        command
    )
    return click.option("--protocol", type=file, default=None, help="A YAML protocol in place of the shipped one.")(
        command
    )


def device_option(command: F) -> F:
    """``--device``."""
    return click.option(
        "--device", default=None, metavar="NAME", help="cpu or cuda; by default cuda where there is one."
    )(command)


def json_option(command: F) -> F:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def variant_option(command: F) -> F:
    """``--variant``."""
    text = "The weights' variant, such as fp16; by default the plain files, or the only variant that there is."
    return click.option("--variant", default=None, metavar="NAME", help=text)(command)


def download_option(command: F) -> F:
    """``--download``."""
    return click.option("--download", is_flag=True, help=DOWNLOAD_HELP)(command)


class GuidanceType(click.ParamType):
    """A guidance scale; what is none is a wrong command."""

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
    """``--guidance``."""
    text = "Guidance scale g, where 1 is none; by default the model's own."
    return click.option("--guidance", "guidance_scale", type=GuidanceType(), default=None, help=text)(command)


def reflection_option(command: F) -> F:
    """``--reflection``."""
    modes = click.Choice(("none", "clamp", "dynamic", "fold"))
    text = "Keep x̂ inside the range of the data that a student was distilled on; by default the model's own, which is none."
    return click.option("--reflection", type=modes, default=None, help=text)(command)


def dtype_option(command: F) -> F:
    """``--dtype``."""
    text = "The numbers that the model computes in, whatever its files hold."
    return click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="fp32", show_default=True, help=text)(
        command
    )


def fetch_missing(references: Iterable[str], download: bool, variant: str | None = None) -> None:
    """With ``--download``, fetch the files that the models need and that are not here."""
    if download:
        from ddil_core.models.fetch import fetch_missing as fetch

        fetch(references, variant)


def numbers(text: str | None, kind: Callable[[str], Any], option: str) -> list[Any] | None:
    """A comma-separated list of numbers.

    Raises:
        WrongCommand: one of them is no number.
    """
    from ddil_core.support.errors import WrongCommand

    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise WrongCommand(f"{option} takes numbers with commas between them, not {paths.shown(text)}") from error


def words(text: str | None) -> list[str] | None:
    """A list with commas between its words; None where none was given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def time(text: str) -> int | float:
    """A time of a grid: an integer, or a fraction where a flow's is one. Raises ValueError."""
    value = float(text)
    return int(value) if value.is_integer() else value


def emit(document: Any) -> None:
    """One JSON document on stdout; characters that its encoding lacks are JSON's own escapes."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    click.echo(text)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the terminal."""
    # before matplotlib is imported, which says then where its own cache is
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
