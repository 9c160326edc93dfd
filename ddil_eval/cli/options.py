"""Options that several commands share, and what commands do with them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from ddil_core.support import paths, ranks

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


class UserPath(click.ParamType):
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


INPUT_FILE = UserPath("file")
INPUT = UserPath("path")
OUTPUT_FOLDER = UserPath("directory", paths.output_folder)
OUTPUT = UserPath("path", paths.output_file)


class Whole(click.ParamType):
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


def protocol_options(command: F) -> F:
    """Add ``--protocol`` and ``--set``."""
    settings = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
    protocol = click.option(
        "--protocol", type=INPUT_FILE, default=None, help="A YAML protocol to use in place of the default one."
    )
    return protocol(settings(command))


def device_option(command: F) -> F:
    """Add ``--device``."""
    return click.option(
        "--device", default=None, metavar="NAME", help="cpu or cuda. The default is cuda if the machine has a GPU."
    )(command)


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


class GuidanceType(click.ParamType):
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


def reflection_option(command: F) -> F:
    """Add ``--reflection``."""
    modes = click.Choice(("none", "clamp", "dynamic", "fold"))
    text = "How to keep x̂ inside the range of the student's training data. The default is the model's own setting."
    return click.option("--reflection", type=modes, default=None, help=text)(command)


DTYPES = ("fp32", "bf16", "fp16")


def dtype_option(command: F) -> F:
    """Add ``--dtype``."""
    text = "The number format that the model computes in."
    return click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help=text)(command)


def torch_dtype(name: str) -> Any:
    """Return the torch dtype of a value of ``--dtype``."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def fetch_missing(references: Iterable[str], download: bool, variant: str | None = None) -> None:
    """With ``--download``, download the missing files of models on the hub. Complete models cause no request."""
    if not download:
        return
    from ddil_core.models.references import hub_parts, is_here

    with ranks.main_first():
        for reference in references:
            if hub_parts(reference) and not is_here(reference, variant):
                fetch(reference, variant)


def fetch(reference: str, variant: str | None, weights: bool = True) -> None:
    """Download a model's files. Their size and a progress bar go to stderr."""
    from ddil_core.models import references
    from ddil_core.support.progress import transfer

    references.fetch_model(reference, variant, lambda text: click.echo(text, err=True), transfer, weights=weights)


def choose_device(name: str | None) -> str:
    """Return the named device, or the best one without a name. Several processes of one machine get one GPU each.

    Raises:
        WrongCommand: The machine has no such device, or fewer GPUs than processes.
    """
    import torch

    from ddil_core.support.errors import WrongCommand

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", *(["cuda"] if torch.cuda.is_available() else []), *_gpus()):
        raise WrongCommand(f"this machine has no device {paths.shown(name)}; leave out --device to take the best one")
    if name == "cuda" and ranks.world() > 1:
        if ranks.local_rank() >= torch.cuda.device_count():
            raise WrongCommand(
                f"process {ranks.local_rank()} of this machine (counted from 0) has no GPU, since the machine has "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        return f"cuda:{ranks.local_rank()}"
    return name


def _gpus() -> list[str]:
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


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


def time(text: str) -> int | float:
    """Return a time of a grid: an integer, or a fraction on a flow.

    Raises:
        ValueError: The text is not a number.
    """
    value = float(text)
    return int(value) if value.is_integer() else value


def emit(document: Any) -> None:
    """Print one JSON document to stdout. Characters that the encoding of stdout lacks become JSON escapes."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
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
