"""Which of the shipped protocols a distillation starts from where none is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddil_core.distillation.run_folder import RUN, read_run
from ddil_core.models.layouts import LAYOUTS, Layout
from ddil_core.models.memory import latent_size
from ddil_core.models.references import resolve
from ddil_core.models.system_specs import load_systems
from ddil_core.models.weights import read_index, read_json
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.paths import user_path
from ddil_core.support.progress import note, warn
from ddil_core.support.resources import protocols

FULL_SIZE = 64
"""The side of Stable Diffusion's latents. The paper's settings are for teachers of at least this size."""


@dataclass(frozen=True)
class ChosenProtocol:
    """The protocol that a distillation starts from.

    Attributes:
        path: The file.
        made_for: The teacher that its settings were made for; None for a protocol of the user's choice.
    """

    path: Path
    made_for: str | None = None


def shipped_protocol(teacher: str, method: str, variant: str = "") -> ChosenProtocol | None:
    """Return the shipped protocol of a method for a teacher; None where there is none, as for a method of a package.

    A teacher of Stable Diffusion's size or more gets the paper's protocol, any other the one of its layout's world: of
    the gaussians world for points, of the shapes world for pictures. There a transformer gets its own where it has one.

    Args:
        teacher: The reference of the teacher.
        method: The name of the method.
        variant: The end of the file's name: "-lora" or "-1step".

    Raises:
        DdilError: the files of the teacher are not here, or damaged.
    """
    origin = _origin(teacher)
    small = world(teacher)
    candidates = [ChosenProtocol(protocols() / small / f"{method}{variant}.yaml", small)]
    if _is_transformer(teacher):
        own = protocols() / small / f"{method}{variant}-transformer.yaml"
        candidates.insert(0, ChosenProtocol(own, "shapes-flow"))
    if origin != "shapes" and _is_full_size(teacher):
        candidates.insert(0, ChosenProtocol(protocols() / "paper" / f"{method}{variant}.yaml", "sd15"))
        if origin in load_systems():
            own = protocols() / "paper" / f"{method}{variant}-{origin}.yaml"
            candidates.insert(0, ChosenProtocol(own, origin))
    return next((candidate for candidate in candidates if candidate.path.is_file()), None)


def announce(chosen: ChosenProtocol, teacher: str) -> None:
    """Say which protocol is used, and warn where it was made for another teacher."""
    note(f"protocol: {chosen.path}")
    if chosen.made_for not in (None, _origin(teacher)):
        warn(
            f"this protocol was made for the teacher {chosen.made_for!r}, and its settings may not fit {teacher!r}; "
            "name one of your own with --protocol, or change its keys with --set"
        )


def _origin(teacher: str) -> str:
    """Return the reference that a teacher comes from: that of a run's teacher, NAME of NAME:PATH, a hub id's system."""
    run = user_path(teacher, "the teacher") / RUN
    if run.is_file():
        return _origin(str(read_run(run)["teacher"]))
    name = teacher.partition(":")[0].partition("@")[0]
    return next((system for system, row in load_systems().items() if row.source == name), name)


def world(teacher: str) -> str:
    """Return the world of a teacher, small or not: the data set of its kind, and the folder of its protocols.

    A teacher whose files are not here draws pictures: points come with the package. Who loads it says what to do.

    Raises:
        DdilError: the files of the teacher are damaged.
    """
    layout = _layout_here(teacher)
    return "shapes" if layout is None else layout.world


def _layout_here(teacher: str) -> Layout | None:
    """Return the layout of a teacher; None also where its files are not here."""
    try:
        return _layout(teacher)
    except WrongCommand:
        return None


def _layout(teacher: str) -> Layout | None:
    """Return the layout of a teacher; None for one that is not known."""
    return LAYOUTS.get(str(read_index(resolve(teacher).folder).get("_class_name")))


def _is_transformer(teacher: str) -> bool:
    layout = _layout_here(teacher)
    return layout is not None and layout.network == "transformer"


def _is_full_size(teacher: str) -> bool:
    """Whether the latents of a teacher have at least Stable Diffusion's size."""
    layout = _layout(teacher)
    config = None if layout is None else resolve(teacher).folder / layout.network / "config.json"
    if config is None or not config.is_file():
        return False
    try:
        return min(latent_size(read_json(config), teacher)) >= FULL_SIZE
    except DdilError:  # loading the teacher gives this error again, with what to do
        return False
