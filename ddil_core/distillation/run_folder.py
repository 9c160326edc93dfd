"""What a run folder is: the files that a run keeps in it, and ``run.yaml``, which says which run it is.

A run's identity is what its student depends on: the teacher, the data, and the configuration without ``MethodConfig.CHANGEABLE``.
A command with another identity is refused. One that differs only in what is changeable goes on with the run, and ``run.yaml`` keeps
what was changed.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ddil_core.distillation.config import MethodConfig
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import delete_temporaries, is_temporary, write_text
from ddil_core.support.lock import LOCK

RUN = "run.yaml"

_OLD_TEMPORARIES = ("run.partial", "log.partial", "student.partial")
"""What a killed run of an earlier version may have left in the folder."""


def read_run(path: Path) -> dict[str, Any]:
    """What a ``run.yaml`` says.

    Raises:
        DdilError: it is damaged; the sentence says how to go on with the run.
    """
    try:
        told = yaml.safe_load(path.read_bytes())
        if isinstance(told, dict) and {"teacher", "data", "config"} <= told.keys():
            return told
        why = "it does not say what the run is"
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        why = " ".join(str(error).split())[:120]
    raise DdilError(
        f"the file {path} is damaged ({why}); delete it and repeat the command that began the run, with --resume, which writes it "
        "again"
    )


def require_run_folder(out: Path, resume: bool) -> None:
    """Whether a run can begin or go on in a folder, which is not touched.

    Raises:
        WrongCommand: it holds other files, or ``resume`` was asked for and there is no run.
    """
    if (out / RUN).is_file():
        return
    if resume and not (out / "checkpoints").is_dir():
        raise WrongCommand(f"there is no run to resume in {out}: it has no {RUN}")
    if not resume and out.exists() and not all(_is_left(path) for path in out.iterdir()):
        raise WrongCommand(f"the folder {out} is not empty and holds no run; choose another --out")


def _is_left(path: Path) -> bool:
    """Whether a file is one that a process killed before it wrote ``run.yaml`` leaves."""
    return path.name == LOCK or is_temporary(path) or path.name in _OLD_TEMPORARIES


def open_run(out: Path, identity: dict[str, Any], provenance: Mapping[str, Any], config: type[MethodConfig]) -> None:
    """Begin a run in a folder that this process holds, or take one up again, and delete what killed processes left.

    ``identity`` has the keys teacher, teacher_sha256, data and config, the whole configuration. ``provenance`` is written beside
    it.

    Raises:
        WrongCommand: the folder holds another run.
        DdilError: ``run.yaml`` is damaged, or the disk does not take it.
    """
    path, now = out / RUN, datetime.now(UTC).isoformat(timespec="seconds")
    if path.is_file():
        told = read_run(path)
        before = require_same_run(out, identity, config)
        changed = _differences(before, identity["config"])
        if changed:
            told["config"] = identity["config"]
            change = {"at": now, **{key: new for key, (_, new) in changed.items()}}
            told["changes"] = [*(told.get("changes") or []), change]
            _write(path, told)
    else:
        told = identity | {"changeable": list(config.CHANGEABLE)} | dict(provenance) | {"started": now}
        _write(path, told)
    checkpoints = out / "checkpoints"
    delete_temporaries(out, checkpoints, checkpoints / "data.parts", out / "grids")
    old = [out / name for name in _OLD_TEMPORARIES]
    for left in (*old, *checkpoints.glob("*.partial"), *(out / "grids").glob("*.partial")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def require_same_run(out: Path, identity: Mapping[str, Any], config: type[MethodConfig]) -> dict[str, Any]:
    """Whether the run in a folder is the one that is asked for; returns its configuration.

    Raises:
        WrongCommand: it is another; the sentence names what differs.
        DdilError: ``run.yaml`` is damaged.
    """
    told = read_run(out / RUN)
    held = told | {"config": _with_defaults(told["config"], config)}  # of a run begun before a key was known
    different = _differences(
        {key: _fixed(held.get(key), key, config) for key in identity},
        {key: _fixed(identity[key], key, config) for key in identity},
    )
    if different:
        named = ", ".join(f"{key.removeprefix('config.')} is {a!r} there" for key, (a, _) in different.items())
        raise WrongCommand(f"the folder {out} holds another run ({named}); choose another --out")
    return dict(held["config"])


def _fixed(value: Any, key: str, config: type[MethodConfig]) -> Any:
    """A part of a run's identity: of its configuration what is not changeable."""
    if key != "config" or not isinstance(value, dict):
        return value
    value = copy.deepcopy(value)
    for name in config.CHANGEABLE:
        *sections, last = name.split(".")
        place: Any = value
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
    return value


def _differences(a: Any, b: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested values differ, with dots in the keys."""
    if a == b:
        return {}
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return {key: (a, b)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*a, *b]):
        found |= _differences(a.get(name), b.get(name), f"{key}.{name}" if key else str(name))
    return found


def _with_defaults(told: Any, config: type[MethodConfig]) -> Any:
    """A configuration as it was written down, with the defaults of the keys that it lacks; as it is where it does not fit."""
    try:
        return config.model_validate(told).model_dump(mode="json")
    except ValueError:
        return told


def _write(path: Path, told: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(told), sort_keys=False, allow_unicode=True))
