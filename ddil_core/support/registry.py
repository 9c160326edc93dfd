"""A table of rows by name. Other installed packages can add rows.

A package adds a row by an entry point. The value of the entry point is the row, and its group names the table:

    [project.entry-points."ddil.metrics"]
    my_metric = "my_package.my_metric:METRIC"

Rows of other packages are loaded when a name is not among this project's, or when a caller lists all names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Row = TypeVar("Row")


def _name(row: Any) -> str:
    return str(row.name)


class Registry(Mapping[str, Row], Generic[Row]):
    """Rows by name, in a fixed order: first this project's rows, then the rows of other packages, sorted by name.

    Args:
        noun: What a row is, in messages: "solver", "metric".
        group: The group of the entry points.
        kind: The class that a row must be an instance of.
        rows: This project's rows.
        key: Gives a row's name.
    """

    def __init__(
        self, noun: str, group: str, kind: type[Row], rows: Iterable[Row], key: Callable[[Row], str] = _name
    ) -> None:
        self.noun, self.group, self.kind, self._key = noun, group, kind, key
        self._own = {key(row): row for row in rows}
        self._added: dict[str, Row] | None = None

    def __getitem__(self, name: str) -> Row:
        return self._own[name] if name in self._own else self._others()[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._others()

    def __len__(self) -> int:
        return len(self._own) + len(self._others())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._others()

    def add(self, row: Row) -> None:
        """Add a row for this process, as a script or a notebook does.

        Raises:
            DdilError: a row of this name exists already.
        """
        name = self._key(row)
        if name in self:
            raise DdilError(f"the {self.noun} {name!r} exists already; give the new one another name")
        self._own[name] = row

    def find(self, name: str) -> Row:
        """Return the row of this name.

        Raises:
            WrongCommand: no row has this name. The message lists the names, and names the nearest one.
        """
        if name in self:
            return self[name]
        nearest = difflib.get_close_matches(name, list(self), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise WrongCommand(f"the {self.noun} {shown(name)} is not known; it may be one of {', '.join(self)}{hint}")

    def _others(self) -> dict[str, Row]:
        """Load the rows of other packages, once.

        Raises:
            DdilError: an entry point cannot be imported, is no row, or has the name of another row.
        """
        if self._added is None:
            from importlib.metadata import entry_points  # slow: `ddil --help` imports this module

            self._added = {}  # set first, so that a package can use this table during its import
            try:
                for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
                    row = self._load(point)
                    self._added[self._key(row)] = row
            except DdilError:
                self._added = None
                raise
        return self._added

    def _load(self, point: EntryPoint) -> Row:
        where = f"the entry point {point.name!r} ({point.value}) of the group {self.group!r}"
        try:
            row = point.load()
        except Exception as error:  # another package's code may raise anything
            reason = " ".join(str(error).split())[:200]
            raise DdilError(
                f"{where} cannot be imported ({type(error).__name__}: {reason}); mend or uninstall the package that "
                "brings it"
            ) from error
        if not isinstance(row, self.kind):
            given, wanted = type(row).__name__, self.kind.__name__
            raise DdilError(f"{where} is of the class {given} and not {wanted}; mend the package that brings it")
        if self._key(row) in self._own or self._key(row) in (self._added or {}):
            raise DdilError(f"{where} takes the name {self._key(row)!r}, which exists already; give it another name")
        return row
