"""Find the commands on the pages, and what ``commands.yaml`` says about each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("commands.yaml")

GENERATED = {"docs/commands.md"}
"""Pages without commands to run: the usage of each command, written from the commands themselves."""

PROGRAMS = ("ddil", "python", "make", "torchrun", "accelerate")
"""The first words of the lines that are commands."""

MODES = ("run", "long", "parse", "skip")
"""What a test does with a command: run it small; run it small under ``-m docs`` alone; parse it; nothing."""

_FENCE = re.compile(r"^```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL = {"", "sh", "bash"}
"""The kinds of fenced blocks that hold commands; many pages name none."""


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: The path of the page in the repository.
        text: The command in one line, without a comment.
    """

    page: str
    text: str


@dataclass(frozen=True)
class Row:
    """What ``commands.yaml`` says about a command.

    Attributes:
        mode: One of ``MODES``.
        note: The small arguments that are appended (``run``, ``long``), or the reason (``skip``).
    """

    mode: str
    note: str = ""


def pages() -> list[str]:
    """Return the pages that readers follow, in the order of the site's navigation, the README first.

    mkdocs names a page that its navigation lacks, and its strict build fails.
    """
    listed = [f"docs/{page}" for page in _leaves(_navigation())]
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    in_order = [page for page in listed if page in found]
    return ["README.md", "CONTRIBUTING.md", *(page for page in in_order if page not in GENERATED)]


def commands(page: str) -> list[Command]:
    """Return the commands in the fenced blocks of a page, in their order and each once."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = (fence["text"] for fence in _FENCE.finditer(text) if fence["kind"] in _SHELL)
    lines = (line for block in blocks for line in joined(block))
    return list(dict.fromkeys(Command(page, line) for line in lines if line.split()[0] in PROGRAMS))


def joined(block: str) -> Iterator[str]:
    """Yield the lines of a block as a shell reads them: continued lines joined, comments and blank lines left out."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        line = " ".join(re.sub(r"(^|\s)#\s.*$", "", line).split())
        if line:
            yield line


def table() -> tuple[dict[Command, Row], list[str]]:
    """Return a row for each command that ``commands.yaml`` names, and what it names that is on no page.

    A page's value is a mapping from modes to commands, or a text: the reason why its commands are skipped. A
    command is named by its text, or by a part of it that no other command of the page has.
    """
    content: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    short = content.pop("short")
    rows: dict[Command, Row] = {}
    stray: list[str] = []
    for page, modes in content.items():
        on_page = commands(page)
        if isinstance(modes, str):
            rows |= {command: Row("skip", modes) for command in on_page}
            continue
        for mode, entries in modes.items():
            assert mode in MODES, f"{page}: there is no mode {mode!r}"
            for part, note in entries.items() if isinstance(entries, dict) else ((part, "") for part in entries):
                named = [command for command in on_page if command.text == part]
                named = named or [command for command in on_page if part in command.text]
                if len(named) == 1 and named[0] not in rows:
                    rows[named[0]] = Row(mode, Template(note).substitute(short))
                else:
                    stray.append(f"{page}: {part!r} names {len(named)} commands, or one that has a row")
    return rows, stray


def _navigation() -> Any:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def _leaves(tree: Any) -> Iterator[str]:
    """Yield the pages of a navigation in their order."""
    if isinstance(tree, str):
        yield tree
    else:
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
