"""The table of distillers.

To add a method, write one file with a configuration, a stage class and a ``Method``. Here the method is a row of
``METHODS``. Another package names its row in an entry point of the group ``ddil.methods``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.distillation import consistency, conversion, cost, matching, progressive, trajectory
from ddil_core.distillation.config import MethodConfig, ProgressiveConfig
from ddil_core.distillation.consistency_config import ConsistencyConfig
from ddil_core.distillation.cost import Costs
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.run import Run
from ddil_core.distillation.shipped import announce, shipped_protocol
from ddil_core.distillation.student import Student
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown
from ddil_core.support.protocol import read_yaml, validate
from ddil_core.support.registry import Registry
from ddil_core.support.resources import find_protocol


@dataclass(frozen=True)
class Method:
    """A way to distil.

    Attributes:
        name: The value of ``--method``, and of ``method`` in a protocol.
        title: What tables call the method.
        source: The papers that the method comes from.
        config: The class of its configuration. The field ``method`` of the class must be ``name``.
        require: ``require(model, config)`` refuses a teacher that the method cannot distil.
        train: ``train(run)`` trains the student of a ``run.Run`` and returns it.
        costs: ``costs(config, model)`` counts the evaluations of the teachers (see ``cost``); None where nobody counts.
    """

    name: str
    title: str
    source: str
    config: type[MethodConfig]
    require: Callable[[Model, Any], None]
    train: Callable[[Run[Any]], Student]
    costs: Callable[[Any, Model], Costs] | None = None


METHODS = Registry(
    "method",
    "ddil.methods",
    Method,
    (
        Method(
            "pd",
            "Progressive Distillation (PD)",
            "Salimans & Ho, 2202.00512; DDIL, Algorithms 1 and 2",
            ProgressiveConfig,
            conversion.require_convertible,
            progressive.train_progressive,
            cost.progressive_costs,
        ),
        Method(
            "lcm",
            "Latent Consistency Model (LCM)",
            "Luo et al., 2310.04378; LCM-LoRA, 2311.05556",
            ConsistencyConfig,
            consistency.require_consistency,
            consistency.train_consistency,
            cost.consistency_costs,
        ),
        Method(
            "tcd",
            "Trajectory Consistency Distillation (TCD)",
            "Zheng et al., 2402.19159; CTM, 2310.02279",
            trajectory.TrajectoryConfig,
            trajectory.require_trajectory,
            trajectory.train_trajectory,
            cost.consistency_costs,
        ),
        Method(
            "dmd2",
            "Distribution Matching (DMD2)",
            "Yin et al., 2405.14867",
            MatchingConfig,
            matching.require_matching,
            matching.train_matching,
            cost.matching_costs,
        ),
    ),
)


def method_of(content: Mapping[str, Any], source: str) -> Method:
    """Return the method that a protocol names; a protocol without a name is one of PD.

    Args:
        content: The content of the protocol.
        source: What the message calls the protocol.

    Raises:
        WrongCommand: there is no such method.
    """
    name = content.get("method", "pd")
    if not isinstance(name, str) or name not in METHODS:
        raise WrongCommand(
            f"{source} has the method {shown(name)}, which is not known; it may be one of {', '.join(METHODS)}"
        )
    return METHODS[name]


def read_config(config: MethodConfig | Mapping[str, Any] | str | Path, teacher: str = "shapes") -> MethodConfig:
    """Return the configuration of a distillation.

    Args:
        config: The configuration itself, its content as a mapping, the path of a protocol, or the name of a method. A
            name stands for the method's shipped protocol for the teacher (``shipped.shipped_protocol``), which is said.
        teacher: The reference of the teacher.

    Raises:
        WrongCommand: there is no such method or protocol, or the content does not fit the method.
    """
    if isinstance(config, MethodConfig):
        return config
    shipped = None
    if isinstance(config, Mapping):
        content, source = dict(config), "the configuration"
    else:
        path: str | Path = config
        if isinstance(config, str) and config in METHODS:
            shipped = shipped_protocol(teacher, config)
            if shipped is None:
                raise WrongCommand(
                    f"the method {config!r} brings no protocol; give the path of a protocol or a configuration"
                )
            path = shipped.path
        content, source = read_yaml(find_protocol(Path(path))), str(path)
    complete = validate(method_of(content, source).config, content, source)
    if shipped is not None:
        announce(shipped, teacher)
    return complete
