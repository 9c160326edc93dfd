"""Every system on random weights, and how diffusers samples it from the same noise: as its authors' own pages call it.

Nothing of this project's sampling is used for the second, so that a wrong row of ``systems.yaml`` is seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_core.models.system_specs import Files, SystemSpec, load_systems
from tests.pipelines import build, save_lora

Image = Any
PROMPTS = ["a small red circle left of a large blue star on a grey background", "a green square"]


def random_files(system: SystemSpec, folder: Path, seed: int = 1) -> Files:
    """A system's files with random weights: a pipeline in its layout, and the U-Net or LoRA that go into it."""
    from safetensors.torch import save_file

    prediction = system.prediction if system.prediction in ("epsilon", "v_prediction") else "epsilon"
    pipeline = build(system.layout, folder / "words", prediction=prediction, seed=seed, distilled=system.distilled)
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    unet = lora = None
    if system.unet is not None:
        other = build(system.layout, folder / "words", prediction=prediction, seed=seed + 10)
        unet = folder / "unet.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in other.unet.state_dict().items()}, unet)
    if system.lora is not None:
        lora = save_lora(folder, pipeline)
    return Files(folder / "pipeline", unet, lora, system)


def scheduler_for(name: str, config: Any) -> Any:
    """diffusers' scheduler for a system, as its authors' page or the paper makes it."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

    if name in ("sd15", "sd21"):
        return DPMSolverMultistepScheduler.from_config(config, timestep_spacing="linspace")
    if name in ("lcm", "lcm-lora", "lcm-lora-ssd1b", "dmd2", "dmd2-1step"):
        return LCMScheduler.from_config(config)
    if name == "add":
        return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    if name == "dmd":  # one step from 999 to x̂
        return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    return EulerDiscreteScheduler.from_config(config)  # sdxl, ssd1b: as published, leading


OWN_SCHEDULERS = ("instaflow", "sd3", "sd35", "flux-dev", "flux-schnell", "sana", "pixart-sigma")
"""The systems that are sampled with the scheduler of their repository, as it is."""
CALLS: dict[str, dict[str, Any]] = {
    "sd15": {"num_inference_steps": 50},
    "sd21": {"num_inference_steps": 50},
    "add": {"num_inference_steps": 1, "guidance_scale": 0.0},
    "lcm": {"num_inference_steps": 4, "guidance_scale": 8.0},
    "lcm-lora": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "lcm-lora-ssd1b": {"num_inference_steps": 4, "guidance_scale": 1.0},
    "dmd": {"num_inference_steps": 1, "guidance_scale": 1.0},
    "dmd2": {"timesteps": [999, 749, 499, 249], "guidance_scale": 0.0},
    "dmd2-1step": {"timesteps": [399], "guidance_scale": 0.0},
    "sd3": {"num_inference_steps": 28, "guidance_scale": 7.0},
    "sd35": {"num_inference_steps": 28, "guidance_scale": 7.0},
    "flux-dev": {"num_inference_steps": 50, "guidance_scale": 3.5},
    "flux-schnell": {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256},
    "sana": {"num_inference_steps": 20, "guidance_scale": 4.5},
    "pixart-sigma": {"num_inference_steps": 20, "guidance_scale": 4.5},
    "ssd1b": {"num_inference_steps": 50},
    "sdxl": {"num_inference_steps": 50},
}


def diffusers_pipeline(name: str, files: Files) -> Any:
    """A system's stock pipeline, with its U-Net or LoRA."""
    import diffusers
    from safetensors.torch import load_file

    system = load_systems()[name]
    absent = {"text_encoder_3": None, "tokenizer_3": None} if system.layout == "StableDiffusion3Pipeline" else {}
    pipeline = getattr(diffusers, system.layout).from_pretrained(files.folder, **absent)
    if files.unet is not None:
        pipeline.unet.load_state_dict(load_file(files.unet))
    if files.lora is not None:
        pipeline.load_lora_weights(files.lora.parent, weight_name=files.lora.name)
    pipeline.set_progress_bar_config(disable=True)
    if name not in OWN_SCHEDULERS:
        pipeline.scheduler = scheduler_for(name, pipeline.scheduler.config)
    return pipeline


def run_diffusers(
    pipeline: Any, z: Tensor, generators: Sequence[torch.Generator], call: dict[str, Any]
) -> tuple[Tensor, Image]:
    """The last latents and the pictures float32 [B, H, W, 3] in [0, 1] of a stock pipeline on ``PROMPTS``."""
    seen: list[Tensor] = []

    def keep(_: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(kept["latents"])
        return kept

    kind, (height, width) = type(pipeline).__name__, z.shape[-2:]
    told: dict[str, Any] = {"callback_on_step_end": keep}
    latents = z.clone()
    if kind == "PixArtSigmaPipeline":  # an older kind of callback
        told = {"callback": lambda step, t, latents: seen.append(latents), "clean_caption": False}
    if kind in ("PixArtSigmaPipeline", "SanaPipeline"):
        told |= {"use_resolution_binning": False}
        told |= {"height": height * pipeline.vae_scale_factor, "width": width * pipeline.vae_scale_factor}
    if kind == "FluxPipeline":  # its network names no size
        told |= {"height": height * pipeline.vae_scale_factor, "width": width * pipeline.vae_scale_factor}
        latents = pipeline._pack_latents(latents, *z.shape)
    done = pipeline(PROMPTS, latents=latents, generator=list(generators), output_type="np", **told, **call)
    last = seen[-1]
    if kind == "FluxPipeline":
        scale = pipeline.vae_scale_factor
        last = pipeline._unpack_latents(last, height * scale, width * scale, scale)
    return last, done.images


@torch.no_grad()
def run_instaflow(pipeline: Any, z: Tensor, steps: int = 1) -> tuple[Tensor, Image]:
    """Rectified flow in a few lines: z moves along the network's own velocity, whose clock runs from 1000 down."""
    text, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    for i in range(steps):
        t = torch.full((len(z),), 1000.0 * (1 - i / steps))
        z = z + pipeline.unet(z, t, encoder_hidden_states=text).sample / steps
    pixels = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    return z, pipeline.image_processor.postprocess(pixels, output_type="np")


def reference(
    name: str, files: Files, z: Tensor, generators: Callable[[], list[torch.Generator]]
) -> tuple[Tensor, Image]:
    """A system's latents and pictures of ``PROMPTS`` by diffusers."""
    pipeline = diffusers_pipeline(name, files)
    if name == "instaflow":
        return run_instaflow(pipeline, z)
    return run_diffusers(pipeline, z, generators(), CALLS[name])
