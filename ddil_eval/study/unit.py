"""One unit of a study: distil, measure every student, save the record, clear up."""

from __future__ import annotations

import os
import re
import shutil
import time
from functools import cache
from pathlib import Path

from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.distill import distill
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import SYSTEM_FILE, SystemFile
from ddil_core.support.checksums import require_checksum, with_checksum
from ddil_core.support.lock import waiting_for
from ddil_core.support.protocol import content_hash
from ddil_core.support.size import SizeKeys
from ddil_eval.study.config import MeasureConfig
from ddil_eval.study.matrix import Unit
from ddil_eval.study.measures import Measurement, measure_student
from ddil_eval.study.records import record_path, save_unit

KEPT = ("run.yaml", "log.jsonl")
"""What stays of a run folder after the measurement."""

NOT_BEFORE = frozenset({"ddil", "guidance_scale", "guidance_range", "stages", "keep_stages", "updates"})
"""Keys of a configuration on which the parts before the first stage do not depend."""


def run_unit(unit: Unit, out: Path, device: str = "cpu", keep_run: bool = False) -> None:
    """Distil a unit, measure its students and save its record. A finished unit is left alone.

    A stopped unit goes on at its last checkpoint.

    Args:
        unit: The unit.
        out: The folder of the study.
        device: Where networks are evaluated.
        keep_run: Keep the run folder whole.

    Raises:
        DdilError: the distillation or the measurement fails.
    """
    if record_path(out, unit).is_file():
        return
    started, run = time.monotonic(), out / "runs" / unit.name
    teacher_name, data = unit.study["teacher"], unit.study["data"]
    teacher = _teacher(teacher_name, device, **unit.config.size)
    config, nfe = unit.within_budget(teacher)
    shared = _shared_parts(unit, config, teacher, out)
    for part, ours in shared.items():
        _link(ours, run / "checkpoints" / part)
    distill(teacher_name, data, config, run, resume=(run / "checkpoints").is_dir(), device=device)
    for part, ours in shared.items():
        _link(run / "checkpoints" / part, ours)
    measure = MeasureConfig.model_validate(unit.study["measure"])
    students = {
        steps: measure_student(Measurement(teacher, folder, data, config, measure, unit.seed))
        for steps, folder in students_of(run).items()
    }
    weights = teacher.weights_sha256()
    save_unit(out, unit, config.model_dump(mode="json"), weights, nfe, students, time.monotonic() - started)
    if not keep_run:
        _clear(run)


def students_of(run: Path) -> dict[int, Path]:
    """Return the students that a run left, by the number of their steps: those of its stages, and the last one."""
    stages = {
        int(match[1]): folder
        for folder in (run / "stages").glob("*-steps")
        if (match := re.fullmatch(r"(\d+)-steps", folder.name))
    }
    made = SystemFile.model_validate_json((run / "student" / SYSTEM_FILE).read_bytes())
    last = {} if made.steps is None else {made.steps: run / "student"}
    return dict(sorted((stages | last).items(), reverse=True))


def _shared_parts(unit: Unit, config: MethodConfig, teacher: Model, out: Path) -> dict[str, Path]:
    """Return the parts of ``checkpoints`` that units have in common, each with the file that keeps it.

    Every unit encodes the same data. Before its first stage, every unit of a seed and a network trains the same network
    without guidance and without rollouts.
    """
    content = config.model_dump(mode="json")
    size = {side: content[side] for side in SizeKeys.model_fields if side in content}
    source = [teacher.weights_sha256(), unit.study["data"], *([size] if size else [])]
    before = {key: value for key, value in content.items() if key not in NOT_BEFORE}
    keys = {"data": [*source, content["pool"]], "fit": [*source, before], "convert": [*source, before]}
    return {
        f"{part}.safetensors": out / "shared" / f"{part}-{content_hash(key)[:12]}.safetensors"
        for part, key in keys.items()
    }


def _link(source: Path, target: Path) -> None:
    """Give a file a second name with a checksum, or copy it where the disk has no links. Neither is changed later."""
    if not source.is_file():
        return
    with waiting_for(target.parent):  # units of one seed make the same part at once
        if target.is_file():
            return
        require_checksum(source, "the shared part of a study", "delete the file and its checksum to make it again")
        with with_checksum(target) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)


def _clear(run: Path) -> None:
    """Delete all of a run folder but its logs."""
    for path in run.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@cache
def _teacher(reference: str, device: str, height: int | None, width: int | None) -> Model:
    teacher = load_model(reference, device, height=height, width=width)
    teacher.text_encoders_stay = False  # the next unit's distillation needs the memory
    return teacher
