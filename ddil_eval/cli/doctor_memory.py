"""What ``ddil doctor --method`` says: the memory of a distillation, component by component, and where it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.support.errors import WrongCommand
from ddil_eval.cli.distill import configuration

if TYPE_CHECKING:
    from ddil_core.distillation.config import MethodConfig
    from ddil_core.distillation.memory_plan import Plan
    from ddil_core.models.network_shapes import NetworkShape


def planned(
    reference: str,
    method: str,
    *,
    lora: bool = False,
    protocol: Path | None = None,
    settings: tuple[str, ...] = (),
    processes: int = 1,
    size: Mapping[str, int] | None = None,
) -> tuple[Plan, MethodConfig]:
    """Estimate the memory of distilling a model, by its configurations. Return the estimate and the configuration.

    Args:
        reference: The model.
        method: The name of the method.
        lora: Whether a LoRA is trained.
        protocol: The protocol; None for the method's shipped one.
        settings: Keys of the protocol and their values, as ``--set`` takes them.
        processes: The number of processes.
        size: ``height`` and ``width`` of the images in pixels, where they are asked for.

    Raises:
        WrongCommand: the method has no such protocol, a key does not fit, the batch cannot be divided, or ``ddil
            distill`` would refuse the model.
        DdilError: the configurations of the model are damaged, or ``ddil distill`` would refuse the model.
    """
    from ddil_core.distillation.checks import require_divided
    from ddil_core.distillation.memory_plan import plan_memory
    from ddil_core.support.protocol import validate

    path = protocol or _protocol(reference, method + "-lora" * lora)
    content, model = configuration(path, method, lora, settings)
    if "updates" in model.model_fields:
        content.setdefault("updates", 1)  # the paper does not print it, and memory does not depend on it
    config: Any = validate(model, content | dict(size or {}), str(path))
    require_divided(config, processes)
    shape, config = _teacher(reference, config)
    unguided = "guidance_range" not in model.model_fields and config.guidance_scale == 1
    return plan_memory(shape, config, 1 if unguided else 2, processes), config


def _teacher(reference: str, config: MethodConfig) -> tuple[NetworkShape, MethodConfig]:
    """Return what is known of a teacher's network, and the configuration with its guidance scale.

    A named system is known by its architecture, where its files are not here.
    """
    from ddil_core.distillation.distill import outline_teacher
    from ddil_core.models.network_shapes import known_shape, network_shape
    from ddil_core.models.references import resolve

    try:
        resolve(reference)
    except WrongCommand:
        if (known := known_shape(reference, **config.size)) is None:
            raise
        return known, config
    teacher = outline_teacher(reference, config)
    return network_shape(teacher), config.with_guidance(teacher.sampling.guidance_scale)


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
