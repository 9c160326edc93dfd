"""The base of a student: the model that its teacher comes from, as far as that is known, and its licence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ddil_core.distillation.run_folder import RUN, read_run
from ddil_core.models.catalogue import SHIPPED_LICENCE
from ddil_core.models.hub import Repository
from ddil_core.models.references import SHIPPED
from ddil_core.models.system_specs import load_systems
from ddil_core.support.paths import user_path


@dataclass(frozen=True)
class Base:
    """The base of a student.

    Attributes:
        name: What a reader is told. Of a path of the user's machine, only its last part.
        hub: The id on the hub. None: it is not known.
        licence: The licence of its weights. None: nobody read it at its source.
    """

    name: str
    hub: str | None = None
    licence: str | None = None


def base_of(teacher: object) -> Base:
    """Return the base that a teacher's reference comes from. The teacher of a run comes from that run's teacher."""
    reference = str(teacher)
    if reference in SHIPPED:
        return Base(f"`{reference}`, shipped with ddil", None, SHIPPED_LICENCE)
    systems = load_systems()
    head, colon, tail = reference.partition(":")
    if head in systems and not colon:
        row = systems[head]
        source = row.source if row.base is None else None
        return Base(f"{row.title} (`{head}`)", source, row.licence)
    if head in systems:
        return Base(f"a local model, `{last_part(tail)}`, in the layout of {systems[head].title}")
    path = user_path(reference, "the teacher")
    if (path / RUN).is_file():
        before = base_of(read_run(path / RUN)["teacher"])
        return Base(f"`{last_part(reference)}`, itself a student of {before.name}", None, before.licence)
    repository = None if path.exists() else Repository.parse(reference)
    row_of = next((row for row in systems.values() if repository is not None and row.source == repository.name), None)
    # A relative path such as runs/teacher looks like an id of the hub. Its files tell them apart.
    if repository is None or (row_of is None and repository.snapshot() is None):
        return Base(f"a local model, `{last_part(reference)}`")
    return Base(f"`{reference}`", repository.name, None if row_of is None else row_of.licence)


def last_part(path: str) -> str:
    """Return the last part of a path or URL, so that no card tells where a user keeps files, or a key to them."""
    bare = re.split(r"[?#]", path, maxsplit=1)[0] if "://" in path else path
    return bare.replace("\\", "/").rstrip("/").rpartition("/")[2].rpartition("@")[2] or "a place that is not named"
