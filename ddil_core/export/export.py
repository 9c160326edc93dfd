"""Write a finished student in the format of another program, with its model card, whole or not at all."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ddil_core.export.card import Measured, write_card
from ddil_core.export.finished import FinishedRun, open_finished
from ddil_core.export.formats import FORMATS
from ddil_core.export.options import Options
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.support.checksums import with_checksum
from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown


@dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
        folder: Its folder.
        files: The paths of its files in the folder, sorted.
        weights_sha256: The hash of the student's weights, as records have it.
    """

    folder: Path
    files: tuple[str, ...]
    weights_sha256: str


def prepare(
    run: Path, to: str, out: Path, name: str | None = None, checkpoint: str | None = None
) -> tuple[FinishedRun, Options]:
    """Open a finished run, and refuse an export that cannot be. No weights are read, and nothing is written.

    Args:
        run: The run folder.
        to: The name of the format.
        out: The folder to write.
        name: The name of the student, which its files get. None: the name of the run folder.
        checkpoint: The name of the base's checkpoint in ComfyUI, for a LoRA.

    Raises:
        WrongCommand: the run is not finished, the format cannot hold its student, or ``out`` exists.
        DdilError: a file of the run is damaged.
    """
    form, options = FORMATS.find(to), Options(_require_name(name or run.resolve().name), checkpoint)
    if checkpoint is not None and to != "comfyui":
        raise WrongCommand("--checkpoint is the base's name in ComfyUI, and belongs to --to comfyui")
    if out.exists():
        raise WrongCommand(f"{out} exists and is not overwritten; name another --out")
    finished = open_finished(run)
    form.require(finished, options)
    return finished, options


def export(run: FinishedRun, options: Options, to: str, out: Path, measured: Measured | None = None) -> Exported:
    """Write a student that ``prepare`` has accepted to the folder ``out``, with its card and checksums.

    Raises:
        DdilError: the student is damaged, or the disk does not take the files.
    """
    with with_checksum(out) as temporary:
        temporary.mkdir()
        use = FORMATS[to].write(run, temporary, options)
        if not (temporary / SYSTEM_FILE).exists():
            shutil.copyfile(run.student / SYSTEM_FILE, temporary / SYSTEM_FILE)
        write_card(run, temporary, to, options, use, measured or Measured())
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return Exported(out, tuple(files), run.model.weights_sha256())


def _require_name(name: str) -> str:
    """Return a name that can stand in file names, in Python and in Markdown.

    Raises:
        WrongCommand: it cannot.
    """
    if not re.fullmatch(r"\w[\w.+-]{0,95}", name, re.ASCII) or name.endswith("."):
        raise WrongCommand(
            f"the name {shown(name)} is no name of a model: use up to 96 letters, digits and the signs . _ + - and "
            "begin with a letter or a digit, as in --name my-student"
        )
    return name
