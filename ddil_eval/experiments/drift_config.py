"""The drift experiment as data: the models, the prompts, and groups of students from several training seeds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ddil_core.support.compute import ComputeKeys
from ddil_core.support.protocol import GuidanceScale
from ddil_core.support.size import SizeKeys
from ddil_eval.statistics.two_sample import FOLDS

EXPERIMENT = "drift"
NOT_HASHED = frozenset({"teacher", "students", "groups", "differences", "batch_size", "sampling"})
"""Keys that the protocol's hash leaves out: records name the models with the hashes of their weights."""
ALL = "all"
"""The cell that takes all transitions together, as training does."""


class DriftConfig(ComputeKeys, SizeKeys):
    """The drift experiment as data.

    Attributes:
        experiment: The name of the experiment.
        teacher: The teacher's reference.
        students: The students' references; students on the same grid are compared with each other.
        groups: Names of groups of students, each with references. The students of a group differ in the seed of their
            training. The same place in two groups is the same seed.
        differences: Pairs of names of groups; the second is subtracted from the first. Defaults to each later group
            less the first.
        data: The reference of the data set.
        teacher_steps: The number of the teacher's steps on its own grid.
        guidance_scale: The teacher's guidance scale. Defaults to the model's own.
        consistency_step: The length of the teacher's step in the consistency target of LCM's kind of students.
        num_prompts: The number of prompts, each with its image.
        batch_size: The number of prompts in a batch of the device, and between two points from which a stopped run
            goes on.
        seed: The seed of the noise.
    """

    experiment: Literal["drift"] = "drift"
    teacher: str = "shapes"
    students: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = Field(default={})
    differences: tuple[tuple[str, str], ...] | None = None
    data: str = "shapes"
    teacher_steps: int = Field(default=32, ge=1)
    guidance_scale: GuidanceScale | None = None
    consistency_step: int = Field(default=20, ge=1)
    num_prompts: int = Field(default=192, ge=FOLDS)
    batch_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _groups_fit(self) -> DriftConfig:
        for name, students in self.groups.items():
            if len(students) < 2:
                raise ValueError(f"the group {name!r} needs at least 2 students, each from another seed of training")
        for pair in self.compared_groups:
            unknown = [name for name in pair if name not in self.groups]
            if unknown:
                named = ", ".join(self.groups) or "there are none"
                raise ValueError(f"the differences name {unknown[0]!r}, which is no group ({named})")
            first, second = (len(self.groups[name]) for name in pair)
            if first != second:
                raise ValueError(
                    f"the group {pair[0]!r} has {first} students and {pair[1]!r} has {second}; groups are compared "
                    "seed by seed, so that they need equally many"
                )
        return self

    @property
    def all_students(self) -> tuple[str, ...]:
        """The references of all students, those of the groups last."""
        return tuple(dict.fromkeys([*self.students, *(one for group in self.groups.values() for one in group)]))

    @property
    def compared_groups(self) -> tuple[tuple[str, str], ...]:
        """The pairs of groups that are compared."""
        if self.differences is not None:
            return self.differences
        first, *later = list(self.groups) or [""]
        return tuple((name, first) for name in later)
