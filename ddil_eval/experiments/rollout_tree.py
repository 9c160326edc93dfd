"""The rollouts of the covariate-shift analysis, as one tree: strings with the same prefix share its states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ddil_core.data.base import Prompt
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor, RolloutResult, rollout_latents
from ddil_core.diffusion.schedule import Time
from ddil_core.models.model import Model, load_model
from ddil_core.models.sampling import sampling_line
from ddil_core.models.turns import actors_sampling, take_turns
from ddil_core.support import ranks
from ddil_core.support.compute import Compute
from ddil_core.support.devices import beside, sent, torch_dtype
from ddil_core.support.progress import note, progress
from ddil_core.support.size import OWN_SIZE, WantedSize
from ddil_eval.experiments.shift_runs import ShiftRun
from ddil_eval.features.extraction import Extractors, map_ahead
from ddil_eval.features.storage import Arrays, Features, cached_arrays, concatenate
from ddil_eval.report.records import digest
from ddil_eval.statistics.moments import blocks


@dataclass(frozen=True)
class Pair:
    """Teacher and student, ready to take turns.

    Attributes:
        teacher: The teacher, which also encodes the prompts and decodes the images.
        student: The student.
        actors: Both as the actors of a rollout.
        grid: The student's times, where one can hand over to the other.
    """

    teacher: Model
    student: Model
    actors: dict[str, Actor]
    grid: list[Time]

    @property
    def sampling(self) -> dict[str, dict[str, Any]]:
        """The steps, the solver and the guidance scale of each, for records."""
        return actors_sampling(self.actors)

    @property
    def names(self) -> dict[str, str]:
        """What messages call the two actors."""
        return {TEACHER: f"the teacher {self.teacher.reference!r}", STUDENT: f"the student {self.student.reference!r}"}


def load_pair(
    teacher: str,
    student: str,
    device: str = "cpu",
    *,
    teacher_steps: int = 32,
    guidance_scale: float | None = None,
    solver: str = "ddim",
    compute: Compute | None = None,
    size: WantedSize = OWN_SIZE,
    teacher_dtype: str | None = None,
    student_dtype: str | None = None,
) -> Pair:
    """Load two models that take turns.

    Args:
        teacher: The teacher's reference.
        student: The student's reference.
        device: The device of this process.
        teacher_steps: The number of the teacher's steps on its own grid.
        guidance_scale: The teacher's guidance scale. Defaults to the model's own.
        solver: The solver of both models.
        compute: How both models compute. None: in float32 without TF32, not compiled.
        size: The height and width of the images.
        teacher_dtype: The dtype of the weights of the teacher's network, in place of that of ``compute``.
        student_dtype: The dtype of the weights of the student's network, in place of that of ``compute``.

    Raises:
        WrongCommand: the two models cannot take turns.
    """
    load = partial(load_model, device=device, compute=compute, **size)
    models = load(teacher), load(student)
    for model, dtype in zip(models, (teacher_dtype, student_dtype), strict=True):
        if dtype is not None:
            model.denoiser.net.to(torch_dtype(dtype))
    pair = Pair(*models, *take_turns(*models, teacher_steps, guidance_scale, solver))
    for model, used in zip(models, pair.sampling.values(), strict=True):
        note(sampling_line(model.reference, used))
    return pair


@dataclass(frozen=True)
class Watch:
    """A second measurement on states that the tree visits.

    Attributes:
        prefixes: The prefixes of strings whose states it takes.
        measure: Takes the slice of a chunk's prompts and the states by prefix, each [prompts, C, h, w]. Returns arrays
            of as many rows as there are prompts.
    """

    prefixes: Collection[str]
    measure: Callable[[slice, Mapping[str, Tensor]], Arrays]


@dataclass
class RolloutTree:
    """Rolls all runs out, chunk by chunk: latents → images → features. A finished chunk is kept in a file.

    Attributes:
        pair: Teacher and student.
        extractors: The networks of the metrics.
        work: The folder of finished chunks.
        prompts: The N prompts.
        runs: The runs.
        seed: The seed of the noise.
        chunk: The number of prompts in a chunk.
        batch_size: The most rows in a batch of the device.
        watch: A second measurement on the states of all prompts, or None.
    """

    pair: Pair
    extractors: Extractors
    work: Path
    prompts: Sequence[Prompt]
    runs: Sequence[ShiftRun]
    seed: int
    chunk: int
    batch_size: int
    watch: Watch | None = None

    def grow(self) -> None:
        """Make this process's share of the chunks, and wait until the other processes have made theirs."""
        chunks = list(blocks(len(self.prompts), self.chunk))
        share = [chunks[index] for index in ranks.mine(len(chunks))]
        with progress("rollouts", total=sum(chunk.stop - chunk.start for chunk in share)) as advance:
            for chunk in share:
                self._chunk(chunk)
                advance(chunk.stop - chunk.start)
        ranks.barrier()

    def gather(self) -> tuple[Features, dict[tuple[int, str], int], dict[str, int]]:
        """Read all chunks.

        Returns:
            The features [M, d] of the M distinct images, by network; the row of each (prompt, string); the network
            evaluations, by actor.
        """
        parts: list[Features] = []
        place: dict[tuple[int, str], int] = {}
        evaluations = dict.fromkeys(self.pair.actors, 0)
        for chunk in blocks(len(self.prompts), self.chunk):
            arrays = self._chunk(chunk)
            keys = zip(arrays["sample"].tolist(), arrays["string"].tolist(), strict=True)
            place.update({key: len(place) + row for row, key in enumerate(keys)})
            parts.append({name: arrays[name] for name in self.extractors.networks})
            evaluations = {name: count + int(arrays[f"evaluations {name}"]) for name, count in evaluations.items()}
        return concatenate(parts), place, evaluations

    def gather_watched(self) -> Arrays:
        """Read the arrays of the second measurement from all chunks, in the order of the prompts."""
        parts = []
        for chunk in blocks(len(self.prompts), self.chunk):
            arrays = self._chunk(chunk).items()
            parts.append({name.removeprefix(_WATCHED): one for name, one in arrays if name.startswith(_WATCHED)})
        return concatenate(parts)

    def _chunk(self, chunk: slice) -> Arrays:
        """Return what ``_measure`` gives for a chunk, from its file where there is one."""
        strings = [sorted({run.strings[index] for run in self.runs}) for index in range(chunk.start, chunk.stop)]
        path = self.work / f"{digest([strings, chunk.start])[:16]}.npz"
        return cached_arrays(path, lambda: self._measure(chunk, strings))

    def _measure(self, chunk: slice, strings: list[list[str]]) -> Arrays:
        """Roll one chunk out; return the features, the (sample, string) of each row, and the evaluations by actor."""
        prompts = self.prompts[chunk]
        keep = () if self.watch is None else self.watch.prefixes
        most = min(self.chunk, len(self.prompts)) * len(self.runs)  # rows of a level, the same for all chunks
        ends = _roll_out(self.pair, prompts, strings, self.seed, min(self.batch_size, most), keep)
        texts = [prompts[row].text for row in ends.sample]
        parts = blocks(len(texts), self.batch_size)
        begun = ((_begin_decoding(self.pair, ends.latents[part]), texts[part]) for part in parts)
        features = concatenate(list(map_ahead(begun, self._extract)))
        places = {"sample": chunk.start + np.array(ends.sample), "string": np.array(ends.string)}
        watched = {} if self.watch is None else self.watch.measure(chunk, ends.kept)
        found = features | places | {f"{_WATCHED}{name}": one for name, one in watched.items()}
        return found | {f"evaluations {name}": np.array(n) for name, n in ends.evaluations.items()}

    def _extract(self, batch: tuple[Callable[[], np.ndarray], list[str]]) -> Features:
        """Wait for the images of a batch, and take their features beside the decoding of the next one."""
        images, captions = batch
        with beside(self.pair.teacher.device, "features"):
            return self.extractors(images(), captions)


_WATCHED = "watched "
"""What the names of a second measurement's arrays begin with, in the file of a chunk."""


def roll_out_images(
    pair: Pair, prompts: Sequence[Prompt], strings: Sequence[str], *, seed: int, batch_size: int
) -> np.ndarray:
    """Roll every prompt out along every string.

    Args:
        pair: Teacher and student.
        prompts: The P prompts.
        strings: The S strings, all different.
        seed: The seed of the noise.
        batch_size: The most rows in a batch of the device.

    Returns:
        Images uint8 [P, S, H, W, 3].
    """
    most = len(prompts) * len(strings)
    ends = _roll_out(pair, prompts, [set(strings)] * len(prompts), seed, min(batch_size, most))
    images = _begin_decoding(pair, ends.latents)()
    place = {key: row for row, key in enumerate(zip(ends.sample, ends.string, strict=True))}
    return np.stack([[images[place[row, string]] for string in strings] for row in range(len(prompts))])


def _roll_out(
    pair: Pair,
    prompts: Sequence[Prompt],
    strings: Sequence[Collection[str]],
    seed: int,
    batch_size: int,
    keep: Collection[str] = (),
) -> RolloutResult:
    """Roll prompts out along their strings, from each prompt's own noise."""
    decoder = pair.teacher
    with decoder.compute.precision():
        condition = decoder.encode([prompt.text for prompt in prompts])
        z = sent(initial_noise([Sample(p.id) for p in prompts], decoder.latent_shape, seed), decoder.device)
        return rollout_latents(pair.actors, z, condition, strings, batch_size=batch_size, names=pair.names, keep=keep)


def _begin_decoding(pair: Pair, latents: Tensor) -> Callable[[], np.ndarray]:
    with pair.teacher.compute.precision():
        return pair.teacher.begin_decode(latents)
