"""Which prompts are measured: a data set's own, in its order, or a list by path; either way pinned by hashes in the record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.data.base import DataSet, Prompt
from ddil_core.data.captioned import name_some
from ddil_core.data.captions import caption_of, decode, lines, read_rows
from ddil_core.data.coco import Coco
from ddil_core.data.folder import refuse_twice
from ddil_core.support.errors import WrongCommand
from ddil_core.support.progress import warn_once
from ddil_eval.report.records import digest


@dataclass(frozen=True)
class Prompts:
    """The prompts to be measured, and ``source``, what a record says of where they are from."""

    prompts: list[Prompt]
    source: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """For a record: the source, and hashes of the ids and of the captions as they were used."""
        hashes = {
            "prompt_ids_sha256": digest([prompt.id for prompt in self.prompts]),
            "captions_sha256": digest([prompt.text for prompt in self.prompts]),
        }
        return self.source | hashes


def choose_prompts(data: DataSet, count: int, path: Path | None) -> Prompts:
    """The first ``count`` prompts of a list, or of the data set where no list is named.

    Raises:
        WrongCommand: there are fewer, or the list cannot be read.
    """
    if path is None:
        source = {}
        if isinstance(data, Coco):
            source = {"prompts": data.annotations.name, "prompts_sha256": file_sha256(data.annotations)}
        return Prompts(data.prompts(count), source)
    prompts = read_prompts(path)
    if len(prompts) < count:
        raise WrongCommand(
            f"the list {path} has {len(prompts):,} prompts, fewer than the {count:,} asked for; add the others, or ask for fewer"
        )
    return Prompts(prompts[:count], {"prompts": path.name, "prompts_sha256": file_sha256(path)})


def read_prompts(path: Path) -> list[Prompt]:
    """A user's list: ``.txt`` with one prompt a line, or ``.jsonl`` or ``.csv`` with a ``prompt`` and, if wanted, an ``id``.

    Captions are cleaned (``clean_caption``). Blank lines hold no prompt and are skipped, as in DMD2's own reader of
    ``captions_coco14_test.txt``; those of a ``.txt`` are counted in a warning. Without ids a prompt goes by the list's name and
    its place in it.

    Raises:
        WrongCommand: no such list, no prompt in it, a row without a prompt, an id twice, or two captions for one id.
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
    """Ids and captions of a table; nothing where no row has a caption. Raises WrongCommand: some rows have none."""
    rows = [(row.name("id", "file_name"), row.caption()) for row in read_rows(path)]
    found = [(name, text) for name, text in rows if text is not None]
    silent = [str(number) for number, (_, text) in enumerate(rows, 1) if text is None]
    if found and silent:
        raise WrongCommand(
            f"{len(silent):,} of {len(rows):,} rows of the list {path} have no prompt: {name_some(silent)}; give each a 'prompt', "
            "'caption' or 'text', or leave them out"
        )
    return found


def _lines(path: Path) -> list[str]:
    """The prompts of a ``.txt``. Raises WrongCommand: it is not UTF-8, or cannot be read."""
    try:
        told = lines(decode(path.read_bytes()))
    except (ValueError, OSError) as error:
        raise WrongCommand(f"the list of prompts {path} is not UTF-8 text: {error}") from error
    found = [text for number, line in enumerate(told, 1) if (text := caption_of(line, f"line {number} of {path}"))]
    if found and len(found) < len(told):
        warn_once(f"{len(told) - len(found):,} of {len(told):,} lines of the list {path} are blank and are skipped")
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
