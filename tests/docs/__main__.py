"""List the commands of all pages with what the tests do with them: ``python -m tests.docs [--missing]``."""

from __future__ import annotations

import sys

from tests.docs.pages import commands, pages, table


def main(missing_alone: bool) -> None:
    """Print every command, or those that ``commands.yaml`` does not name yet, as lines to paste into it."""
    rows, stray = table()
    for page in pages():
        found = [command for command in commands(page) if not (missing_alone and command in rows)]
        if found:
            print(f"{page}:")
        for command in found:
            row = rows.get(command)
            if missing_alone:
                print(f"    - {command.text!r}")
            else:
                print(f"  {row.mode if row else 'MISSING':5}  {command.text}")
    print(*stray, sep="\n")


if __name__ == "__main__":
    main("--missing" in sys.argv[1:])
