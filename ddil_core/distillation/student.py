"""What a distillation ends with, written as a pipeline that diffusers loads without this project."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ddil_core.diffusion.parameterization import Prediction
from ddil_core.diffusion.schedule import LCM_STEPS
from ddil_core.models.model import Model
from ddil_core.models.sampling import SYSTEM_FILE, Bounds, Sampling
from ddil_core.support.files import replacing, write_text

LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' own name for it, which ``load_lora_weights(folder)`` looks for."""


@dataclass(frozen=True)
class Student:
    """The network, what it predicts and how it is sampled. With ``lora`` the network is the teacher's with adapters in it.

    ``points`` is the size of the grid from which diffusers' LCMScheduler takes its timesteps.
    """

    net: nn.Module
    prediction: Prediction
    sampling: Sampling
    lora: bool = False
    points: int = LCM_STEPS


def save_student(model: Model, student: Student, bounds: Bounds, folder: Path) -> None:
    """Write the student as a pipeline that diffusers loads without this project, under its final name only when whole.

    The file ``ddil.json`` beside it names the exact sampling, and the bounds at which x̂ can be reflected. A LoRA is written twice:
    merged into the pipeline, and alone, as the file that ``load_lora_weights`` takes on the teacher's own pipeline.
    """
    net: Any = merged(student.net) if student.lora else student.net
    pipeline = copy.copy(model.pipeline)
    pipeline.register_modules(**{model.layout.network: net, "scheduler": _scheduler(model, student)})
    if net.config.get("time_cond_proj_dim") and type(pipeline).__name__ == "StableDiffusionPipeline":
        pipeline = _told_its_guidance(pipeline)
    told = asdict(replace(student.sampling, bounds=bounds)) | {"prediction": student.prediction}
    told["grid"] = student.sampling.times(model.denoiser.schedule)
    with replacing(folder) as temporary:
        if student.lora:
            save_lora(type(model.pipeline), student.net, temporary)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        write_text(temporary / SYSTEM_FILE, json.dumps(told, indent=2) + "\n")


def _scheduler(model: Model, student: Student) -> Any:
    """diffusers' scheduler for it. Its DDIM spaces ``trailing`` (999, 749, 499, 249 at four steps, the nearest that diffusers has
    to the grid trained on); its LCM takes other timesteps than its own by ``timesteps=`` alone."""
    from diffusers import DDIMScheduler, LCMScheduler

    config = model.pipeline.scheduler.config
    # A student is neither trained nor sampled with clipping or thresholding, whatever its teacher's scheduler says.
    unclipped = {"clip_sample": False, "thresholding": False}
    shared = {"prediction_type": student.prediction, "set_alpha_to_one": True} | unclipped
    if student.sampling.solver == "lcm":
        scaling = model.denoiser.schedule.timestep_scaling
        own = {"original_inference_steps": student.points, "timestep_scaling": scaling, "steps_offset": 1}
        return LCMScheduler.from_config(config, **shared, **own)
    return DDIMScheduler.from_config(
        config,
        **shared,
        timestep_spacing="trailing",
        steps_offset=1,  # of no effect here; diffusers warns of any other value
    )


def _told_its_guidance(pipeline: Any) -> Any:
    """The same parts as the pipeline that embeds its guidance."""
    from diffusers import LatentConsistencyModelPipeline

    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return LatentConsistencyModelPipeline(**{name: getattr(pipeline, name) for name in names}, **absent)


def save_lora(pipeline_class: Any, net: Any, folder: Path) -> None:
    """The adapters alone, under the names that ``load_lora_weights`` knows."""
    from peft.utils import get_peft_model_state_dict

    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(net).items()}
    told = net.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=told, safe_serialization=True, weight_name=LORA_FILE
    )


def merged(net: nn.Module) -> nn.Module:
    """A copy of a network with its adapters merged into its weights."""
    whole: Any = copy.deepcopy(net)
    whole.fuse_lora()
    whole.unload_lora()
    return whole
