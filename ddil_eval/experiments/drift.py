"""Drift: covariate shift itself, transition by transition.

A student learns on one distribution of states and samples on another, its own. Its disagreement with the teacher under
its own states, over that under forward-diffused data, is the covariate-shift ratio: DAgger's quantity (Ross et al.,
1011.0686), loss under the learner's distribution over loss under the training distribution. Beside the ratio stand the
distance of the states themselves, the distance of the two trajectories, and how early each trajectory commits to its
end. All is paired by prompt and noise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ddil_core.data.base import DataSet, Prompt
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import image_side
from ddil_core.models.autoencoder import require_encoder
from ddil_core.models.generate import TRUNCATED
from ddil_core.models.model import load_model
from ddil_core.models.sampling import sampling_line
from ddil_core.support import ranks
from ddil_core.support.errors import WrongCommand
from ddil_core.support.lock import held_by_main
from ddil_core.support.progress import note, progress, warn
from ddil_core.support.protocol import content_hash
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.drift_records import Drift, one_grid, save_drift, used_sampling
from ddil_eval.experiments.drift_states import Drifting, measure_states, pair_models
from ddil_eval.experiments.prompts import Prompts, choose_prompts
from ddil_eval.experiments.results import code_sha256, hashed
from ddil_eval.experiments.targets import read_targets
from ddil_eval.features.storage import cached_arrays, concatenate, delete_parts
from ddil_eval.report.records import Record
from ddil_eval.statistics.moments import blocks


def measure_drift(config: DriftConfig, out: Path, device: str = "cpu") -> list[Record]:
    """Measure every student, save its records below ``out``, and draw its figure.

    A stopped run goes on at the next batch of prompts. Of several processes each visits its share of the batches. The
    main process alone measures, saves and returns the records.

    Raises:
        WrongCommand: no student, or models that do not fit each other.
        DdilError: something is missing or damaged, or another command uses the folder.
    """
    started = time.monotonic()
    pairs = _load(config, device)
    teacher = pairs[0].teacher
    require_encoder(teacher.pipeline.vae, teacher.reference)
    data = open_data(config.data)
    prompts = choose_prompts(data, config.num_prompts, None)
    if cut := teacher.cut([prompt.text for prompt in prompts.prompts]):
        warn(TRUNCATED.format(cut, config.num_prompts))
    with held_by_main(out):
        found, folders = [], []
        for pair in pairs:
            folders.append(out / "partial" / _work_key(config, pair, prompts))
            _visit(config, pair, data, prompts.prompts, folders[-1])
            if ranks.is_main():
                starts = (part.start for part in blocks(config.num_prompts, config.batch_size))
                parts = (_batch(folders[-1], start) for start in starts)
                found.append(Drift(pair, concatenate([cached_arrays(path, dict) for path in parts])))
        if not ranks.is_main():
            return []
        records = save_drift(config, found, data, prompts, out, device, started)
        for folder in folders:
            delete_parts(folder)
    return records


def _load(config: DriftConfig, device: str) -> list[Drifting]:
    students = config.all_students
    if not students:
        raise WrongCommand("drift needs a student; name one with --student, or with --set students=[REF]")
    if len(students) < len(config.students) + sum(map(len, config.groups.values())):
        raise WrongCommand("a student stands twice; name each student once")
    load = partial(load_model, device=device, compute=config.compute, **config.size)
    teacher = load(config.teacher)
    settings = config.teacher_steps, config.guidance_scale, config.consistency_step
    pairs = [pair_models(teacher, load(one), *settings) for one in students]
    _require_one_grid(config, dict(zip(students, pairs, strict=True)))
    used = used_sampling(pairs)
    note(sampling_line(config.teacher, used["teacher"]))
    for name, sampling in _by_group(config, used["students"]).items():
        note(sampling_line(name, sampling))
    return pairs


def _by_group(config: DriftConfig, used: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how students are sampled: by the name of their group where all of it are alike, or by their references."""
    found = {one: used[one] for one in config.students}
    for name, students in config.groups.items():
        alike = all(used[one] == used[students[0]] for one in students)
        found |= {name: used[students[0]]} if alike else {one: used[one] for one in students}
    return found


def _require_one_grid(config: DriftConfig, pairs: Mapping[str, Drifting]) -> None:
    grouped = [(name, [pairs[one] for one in students]) for name, students in config.groups.items()]
    grouped += [
        (" and ".join(two), [pairs[one] for name in two for one in config.groups[name]])
        for two in config.compared_groups
    ]
    for name, members in grouped:
        if not one_grid(members):
            raise WrongCommand(
                f"the students of {name} take their steps at different times, so that they cannot be compared; group "
                "students of one kind and of one number of steps"
            )


def _work_key(config: DriftConfig, pair: Drifting, prompts: Prompts) -> str:
    """Hash all that finished batches depend on."""
    content = {
        "protocol": hashed(config.model_dump(mode="json"), ("teacher", "students", "groups", "differences")),
        "prompts": prompts.described(),
        "weights": [model.weights_sha256() for model in (pair.teacher, pair.student)],
        "code": code_sha256(),
    }
    return content_hash(content)[:16]


def _batch(work: Path, start: int) -> Path:
    return work / f"{start:06d}.npz"


def _visit(config: DriftConfig, pair: Drifting, data: DataSet, prompts: Sequence[Prompt], work: Path) -> None:
    """Visit the states of this process's share of the batches, and wait for the other processes."""
    images = read_targets(data, config.num_prompts, image_side(pair.teacher)).images
    parts = list(blocks(config.num_prompts, config.batch_size))
    share = [parts[index] for index in ranks.mine(len(parts))]
    total = sum(part.stop - part.start for part in share)
    with progress(f"states of {pair.student.reference}", total=total) as advance:
        for part in share:
            measure = partial(measure_states, pair, prompts[part], images[part], config.seed)
            cached_arrays(_batch(work, part.start), measure)
            advance(part.stop - part.start)
    ranks.barrier()
