"""Distillers: a table of methods. An addition is one file with a stage class, its configuration, and one row of ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddil_core.distillation import consistency, conversion, matching, progressive
from ddil_core.distillation.config import ConsistencyConfig, MatchingConfig, MethodConfig, ProgressiveConfig
from ddil_core.distillation.student import Student


@dataclass(frozen=True)
class Method:
    """A row of the table: the paper that a method comes from, what the rows of tables call it, what it is told, and what it does.

    ``require(model, config)`` refuses a teacher that it cannot distil; ``train(run)`` gives the student.
    """

    name: str
    title: str
    source: str
    config: type[MethodConfig]
    require: Callable[[Any, Any], None]
    train: Callable[[Any], Student]


METHODS = {
    method.name: method
    for method in (
        Method(
            "pd",
            "Progressive Distillation (PD)",
            "Salimans & Ho, 2202.00512; DDIL, Algorithms 1 and 2",
            ProgressiveConfig,
            conversion.require_convertible,
            progressive.train_progressive,
        ),
        Method(
            "lcm",
            "Latent Consistency Model (LCM)",
            "Luo et al., 2310.04378; LCM-LoRA, 2311.05556",
            ConsistencyConfig,
            consistency.require_consistency,
            consistency.train_consistency,
        ),
        Method(
            "dmd2",
            "Distribution Matching (DMD2)",
            "Yin et al., 2405.14867",
            MatchingConfig,
            matching.require_matching,
            matching.train_matching,
        ),
    )
}
