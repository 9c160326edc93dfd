"""Pages of the docs that are made from the code: the command that writes such a page, or checks it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import click

DOCS = Path(__file__).resolve().parents[2] / "docs"
CODE = re.compile(r"`[^`]*`")
WIDTH = 116


def page_command(default: Path, render: Callable[[], str], text: str) -> click.Command:
    """Return the command of a page.

    Args:
        default: The file of the page.
        render: Returns the page as Markdown.
        text: The help text of the command.
    """

    @click.command(help=text)
    @click.option("--check", is_flag=True, help="Write nothing. Fail if the file is out of date.")
    @click.option("--file", type=click.Path(dir_okay=False, path_type=Path), default=default, help="The file.")
    def page(check: bool, file: Path) -> None:
        content = render()
        if not check:
            if not file.parent.is_dir():
                raise click.ClickException(
                    f"{file.parent} is not a folder: run this in a checkout, or name a file with --file."
                )
            file.write_text(content, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != content:
            raise click.ClickException(f"{_near(file)} is out of date: run `make docs` and commit it.")

    return page


def _near(file: Path) -> Path:
    root = DOCS.parent
    return file.relative_to(root) if file.is_relative_to(root) else file


def wrapped(item: str) -> str:
    """Return an item of a list in lines of at most ``WIDTH`` columns. No line ends inside code."""
    spaced = CODE.sub(lambda code: code[0].replace(" ", "\0"), item)
    lines = textwrap.wrap(spaced, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ") + "\n"
