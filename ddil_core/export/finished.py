"""A finished run: its ``run.yaml``, its student's own files, and the student as a model where its weights are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddil_core.diffusion.schedule import FlowSchedule, Schedule, Time
from ddil_core.diffusion.scheduler_config import is_flow
from ddil_core.distillation.methods import Method, method_of
from ddil_core.distillation.run_folder import RUN, read_run
from ddil_core.distillation.student import LORA_FILE
from ddil_core.models.layouts import LAYOUTS, Layout
from ddil_core.models.model import Model, load_model
from ddil_core.models.references import resolve
from ddil_core.models.sampling import SYSTEM_FILE, Sampling
from ddil_core.models.weights import read_index, read_json
from ddil_core.support.errors import DdilError, WrongCommand


@dataclass(eq=False)
class FinishedRun:
    """A finished run. Only ``model`` reads weights.

    Attributes:
        folder: The run folder.
        content: The content of ``run.yaml``.
        layout: The layout of the student's pipeline.
        settings: The content of the student's ``ddil.json``.
        sampling: How the student is sampled.
    """

    folder: Path
    content: dict[str, Any]
    layout: Layout
    settings: dict[str, Any]
    sampling: Sampling

    @property
    def student(self) -> Path:
        """The folder of the student's pipeline. A LoRA is merged into it."""
        return self.folder / "student"

    @property
    def lora(self) -> Path | None:
        """The file of the student's adapters; None for a whole student."""
        path = self.student / LORA_FILE
        return path if path.is_file() else None

    @property
    def method(self) -> Method:
        return method_of(self.content["config"], f"the file {self.folder / RUN}")

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return str(self.settings.get("prediction"))

    @property
    def network_config(self) -> dict[str, Any]:
        """The configuration of the denoising network."""
        return read_json(self.student / self.layout.network / "config.json")

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of the scheduler that the run saved with the student."""
        return read_json(self.student / "scheduler" / "scheduler_config.json")

    @property
    def schedule(self) -> Schedule:
        config = self.scheduler_config
        return FlowSchedule.from_config(config) if is_flow(config) else Schedule.from_config(config)

    @property
    def times(self) -> list[Time]:
        """The falling grid on which the student is sampled."""
        return self.sampling.times(self.schedule)

    @cached_property
    def model(self) -> Model:
        """The student with its weights, on the CPU in float32. Damage is found here."""
        return load_model(str(self.folder.absolute()), "cpu")


def open_finished(folder: Path) -> FinishedRun:
    """Return the finished run in a folder.

    Raises:
        WrongCommand: the folder holds no run, or the run has no student yet.
        DdilError: a file of the run is damaged, or nothing says how the student is sampled.
    """
    if not (folder / RUN).is_file():
        raise WrongCommand(f"{folder} is no run of 'ddil distill', as it has no {RUN}; name the --out of one")
    content = read_run(folder / RUN)
    student = resolve(str(folder.absolute())).folder
    if not (student / SYSTEM_FILE).is_file():
        raise DdilError(
            f"the student in {student} has no {SYSTEM_FILE}, which says how it is sampled; an earlier version made it: "
            "distil it again"
        )
    settings, name = read_json(student / SYSTEM_FILE), str(read_index(student).get("_class_name"))
    sampling = Sampling.from_file(settings, f"the file {student / SYSTEM_FILE}")
    return FinishedRun(folder, content, LAYOUTS.find(name), settings, sampling)
