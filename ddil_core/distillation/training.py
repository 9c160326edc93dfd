"""Training of one stage of a run, or reading of its weights where the stage is finished."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ddil_core.distillation.adapters import has_lora, take_base
from ddil_core.distillation.checkpoints import Checkpoints
from ddil_core.distillation.loop import fit
from ddil_core.distillation.out_of_memory import memory_named
from ddil_core.distillation.run import Run
from ddil_core.distillation.stage import Stage
from ddil_core.distillation.watch import watchers
from ddil_core.support.checksums import require_checksum, with_checksum
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_tensors
from ddil_core.support.finite import broken_weight


def train_stage(run: Run[Any], make: Callable[[], Stage], net: nn.Module, name: str, title: str) -> nn.Module:
    """Train a stage and return its final network, frozen. A finished stage is read back.

    Args:
        run: The run that the stage belongs to.
        make: Makes the stage. It is not called where the stage is finished.
        net: A network of the same shape as the stage's student.
        name: The name of the stage's files in ``checkpoints``.
        title: What the log and messages call the stage.

    Raises:
        DdilError: the stage's weights are not finite, its files are damaged, or the memory is too small.
        Interrupted: a signal came, and the checkpoint is saved.
    """
    finished, checkpoint = (run.out / "checkpoints" / f"{name}.{kind}" for kind in ("safetensors", "pt"))
    config = run.config
    if finished.is_file():
        start, net = net, _load_weights(copy.deepcopy(net), finished)
        if has_lora(net):
            take_base(net, start)
    else:
        with memory_named(run, title):
            stage = make()
            fit(
                stage.update,
                stage.stateful(),
                steps=stage.updates,
                checkpoint=checkpoint,
                log=run.out / "log.jsonl",
                title=title,
                save_every=config.save_every,
                keep=config.keep_checkpoints,
                skip_limit=config.skip_limit,
                callbacks=watchers(run, stage, name, title),
                accelerator=run.accelerator,
                divided=stage.sharded,
                check=partial(
                    stage.require_sound, f"the teacher of the stage {title!r}, from {run.model.reference!r}", title
                ),
            )
        for tracker in run.accelerator.trackers if config.trackers else ():
            tracker.finish()
        net = stage.finish()
        del stage
        run.accelerator.free_memory()  # the accelerator keeps every network and optimiser that it prepared
        if (broken := broken_weight(net)) is not None:
            raise DdilError(
                f"the stage {title!r} ends with weights that are not finite, first in {broken}; its last checkpoint "
                "is kept: begin another run (another --out) with a lower learning_rate or gradient_clip"
            )
        if run.accelerator.is_main_process:
            _save_weights(net, finished)
    if run.accelerator.is_main_process:
        Checkpoints(checkpoint).delete()
    run.accelerator.wait_for_everyone()
    return net.eval().requires_grad_(False)


def _save_weights(module: nn.Module, path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    write_tensors(path, tensors, writing=with_checksum)


def _load_weights(module: nn.Module, path: Path) -> nn.Module:
    require_checksum(path, "the file of the stage's weights", "delete it to train the stage again")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch have error classes of their own
        raise DdilError(f"the stage's weights {path} are damaged; delete the file to train the stage again") from error
    return module
