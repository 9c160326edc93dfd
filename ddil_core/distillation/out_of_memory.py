"""What to do where the memory is too small for training: the settings that help, with an estimate for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddil_core.distillation.config import MethodConfig
from ddil_core.distillation.matching_config import MatchingConfig
from ddil_core.distillation.run import Run
from ddil_core.models.hub import size_text
from ddil_core.models.memory import need_memory
from ddil_core.support.errors import DdilError, lacks_memory


@contextmanager
def memory_named(run: Run[Any], title: str) -> Iterator[None]:
    """Turn an error for too little memory into one that names the settings that help.

    Raises:
        DdilError: the memory is too small for the stage ``title``.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        parameters = sum(parameter.numel() for parameter in run.model.denoiser.net.parameters())
        go_on, anew = savings(run.config, parameters, run.accelerator.num_processes)
        sentences = [
            f"the memory of {run.accelerator.device} is too small for the stage {title!r}",
            f"go on with --set {', '.join(go_on)}" if go_on else "",
            f"or begin another run with --set {', '.join(anew)}" if anew else "",
            f"'ddil doctor --model {run.model.reference}' estimates the rest",
        ]
        raise DdilError("; ".join(filter(None, sentences))) from error


def savings(config: MethodConfig, parameters: int, processes: int = 1) -> tuple[list[str], list[str]]:
    """Return the settings that save memory: those with which a run goes on, and those that begin another run.

    Args:
        config: The configuration of the run.
        parameters: The number of parameters of the network.
        processes: The number of processes.
    """
    rows, parts = config.batch_size // processes, config.gradient_accumulation
    go_on, anew = [], []
    if parts < rows:
        more = next(number for number in range(parts + 1, rows + 1) if rows % number == 0)
        go_on.append(f"gradient_accumulation={more} (the activations shrink to {parts / more:.0%})")
    if not config.gradient_checkpointing:
        go_on.append("gradient_checkpointing=true (most activations are computed twice, and not kept)")
    if config.teacher_batch_size > 1:
        half = config.teacher_batch_size // 2
        go_on.append(f"teacher_batch_size={half} (evaluations without gradients take half)")
    if not config.offload and config.optimizer != "8bit":
        go_on.append("offload=true (float32 weights, moments and average wait on the host, which takes longer)")
    if processes > 1 and not (config.shard or config.compile or config.optimizer == "8bit"):
        go_on.append(f"shard=true (the {processes} processes divide the networks)")
    need = need_memory({"unet": parameters}, 4, 0)
    networks = 2 if isinstance(config, MatchingConfig) else 1
    adapters = getattr(config, "lora", None) is not None  # which have few moments
    if not (config.optimizer == "8bit" or adapters or config.offload or config.shard):
        saved = (need.matching - need.matching_8bit) * networks // 2
        anew.append(f"optimizer=8bit (about {size_text(saved)} less)")
    if config.teacher_dtype == "float32" and config.mixed_precision == "no":  # else it is rounded already
        saved = need.training - need_memory({"unet": parameters}, 2, 0).training
        anew.append(f"teacher_dtype=bfloat16 (about {size_text(saved)} less)")
    if config.mixed_precision == "no" and config.student_dtype == "float32":
        anew.append("mixed_precision=bf16 (most activations take half)")
    if config.batch_size > processes:
        anew.append(f"batch_size={config.batch_size // 2} (half of the activations)")
    return go_on, anew
