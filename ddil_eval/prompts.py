"""Which prompts are measured: a data set's own, in its order, or a list by path; either way pinned by hashes in the record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.data.coco import Coco
from ddil_core.data.dataset import DataSet, Prompt
from ddil_core.data.folder import clean_caption, first_of, read_rows, refuse_twice
from ddil_core.errors import WrongCommand
from ddil_eval.store import digest


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

    Captions are cleaned (``clean_caption``) and empty ones skipped, as in DMD2's own reader of ``captions_coco14_test.txt``.
    Without ids a prompt goes by the list's name and its place in it.

    Raises:
        WrongCommand: no such list, no prompt in it, an id twice, or two captions for one id.
    """
    if not path.is_file():
        raise WrongCommand(f"there is no list of prompts {path}")
    if path.suffix in (".jsonl", ".csv"):
        rows = [
            (first_of(row, "id", "file_name"), first_of(row, "prompt", "caption", "text")) for row in read_rows(path)
        ]
    elif path.suffix == ".txt":
        try:
            rows = [(None, line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise WrongCommand(f"the list of prompts {path} is not UTF-8 text: {error}") from error
    else:
        raise WrongCommand(f"the list of prompts {path} is neither .txt, .jsonl nor .csv")
    cleaned = [(name, clean_caption(text)) for name, text in rows if text is not None and clean_caption(text)]
    if not cleaned:
        raise WrongCommand(f"the list {path} holds no prompts; give a row a 'prompt', 'caption' or 'text'")
    prompts = [Prompt(name or f"{path.stem}-{place:05d}", text) for place, (name, text) in enumerate(cleaned, 1)]
    refuse_twice([(prompt.id, prompt.text) for prompt in prompts], str(path))
    return prompts


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
