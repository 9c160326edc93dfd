"""The prompts that are measured: those of a data set in its order, or a user's list. Records hold their hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.data.base import DataSet, Prompt
from ddil_core.data.captioned import name_some
from ddil_core.data.captions import caption_of, lines, read_rows, read_text
from ddil_core.data.coco import Coco
from ddil_core.data.folder import refuse_twice
from ddil_core.support.errors import WrongCommand
from ddil_core.support.progress import warn_once
from ddil_eval.experiments.reference_images import number_of
from ddil_eval.report.records import digest

FEWEST = 4
"""The fewest prompts that an interval can be computed of."""


@dataclass(frozen=True)
class Prompts:
    """The prompts that are measured, and ``source``: what records say of where they come from."""

    prompts: list[Prompt]
    source: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """Return what a record says: the source, and hashes of the ids and of the cleaned captions."""
        hashes = {
            "prompt_ids_sha256": digest([prompt.id for prompt in self.prompts]),
            "captions_sha256": digest([prompt.text for prompt in self.prompts]),
        }
        return self.source | hashes


def choose_prompts(data: DataSet, count: int | None, path: Path | None, skip: int = 0) -> Prompts:
    """Return the first ``count`` prompts after ``skip`` ones, of the list at ``path`` or else of the data set.

    Args:
        data: The data set.
        count: The number of prompts; None for all.
        path: A list of prompts.
        skip: The number of prompts before them.

    Raises:
        WrongCommand: there are fewer prompts, or the list cannot be read.
    """
    if path is None:
        source = {}
        if isinstance(data, Coco):
            source = {"prompts": data.annotations.name, "prompts_sha256": file_sha256(data.annotations)}
        wanted = None if count is None else count + skip
        return Prompts(data.prompts(number_of(wanted, data))[skip:], source)
    prompts = read_prompts(path)
    wanted = len(prompts) if count is None else count + skip
    if len(prompts) < wanted:
        raise WrongCommand(
            f"the list {path} has {len(prompts):,} prompts, fewer than the {wanted:,} asked for; add prompts, or ask "
            "for fewer"
        )
    return Prompts(prompts[skip:wanted], {"prompts": path.name, "prompts_sha256": file_sha256(path)})


def require_enough(count: int, what: str) -> None:
    """Refuse too few prompts for an interval, before any image is made.

    Raises:
        WrongCommand: ``what``, which names the prompts in the message, has fewer than ``FEWEST``.
    """
    if count < FEWEST:
        word = "prompt" if count == 1 else "prompts"
        raise WrongCommand(f"{what} has {count} {word}, too few for an interval; measure at least {FEWEST}")


def read_prompts(path: Path) -> list[Prompt]:
    """Read a list of prompts: ``.txt`` with a prompt a line, or ``.jsonl`` or ``.csv`` with ``prompt`` and perhaps
    ``id``.

    Captions are cleaned (``clean_caption``). Blank lines are skipped, as DMD2's reader of ``captions_coco14_test.txt``
    does, and a warning counts those of a ``.txt``. A prompt without an id gets the name of the list and its place in
    the list.

    Raises:
        WrongCommand: there is no such list, it holds no prompts, a row has no prompt, or an id stands twice.
    """
    if not path.is_file():
        raise WrongCommand(f"there is no list of prompts {path}")
    if path.suffix in (".jsonl", ".csv"):
        rows = _rows(path)
    elif path.suffix == ".txt":
        rows = [(None, text) for text in _lines(path)]
    else:
        raise WrongCommand(f"the list of prompts {path} is neither .txt, .jsonl nor .csv")
    if not rows:
        raise WrongCommand(f"the list {path} holds no prompts; give a row a 'prompt', 'caption' or 'text'")
    prompts = [Prompt(name or f"{path.stem}-{place:05d}", text) for place, (name, text) in enumerate(rows, 1)]
    refuse_twice([(prompt.id, prompt.text) for prompt in prompts], str(path))
    return prompts


def _rows(path: Path) -> list[tuple[str | None, str]]:
    """Read the ids and captions of a table; return nothing where no row has a caption.

    Raises:
        WrongCommand: some rows have a caption, and others have none.
    """
    rows = [(row.name("id", "file_name"), row.caption()) for row in read_rows(path)]
    captioned = [(name, text) for name, text in rows if text is not None]
    silent = [str(number) for number, (_, text) in enumerate(rows, 1) if text is None]
    if captioned and silent:
        raise WrongCommand(
            f"{len(silent):,} of {len(rows):,} rows of the list {path} have no prompt: {name_some(silent)}; give each "
            "a 'prompt', 'caption' or 'text', or leave them out"
        )
    return captioned


def _lines(path: Path) -> list[str]:
    """Read the prompts of a ``.txt``.

    Raises:
        WrongCommand: the file is not UTF-8 text, or cannot be read.
    """
    try:
        all_lines = lines(read_text(path))
    except (ValueError, OSError) as error:
        raise WrongCommand(f"the list of prompts {path} is not UTF-8 text: {error}") from error
    texts = [text for number, line in enumerate(all_lines, 1) if (text := caption_of(line, f"line {number} of {path}"))]
    if texts and len(texts) < len(all_lines):
        blank = len(all_lines) - len(texts)
        warn_once(f"{blank:,} of {len(all_lines):,} lines of the list {path} are blank and are skipped")
    return texts


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
