"""The student as a workflow of ComfyUI, with its weights in the folders that ComfyUI reads.

ComfyUI samples in x = z/α with σ' = σ/α. Its node ``ManualSigmas`` takes the σ' of the student's grid, and its clock
finds their timesteps again. Its sampler ``euler`` takes DDIM's steps, and ``lcm`` those of consistency models. The
names of nodes and inputs, and what the nodes compute, were read in ComfyUI's sources (nodes.py, comfy_extras, samplers,
model_sampling.py). ``ManualSigmas`` is younger than the other nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddil_core.diffusion.parameterization import boundary_scalings
from ddil_core.diffusion.schedule import Schedule
from ddil_core.export import lora, single_file
from ddil_core.export.finished import FinishedRun
from ddil_core.export.options import Options
from ddil_core.export.stock import stock_call
from ddil_core.support.errors import WrongCommand
from ddil_core.support.files import write_text
from ddil_core.support.progress import warn

WORKFLOW = "workflow.json"
EXACT = 1e-5
"""The largest relative difference between ComfyUI's computation and that of ``ddil sample``."""

_SAMPLERS = {"ddim": "euler", "lcm": "lcm"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction"}
"""For each prediction, the choice ``sampling`` of the node ``ModelSamplingDiscrete``."""

_KNOWN = {
    ("StableDiffusionPipeline", 768): 0.18215,
    ("StableDiffusionPipeline", 1024): 0.18215,
    ("StableDiffusionXLPipeline", 2048): 0.13025,
}
"""The models that ComfyUI tells apart by the width of their U-Net's context, and their scale of latents."""


def require(run: FinishedRun, options: Options) -> None:
    """Refuse a student that ComfyUI's nodes would sample in another way than ``ddil sample``.

    Raises:
        WrongCommand: the solver, the guidance, the prediction, the noise schedule or the first timestep has no node
            that does the same, or the name of the base's checkpoint is missing for a LoRA, or given without one.
    """
    single_file.require(run, options)
    if run.lora is not None:
        lora.require(run, options)
    who = f"the student in {run.student}"
    if run.lora is not None and options.checkpoint is None:
        raise WrongCommand(
            f"{who} is a LoRA, and its workflow loads its base by the name that the file has in ComfyUI; "
            "give it, as in --checkpoint v1-5-pruned-emaonly.safetensors"
        )
    if run.lora is None and options.checkpoint is not None:
        raise WrongCommand(
            f"{who} brings its whole checkpoint, and --checkpoint names the base of a LoRA; leave it out"
        )
    if run.prediction not in _PREDICTIONS:
        raise WrongCommand(f"{who} predicts {run.prediction}, which no node of ComfyUI says; export it --to diffusers")
    if run.sampling.guidance_scale != 1:
        raise WrongCommand(
            f"{who} is sampled with guidance {run.sampling.guidance_scale:g}, and workflows are written for students "
            "without guidance alone; export it --to diffusers"
        )
    _require_same_levels(run)


def _require_same_levels(run: FinishedRun) -> None:
    """Refuse a grid that ComfyUI does not compute alike.

    Raises:
        WrongCommand: the noise schedule is not Stable Diffusion's, the grid does not start at its last timestep, where
            ComfyUI starts from pure noise, or LCM's boundary conditions matter on the grid.
    """
    schedule, times, who = run.schedule, run.times, f"the student in {run.student}"
    same = len(schedule) == len(comfyui_sigmas())
    if not same or not np.allclose(_sigmas(schedule), comfyui_sigmas(), rtol=EXACT, atol=0):
        raise WrongCommand(
            f"{who} has another noise schedule than Stable Diffusion's, which ComfyUI computes with; export it "
            "--to diffusers"
        )
    if times[0] != len(schedule) - 1:
        raise WrongCommand(
            f"{who} starts from pure noise at t = {times[0]:g}, and ComfyUI does so at t = {len(schedule) - 1} alone; "
            "export it --to diffusers"
        )
    if run.sampling.solver == "lcm":
        c_skip, c_out = boundary_deviation(run)
        if max(c_skip, c_out) > EXACT:
            raise WrongCommand(
                f"{who} takes a step at t = {times[-1]:g}, where LCM's boundary conditions count and ComfyUI's are "
                "others; export it --to diffusers"
            )


def boundary_deviation(run: FinishedRun) -> tuple[float, float]:
    """Return the largest c_skip and 1 − c_out on the student's grid. ComfyUI's lcm on ε or v has 0 for both."""
    t = torch.tensor(run.times)
    c_skip, c_out = boundary_scalings(t, torch.zeros(len(t), dtype=torch.float64), run.schedule.timestep_scaling)
    return float(c_skip.max()), float((1 - c_out).max())


def comfyui_sigmas() -> np.ndarray:
    """Return σ' = σ/α of ComfyUI's 1,000 timesteps, float64: β from 0.00085 to 0.012, evenly spaced in √β."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return np.sqrt((1 - kept) / kept)


def _sigmas(schedule: Schedule) -> np.ndarray:
    return (schedule.sigmas[:-1] / schedule.alphas[:-1]).numpy()


def write(run: FinishedRun, folder: Path, options: Options) -> str:
    """Write the workflow, and the weights below ``models``. Warn of a model that ComfyUI does not know."""
    file, kind = f"{options.name}.safetensors", "checkpoints" if run.lora is None else "loras"
    target = folder / "models" / kind / file
    if run.lora is None:
        single_file.write_checkpoint(run, target, options.name)
    else:
        lora.write_kohya(run, target, options.name)
    write_text(folder / WORKFLOW, json.dumps(workflow(run, options), indent=2) + "\n")
    call, unknown = stock_call(run), _unknown(run)
    if unknown:
        warn(f"ComfyUI will not load this student: {unknown}")
    noise = (
        "From the same noise it draws the same latents as `ddil sample`."
        if run.sampling.solver == "ddim"
        else "It takes the same steps as `ddil sample`; the noise that it adds after each step is its own."
    )
    needs = f" ComfyUI needs the base as `models/checkpoints/{options.checkpoint}`." if run.lora is not None else ""
    return f"""\
Copy the folder `models` into ComfyUI's own folder, and open `{WORKFLOW}` in ComfyUI (drag it into the window).{needs}

The workflow is in ComfyUI's API format. An old ComfyUI has no node `ManualSigmas`: update it. {noise} Do not
replace `ManualSigmas` by a scheduler of ComfyUI's list: none has this grid. In diffusers' words it is {call.text()}.
{f"{chr(10)}**ComfyUI will not load these weights**: {unknown}.{chr(10)}" if unknown else ""}"""


def _unknown(run: FinishedRun) -> str | None:
    """Return why ComfyUI, which knows models by the sizes of their networks, does not know this one. None: it does."""
    config, vae = run.network_config, run.model.pipeline.vae.config
    width, channels = config.get("cross_attention_dim"), config.get("block_out_channels") or [0]
    scale = _KNOWN.get((run.layout.pipeline, width if isinstance(width, int) else 0))
    if channels[0] != 320 or config.get("in_channels") != 4 or scale is None:
        return (
            "its U-Net has not the sizes of Stable Diffusion 1, 2 or XL, by which ComfyUI recognises models "
            f"(first block {channels[0]}, context {width}, latents {config.get('in_channels')})"
        )
    if vae.scaling_factor != scale:
        return f"its latents are scaled by {vae.scaling_factor:g}, and by {scale:g} in ComfyUI"
    return None


def workflow(run: FinishedRun, options: Options) -> dict[str, Any]:
    """Return the workflow in ComfyUI's API format: each node's class and inputs by its number.

    An input from another node is [number of the node, number of its output].
    """
    file, is_lora = f"{options.name}.safetensors", run.lora is not None
    height, width = (side * run.model.pipeline.vae_scale_factor for side in run.model.latent_shape[1:])
    table = comfyui_sigmas()
    sigmas = [f"{table[int(t)]:.9f}" for t in run.times] + ["0.0"]
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": options.checkpoint if is_lora else file}),
        "2": ("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": file, "strength_model": 1.0}),
        "3": (
            "ModelSamplingDiscrete",
            {"model": ["2" if is_lora else "1", 0], "sampling": _PREDICTIONS[run.prediction], "zsnr": False},
        ),
        "4": ("CLIPTextEncode", {"clip": ["1", 1], "text": "a prompt"}),
        "5": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "6": ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        "7": ("KSamplerSelect", {"sampler_name": _SAMPLERS[run.sampling.solver]}),
        "8": ("ManualSigmas", {"sigmas": ", ".join(sigmas)}),
        "9": (
            "SamplerCustom",
            {
                "model": ["3", 0],
                "add_noise": True,
                "noise_seed": 0,
                "cfg": 1.0,
                "positive": ["4", 0],
                "negative": ["5", 0],
                "sampler": ["7", 0],
                "sigmas": ["8", 0],
                "latent_image": ["6", 0],
            },
        ),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["1", 2]}),
        "11": ("SaveImage", {"images": ["10", 0], "filename_prefix": options.name}),
    }
    if not is_lora:
        del nodes["2"]
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}
