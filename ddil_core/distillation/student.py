"""The result of a distillation, and how it is saved as a pipeline that diffusers loads without this project."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ddil_core.diffusion.few_step import scheduler_shift
from ddil_core.diffusion.parameterization import Prediction
from ddil_core.diffusion.schedule import LCM_STEPS, FlowSchedule
from ddil_core.models.layouts import Layout
from ddil_core.models.lora import BASE_SHA256
from ddil_core.models.model import Model
from ddil_core.models.sampling import SYSTEM_FILE, Bounds, Sampling
from ddil_core.models.weights import read_metadata
from ddil_core.support.checksums import with_checksum
from ddil_core.support.errors import DdilError
from ddil_core.support.files import sort_metadata, write_tensors, write_text
from ddil_core.support.finite import broken_weight

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers' ``load_lora_weights(folder)`` looks for."""


@dataclass(frozen=True)
class Student:
    """A trained student.

    Attributes:
        net: The network.
        prediction: What the network predicts.
        sampling: How the student is meant to be sampled.
        lora: Whether the network is the teacher's with adapters in it.
        points: The size of the grid from which diffusers' LCMScheduler and TCDScheduler take their timesteps.
    """

    net: nn.Module
    prediction: Prediction
    sampling: Sampling
    lora: bool = False
    points: int = LCM_STEPS


def save_student(
    model: Model, student: Student, bounds: Bounds, folder: Path, teacher: Mapping[str, Any] | None = None
) -> None:
    """Write the student as a diffusers pipeline to ``folder``, whole or not at all, with checksums.

    The file ``ddil.json`` in the folder holds the exact sampling, the ``bounds`` at which x̂ can be reflected, and how
    the ``teacher`` was used (``MethodConfig.teacher_use``). A LoRA is written twice: merged into the pipeline, and
    alone, as a file that ``load_lora_weights`` takes on the teacher's pipeline.

    Raises:
        DdilError: a weight of the student is NaN or infinite: the last update is followed by no loss that shows it.
    """
    net: Any = merged(student.net) if student.lora else student.net
    if (weight := broken_weight(net)) is not None:
        raise DdilError(
            f"the student's weights are not finite after training, first in {weight}; train again with a lower "
            "learning rate"
        )
    pipeline = copy.copy(model.pipeline)
    pipeline.register_modules(**{model.layout.network: net, "scheduler": _scheduler(model, student)})
    embedded = net.config.get("time_cond_proj_dim") and type(pipeline).__name__ == "StableDiffusionPipeline"
    if embedded and student.sampling.solver == "lcm":  # this pipeline gives no other scheduler its γ
        pipeline = _with_guidance_embedding(pipeline)
    content = asdict(replace(student.sampling, bounds=bounds)) | {"prediction": student.prediction}
    if model.asked_size:
        content["height"], content["width"] = model.image_size
    if student.sampling.gamma is None:
        del content["gamma"]
    content["grid"] = student.sampling.times(model.denoiser.schedule)
    if isinstance(model.denoiser.schedule, FlowSchedule):
        content["shift"] = model.denoiser.schedule.shift
    if teacher is not None:
        content["teacher"] = dict(teacher)
    with with_checksum(folder) as temporary:
        if student.lora:
            save_lora(model, student.net, temporary)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        write_text(temporary / SYSTEM_FILE, json.dumps(content, indent=2) + "\n")


def _scheduler(model: Model, student: Student) -> Any:
    """Return diffusers' scheduler for the student.

    DDIM has the spacing ``trailing`` (999, 749, 499, 249 at four steps), diffusers' nearest to the grid of the
    training. LCM takes timesteps of another grid only through the pipeline's argument ``timesteps``. TCD takes γ only
    through the pipeline's argument ``eta``.
    """
    from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

    schedule, config = model.denoiser.schedule, model.pipeline.scheduler.config
    if isinstance(schedule, FlowSchedule):
        return _flow_scheduler(schedule, student.sampling, model.layout)
    # A student is neither trained nor sampled with clipping or thresholding, whatever its teacher's scheduler says.
    unclipped = {"clip_sample": False, "thresholding": False}
    shared = {"prediction_type": student.prediction, "set_alpha_to_one": True} | unclipped
    if student.sampling.solver in ("lcm", "tcd"):
        scaling = schedule.timestep_scaling
        grid = {"original_inference_steps": student.points, "timestep_scaling": scaling, "steps_offset": 1}
        kind: Any = LCMScheduler if student.sampling.solver == "lcm" else TCDScheduler
        return kind.from_config(config, **shared, **grid)
    return DDIMScheduler.from_config(
        config,
        **shared,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect; diffusers warns of any other value
    )


def _flow_scheduler(schedule: FlowSchedule, sampling: Sampling, layout: Layout) -> Any:
    """Return diffusers' scheduler for a student on a flow.

    Its own times are the even grid of the student's steps, unless the pipeline gives it even times before the shift, as
    FLUX's does. It takes another grid only through the pipeline's argument ``sigmas``, which are times before the
    shift.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    kind = FlowMatchLCMScheduler if sampling.solver == "lcm" else FlowMatchEulerDiscreteScheduler
    times = sampling.times(schedule)
    own = layout.spacing is None and times == schedule.grid(len(times))
    shift = scheduler_shift(schedule, len(times)) if own else {"shift": schedule.shift}
    return kind(num_train_timesteps=len(schedule), **shift)


def _with_guidance_embedding(pipeline: Any) -> Any:
    """Return the parts of a pipeline as diffusers' pipeline for networks with a guidance embedding."""
    from diffusers import LatentConsistencyModelPipeline

    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return LatentConsistencyModelPipeline(**{name: getattr(pipeline, name) for name in names}, **absent)


def save_lora(model: Model, net: Any, folder: Path) -> None:
    """Write the adapters alone, under the names that ``load_lora_weights`` knows, with their base in the metadata.

    The base is named as PEFT names it, by the reference that the user gave. A path says little on another machine, so
    that the metadata also hold the hash of the base's weights. Equal adapters give equal bytes: sets and the metadata,
    whose order is random, are sorted.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(net).items()}
    metadata = net.peft_config["default"].to_dict()
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
    metadata["base_model_name_or_path"] = model.reference
    network = model.layout.network
    content = {f"{network}_lora_layers": layers, f"{network}_lora_adapter_metadata": metadata}
    type(model.pipeline).save_lora_weights(folder, **content, safe_serialization=True, weight_name=LORA_FILE)
    path = folder / LORA_FILE
    write_tensors(path, load_file(path), read_metadata(path) | {BASE_SHA256: model.weights_sha256()})
    sort_metadata(path)


def merged(net: nn.Module) -> nn.Module:
    """Return a copy of a network with its adapters merged into its weights."""
    whole: Any = copy.deepcopy(net)
    whole.fuse_lora()
    whole.unload_lora()
    return whole
