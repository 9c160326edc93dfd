"""List the commands of all pages with what the tests do with them: ``python -m tests.docs [--missing]``."""

from __future__ import annotations

import click

from tests.docs.pages import commands, pages, table


@click.command(help=__doc__)
@click.option("--missing", "missing_alone", is_flag=True, help="List the commands without a row, as lines to paste.")
def main(missing_alone: bool) -> None:
    rows, stray = table()
    for page in pages():
        found = [command for command in commands(page) if not (missing_alone and command in rows)]
        if found:
            click.echo(f"{page}:")
        for command in found:
            row = rows.get(command)
            if missing_alone:
                click.echo(f"    - {command.text!r}")
            else:
                click.echo(f"  {row.mode if row else 'MISSING':5}  {command.text}")
    for name in stray:
        click.echo(name, err=True)


if __name__ == "__main__":
    main()
