"""A package of another author, in one file: a solver, a metric, a distiller, an inverter, a data set and an experiment.

``tests/cli/test_additions.py`` copies this file out of the checkout and installs it with entry points.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddil_core.data.base import Prompt
from ddil_core.data.datasets import DataSetKind
from ddil_core.diffusion.parameterization import to_eps
from ddil_core.diffusion.schedule import Schedule
from ddil_core.diffusion.solvers import Solver
from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.methods import Method
from ddil_core.distillation.student import Student
from ddil_core.inversion.problem import Candidates, InversionProblem, Inverter
from ddil_core.models.sampling import Sampling
from ddil_core.support.protocol import Strict
from ddil_eval.experiments.experiments import Experiment
from ddil_eval.metrics import Extractor, Metric, Network
from ddil_eval.report.records import Record, RecordedEstimate, RecordedMetric, save_record

# A solver


def step(
    schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, x0: Tensor, carry: Any = None, noise: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Take DDIM's step."""
    alpha_t, sigma_t = schedule.at(t, z)
    alpha_s, sigma_s = schedule.at(s, z)
    return alpha_s * x0 + sigma_s * to_eps(x0, z, alpha_t, sigma_t), None


SOLVER = Solver("toy_ddim", step, stateful=False, stochastic=False, source="a toy")

# A metric


def open_redness(device: str) -> Extractor:
    return lambda images, captions: images[..., 0].mean(axis=(1, 2), dtype=np.float64)[:, None] / 255


METRIC = Metric(
    name="toy_redness",
    title="mean of the red channel",
    direction="higher",
    kind="mean",
    network=Network("toy_redness", "nothing", open_redness),
    bounds=(0.0, 1.0),
)

# A distiller


class ToyConfig(MethodConfig):
    method: Literal["toy_copy"] = "toy_copy"
    student_steps: int = 2


def train(run: Any) -> Student:
    """Return a copy of the teacher, sampled without guidance."""
    net = copy.deepcopy(run.model.denoiser.net)
    sampling = Sampling("ddim", steps=run.config.student_steps, guidance_scale=1.0, distilled=True)
    return Student(net, run.model.denoiser.prediction, sampling)


METHOD = Method("toy_copy", "A copy of the teacher", "a toy", ToyConfig, lambda model, config: None, train)

# An inverter


class ToyWords(Strict):
    text: str = "a small red circle"


def invert(problem: InversionProblem, settings: ToyWords, advance: Callable[[], None]) -> Candidates:
    """Return the same prompt for every image."""
    advance()
    return [[settings.text] for _ in problem.ids]


INVERTER = Inverter(
    name="toy_words",
    title="the same words for every image",
    settings=ToyWords,
    run=invert,
    evaluations=lambda settings: 1,
    source="a toy",
)

# A data set


class ToyData:
    """Red images of rising brightness."""

    reference = "toy_reds"
    side: int | None = None

    def identity(self) -> str:
        return self.reference

    def require(self, count: int, side: int) -> None:
        pass

    def image(self, index: int, side: int) -> np.ndarray:
        image = np.zeros((side, side, 3), np.uint8)
        image[..., 0] = 8 * index % 256
        return image

    def training(
        self, count: int, side: int, batch_size: int = 64, first: int = 0
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        for start in range(first * batch_size, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            yield np.stack([self.image(row, side) for row in rows]), ["red"] * len(rows)

    def prompts(self, count: int) -> list[Prompt]:
        return [Prompt(f"toy-{index}", "red") for index in range(count)]

    def images(self, count: int, batch_size: int = 64) -> Iterator[np.ndarray]:
        for start in range(0, count, batch_size):
            yield np.stack([self.image(row, 64) for row in range(start, min(start + batch_size, count))])


DATA = DataSetKind(
    name="toy_reds",
    form="toy_reds",
    use="training, evaluation",
    description="red images of rising brightness",
    source="drawn by the toy",
    needs="",
    open=lambda reference, download: ToyData(),
)

# An experiment


class ToyExperiment(Strict):
    experiment: Literal["toy-sum"] = "toy-sum"
    numbers: tuple[int, ...]
    seed: int = 0


def add(config: ToyExperiment, out: Path, device: str) -> list[Record]:
    """Record a sum, which stands for a measurement."""
    total = float(torch.tensor(config.numbers, device=device).sum())
    estimate = RecordedEstimate(value=total, low=total, high=total, n=len(config.numbers))
    record = Record(
        experiment="toy-sum", cell={"kind": "sum"}, protocol=config.model_dump(mode="json"), protocol_hash="0" * 64,
        systems={}, data={}, recipe="none", solver="none", grid=[], guidance_scale=None, reflection=None, nfe=None,
        seeds=[config.seed], n_asked=len(config.numbers), n_done=len(config.numbers),
        metrics={"toy_sum": RecordedMetric(estimate=estimate, direction="higher", kind="alone")},
        wall_time_s=0.0, device=device, versions={}, commit=None,
    )  # fmt: skip
    save_record(record, out)
    return [record]


EXPERIMENT = Experiment(name="toy-sum", title="A sum", config=ToyExperiment, run=add)
