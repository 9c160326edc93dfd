"""The command reference, docs/commands.md: ``python -m ddil_eval.cli.command_reference [--check]``.

The reference is made from the names, types, defaults and docstrings of the commands, and not from help pages, since
their layout differs between versions of click.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from ddil_eval.cli import ddil
from ddil_eval.cli.choices import RowName
from ddil_eval.cli.pages import DOCS, page_command, wrapped

PAGE_END = "\f"
"""click ends the help text of a docstring at this character, and so does the reference."""

HEAD = "<!-- Written by `make docs` from the commands; edit their docstrings instead. -->\n\n# Commands\n"


def render() -> str:
    """Return the reference as Markdown: each command and sub-command with its usage, help, arguments and options."""
    with click.Context(ddil, info_name="ddil") as ctx:
        return HEAD + "".join(_command(ddil, ctx))


def _command(command: click.Command, ctx: click.Context) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    usage = [ctx.command_path, "[OPTIONS]", *map(_argument, arguments)]
    group = isinstance(command, click.Group)
    yield f"\n## `{ctx.command_path}`\n\n```\n{' '.join(usage + ['COMMAND ...'] * group)}\n```\n"
    yield f"\n{inspect.cleandoc((command.help or '').partition(PAGE_END)[0])}\n"
    rows = [_row(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if rows:
        yield "\n"
        yield from rows
    if isinstance(command, click.Group):
        yield from _members(command, ctx)


def _members(group: click.Group, ctx: click.Context) -> Iterator[str]:
    for name in group.list_commands(ctx):
        member = group.get_command(ctx, name)
        if member is not None and not member.hidden:
            with click.Context(member, info_name=name, parent=ctx) as inner:
                yield from _command(member, inner)


def _argument(argument: click.Argument) -> str:
    name = (argument.metavar or argument.name or "").upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(option: click.Option) -> str:
    """Return an option as an item of a list: its names, its default, and its help."""
    value = "" if option.is_flag or option.count else f" {_value(option)}"
    names = "`, `".join((*option.opts, *option.secondary_opts))
    more = " May be given several times." if option.multiple else ""
    default = f" ({default})" if (default := _default(option)) else ""
    text = f"- `{names}{value}`{default}: {' '.join((option.help or '').split())}{more}"
    return wrapped(text)


VALUES = {
    "integer": "N",
    "integer range": "N",
    "float": "NUMBER",
    "float range": "NUMBER",
    "path": "PATH",
    "file": "FILE",
    "directory": "DIR",
}
"""The word for a value, by the name of its click type."""


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, RowName):
        metavar = option.type.get_metavar(option, click.Context(ddil))
        return metavar.strip("[]").replace("|", " | ")
    if isinstance(option.type, click.Choice):
        return " | ".join(str(choice) for choice in option.type.choices)
    return VALUES.get(option.type.name, "TEXT")


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    default = option.to_info_dict()["default"]
    if default is None or callable(default) or default is False or default == () or isinstance(default, Path):
        return ""
    if default is True and option.secondary_opts:
        return f"default `{option.opts[0]}`"
    return f"default `{default}`"


reference = page_command(DOCS / "commands.md", render, "Write the command reference, or check that it is up to date.")

if __name__ == "__main__":
    reference(prog_name="python -m ddil_eval.cli.command_reference")
