"""What ``ddil doctor --method`` says: the memory of a distillation, component by component, and where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.support.errors import WrongCommand
from ddil_eval.cli.distill import configuration

if TYPE_CHECKING:
    from ddil_core.distillation.config import MethodConfig
    from ddil_core.distillation.memory_plan import Plan


def planned(
    reference: str,
    method: str,
    *,
    lora: bool = False,
    protocol: Path | None = None,
    settings: tuple[str, ...] = (),
    variant: str | None = None,
    processes: int = 1,
) -> tuple[Plan, MethodConfig]:
    """Estimate the memory of distilling a model. Return the estimate and the configuration.

    Args:
        reference: The model.
        method: The name of the method.
        lora: Whether a LoRA is trained.
        protocol: The protocol; None for the method's shipped one.
        settings: Keys of the protocol and their values, as ``--set`` takes them.
        variant: The variant of the model's files.
        processes: The number of processes.

    Raises:
        WrongCommand: the method has no such protocol, a key does not fit, or the batch cannot be divided.
        DdilError: the files of the model are damaged.
    """
    from ddil_core.distillation.checks import require_divided
    from ddil_core.distillation.memory_plan import plan_memory
    from ddil_core.models.network_shapes import network_shape
    from ddil_core.support.protocol import validate

    path = protocol or _protocol(reference, method + "-lora" * lora)
    content, model = configuration(path, method, lora, settings)
    if "updates" in model.model_fields:
        content.setdefault("updates", 1)  # the paper does not print it, and memory does not depend on it
    config: Any = validate(model, content, str(path))
    require_divided(config, processes)
    unguided = "guidance_range" not in model.model_fields and config.guidance_scale == 1
    return plan_memory(network_shape(reference, variant), config, 1 if unguided else 2, processes), config


def _protocol(reference: str, name: str) -> Path:
    """Return the shipped protocol of a name such as "lcm-lora" for a model, whose files may not be here.

    Raises:
        WrongCommand: there is none.
    """
    from ddil_core.distillation.shipped import shipped_protocol
    from ddil_core.models.known_sizes import architecture_of
    from ddil_core.support.resources import protocols

    method, _, variant = name.partition("-")
    try:
        found = shipped_protocol(reference, method, variant and f"-{variant}")
        path = None if found is None else found.path
    except WrongCommand:
        if architecture_of(reference) is None:
            raise
        path = protocols() / "paper" / f"{name}.yaml"
    if path is None or not path.is_file():
        raise WrongCommand(f"no shipped protocol is for {name!r} of {reference!r}; name one with --protocol")
    return path


def components(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield each component with its bytes, and the sum on each GPU. What waits on the host is named so."""
    yield from plan.device.items()
    yield "in all, on each GPU", plan.total
    for name, nbytes in plan.host.items():
        yield f"{name}, on the host", nbytes


def cure(plan: Plan, config: MethodConfig, processes: int) -> str:
    """Say which settings take less memory."""
    from ddil_core.distillation.out_of_memory import savings

    go_on, anew = savings(config, plan.parameters, processes)
    return f"say --set {', '.join([*go_on, *anew])}"
