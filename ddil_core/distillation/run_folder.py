"""The folder of a run. Its file ``run.yaml`` says which run it holds.

The identity of a run is all that its student depends on: the teacher, the data, and the configuration without the keys
in ``MethodConfig.CHANGEABLE``. A null guidance scale of an earlier version counts as the teacher's own. A command with
another identity is refused. A command that differs in changeable keys
alone goes on with the run, and ``run.yaml`` lists the changes.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from ddil_core.distillation.config import MethodConfig
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import is_temporary, write_text
from ddil_core.support.lock import LOCK
from ddil_core.support.misfits import value_text
from ddil_core.support.outside import NotPlain, newer
from ddil_core.support.plain_yaml import load_plain_file

RUN = "run.yaml"
SCHEMA_VERSION = 1
"""The version of the layout of a run folder. A ``run.yaml`` that states none has it."""
C = TypeVar("C", bound=MethodConfig)
MOST_NAMED = 5
"""The most keys that the sentence on another run names."""

EARLIER = {"optimizer": "adamw"}
"""What keys were where a ``run.yaml`` does not say it. Their defaults are other ones now."""

_OLD_TEMPORARIES = ("run.partial", "log.partial", "student.partial")
"""Temporary files that a killed run of an earlier version may have left in the folder."""


def read_run(path: Path) -> dict[str, Any]:
    """Return the content of a ``run.yaml``.

    Raises:
        DdilError: the file is damaged (the message says how to go on with the run), or a newer ddil made it.
    """
    try:
        content = load_plain_file(path)
        if (message := newer(f"the run in {path.parent}", content, SCHEMA_VERSION)) is not None:
            raise DdilError(message)
        if isinstance(content, dict) and {"teacher", "data", "config"} <= content.keys():
            return content
        why = "it does not say what the run is"
    except OSError as error:
        why = str(error.strerror)
    except NotPlain as error:
        why = f"it {error}"[:120]
    raise DdilError(
        f"the file {path} is damaged ({why}); delete it and repeat the command that began the run, with --resume, "
        "which writes it again"
    )


def require_run_folder(out: Path, resume: bool) -> None:
    """Refuse a folder in which a run can neither begin nor go on. Nothing is written.

    Raises:
        WrongCommand: the folder holds other files, or ``resume`` is set and there is no run.
    """
    if (out / RUN).is_file():
        return
    if resume and not (out / "checkpoints").is_dir():
        raise WrongCommand(f"there is no run to resume in {out}: it has no {RUN}")
    if not resume and out.exists() and not all(_is_leftover(path) for path in out.iterdir()):
        raise WrongCommand(f"the folder {out} is not empty and holds no run; choose another --out")


def begun_with(out: Path, config: C) -> C:
    """Return a configuration with the optimiser of the run in ``out``, unless the configuration names one.

    The default was plain AdamW, and is fused AdamW now. So the command that began a run goes on with it.
    """
    if "optimizer" in config.model_fields_set or not (out / RUN).is_file():
        return config
    recorded = read_run(out / RUN)["config"]
    before = (EARLIER | recorded)["optimizer"] if isinstance(recorded, dict) else None
    known = get_args(type(config).model_fields["optimizer"].annotation)
    return config.model_copy(update={"optimizer": before}) if before in known else config


def _is_leftover(path: Path) -> bool:
    """Whether a process that was killed before it wrote ``run.yaml`` may have left this file."""
    return path.name == LOCK or is_temporary(path) or path.name in _OLD_TEMPORARIES


def open_run(
    out: Path,
    identity: dict[str, Any],
    provenance: Mapping[str, Any],
    config: type[MethodConfig],
    guidance_scale: float,
) -> None:
    """Begin a run in a folder, or go on with the run there. Delete what killed processes left.

    Args:
        out: The run folder. This process must hold its lock.
        identity: The keys teacher, teacher_sha256, data and config. The configuration is whole.
        provenance: What a new ``run.yaml`` says beside the identity.
        config: The class of the configuration.
        guidance_scale: The teacher's own guidance scale.

    Raises:
        WrongCommand: the folder holds another run.
        DdilError: ``run.yaml`` is damaged, or the disk does not take it.
    """
    path, now = out / RUN, datetime.now(UTC).isoformat(timespec="seconds")
    if path.is_file():
        content = read_run(path)
        before = require_same_run(out, identity, config, guidance_scale)
        changed = {key: new for key, (_, new) in _differences(before, identity["config"]).items()}
        if _mode(content) != _mode(provenance):
            changed["deterministic"] = _mode(provenance)
        if content["config"] != identity["config"] or changed:  # an older run may lack newer keys; these are no changes
            content |= {"config": identity["config"], "deterministic": _mode(provenance)}
            if changed:
                content["changes"] = [*(content.get("changes") or []), {"at": now, **changed}]
            _write(path, content)
    else:
        changeable = {"changeable": list(config.CHANGEABLE)}
        _write(path, {"schema_version": SCHEMA_VERSION} | identity | changeable | dict(provenance) | {"started": now})
    checkpoints = out / "checkpoints"
    old = [out / name for name in _OLD_TEMPORARIES]
    for left in (*old, *checkpoints.glob("*.partial"), *(out / "grids").glob("*.partial")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _mode(content: Mapping[str, Any]) -> bool:
    """Whether a run is deterministic. One of an earlier version does not say it, and is not."""
    return content.get("deterministic") is True


def require_same_run(
    out: Path, identity: Mapping[str, Any], config: type[MethodConfig], guidance_scale: float
) -> dict[str, Any]:
    """Refuse a folder that holds a run with another identity. Return the configuration of the run.

    Raises:
        WrongCommand: it does; the message names what differs.
        DdilError: ``run.yaml`` is damaged.
    """
    content = read_run(out / RUN)
    existing = content | {"config": _completed(content["config"], config, guidance_scale)}
    different = _differences(
        {key: _fixed(existing.get(key), key, config) for key in identity},
        {key: _fixed(identity[key], key, config) for key in identity},
    )
    if different:
        all_named = [f"{key.removeprefix('config.')} is {value_text(a)} there" for key, (a, _) in different.items()]
        named = ", ".join(all_named[:MOST_NAMED])
        named += f", and {len(all_named) - MOST_NAMED} more keys" if len(all_named) > MOST_NAMED else ""
        raise WrongCommand(f"the folder {out} holds another run ({named}); choose another --out")
    return dict(existing["config"])


def _fixed(value: Any, key: str, config: type[MethodConfig]) -> Any:
    """Return a value of ``run.yaml`` without the changeable keys of the configuration."""
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
    """Return where two nested mappings differ, with dots in the keys."""
    if a == b:
        return {}
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return {key: (a, b)}
    differences: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*a, *b]):
        differences |= _differences(a.get(name), b.get(name), f"{key}.{name}" if key else str(name))
    return differences


def _completed(written: Any, config: type[MethodConfig], guidance_scale: float) -> Any:
    """Return a written configuration as this version writes it. Return it unchanged where it does not fit."""
    try:
        return config.of_run(EARLIER | written, guidance_scale).model_dump(mode="json")
    except (ValueError, TypeError, AttributeError):
        return written


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
