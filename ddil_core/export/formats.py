"""The table of formats.

To add a format, write one file with a function that refuses what it cannot hold and one that writes it, and a row here.
Another package names its row in an entry point of the group ``ddil.formats``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddil_core.export import comfyui, lora, pipeline, single_file
from ddil_core.export.finished import FinishedRun
from ddil_core.export.options import Options
from ddil_core.support.registry import Registry


@dataclass(frozen=True)
class Format:
    """A format that another program reads.

    Attributes:
        name: The value of ``--to``.
        title: What it is, in a few words.
        require: ``require(run, options)`` refuses a student that the format cannot hold. It reads no weights.
        write: ``write(run, folder, options)`` writes the student to a folder, and returns how to sample it, in
            Markdown, for the model card.
    """

    name: str
    title: str
    require: Callable[[FinishedRun, Options], None]
    write: Callable[[FinishedRun, Path, Options], str]


FORMATS = Registry(
    "format",
    "ddil.formats",
    Format,
    (
        Format("diffusers", "a pipeline folder", pipeline.require, pipeline.write),
        Format("single-file", "one checkpoint file", single_file.require, single_file.write),
        Format("lora", "adapters for the base", lora.require, lora.write),
        Format("comfyui", "a workflow and its weights", comfyui.require, comfyui.write),
    ),
)
