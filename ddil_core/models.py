"""Models: what a reference names, loaded with its denoiser, text encoders and decoder."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddil_core import layouts
from ddil_core.denoiser import Condition, GuidedDenoiser, NetworkDenoiser
from ddil_core.errors import DdilError
from ddil_core.layouts import LAYOUTS, Layout
from ddil_core.parameterization import FLOWS, Prediction, Reflection
from ddil_core.protocol import read_yaml
from ddil_core.references import resolve
from ddil_core.sampling import SYSTEM_FILE, Sampling
from ddil_core.schedule import FlowSchedule, Schedule
from ddil_core.systems import Files


@dataclass(eq=False)
class Model:
    """A text-to-image model in its parts: tokenizers and text encoders, denoiser, decoder."""

    reference: str
    files: Files
    pipeline: Any
    layout: Layout
    denoiser: NetworkDenoiser
    sampling: Sampling
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the model's own resolution."""
        config: Any = self.denoiser.net.config
        return config.in_channels, config.sample_size, config.sample_size

    def guided(self, guidance_scale: float | None = None, reflection: Reflection | None = None) -> GuidedDenoiser:
        """The denoiser with guidance (the model's own scale where None is given) and reflection."""
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        outside = scale != 1.0 and self.denoiser.guidance_width is None
        return GuidedDenoiser(self.denoiser, self.nothing() if outside else None, scale, reflection)

    @torch.no_grad()
    def nothing(self) -> Condition:
        """What the network is told where there is no prompt, one row."""
        return Condition(self.layout.nothing(self.pipeline))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Condition:
        """What the network is told of prompts, each distinct prompt encoded once."""
        distinct = list(dict.fromkeys(prompts))
        parts = [
            Condition(self.layout.encode(self.pipeline, distinct[start : start + batch_size]))
            for start in range(0, len(distinct), batch_size)
        ]
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        return Condition.cat(parts).rows(rows)

    def cut(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than a text encoder takes, so that their rest is not read."""
        return layouts.cut(self.pipeline, prompts)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's posterior (mean, std) in scaled latents, for pixels float32 [B, 3, H, W] in [-1, 1]."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        scale, shift = _scaling(vae)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, z: Tensor, batch_size: int = 64) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of scaled latents [B, C, h, w]."""
        vae = self.pipeline.vae
        scale, shift = _scaling(vae)
        images = []
        for part in z.split(batch_size):
            pixels = vae.decode((part / scale + shift).to(vae.dtype)).sample
            images.append((pixels.float() * 127.5 + 127.5).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(images).numpy()

    def weights_sha256(self) -> str:
        """A hash of all weights, file by file in the order of their names."""
        folder, extra = self.files.folder, [path for path in (self.files.unet, self.files.lora) if path is not None]
        digest = hashlib.sha256()
        for path in [*sorted(folder.rglob("*.safetensors")), *extra]:
            name = path.name if path in extra else str(path.relative_to(folder))
            digest.update(name.encode())
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()


def _scaling(vae: Any) -> tuple[float, float]:
    """(scale, shift) of an autoencoder: a scaled latent is (latent − shift) · scale; SD3's has a shift."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def load_model(
    reference: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    fuse_lora: bool = True,
) -> Model:
    """A model by reference, in evaluation mode. A LoRA is merged into the weights, or kept beside them (``fuse_lora`` False).

    Raises:
        WrongCommand: the reference fits nothing; the message names the nearest that would.
        DdilError: its files are damaged, do not fit each other, or are of a layout that is not known.
    """
    return assemble(reference, Files(resolve(reference)), device, dtype, fuse_lora=fuse_lora)


def assemble(
    reference: str,
    files: Files,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    fuse_lora: bool = True,
) -> Model:
    """A model from its files; ``reference`` is what messages and records call it. Raises as ``load_model``."""
    layout = _layout(files, reference)
    pipeline = _load_pipeline(files.folder, layout, reference, dtype)
    net = getattr(pipeline, layout.network)
    if files.unet is not None:
        _replace_network(net, files.unet, reference)
    if files.lora is not None:
        _add_lora(pipeline, net, files.lora, reference, fuse_lora)
    device = torch.device(device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(device).eval().requires_grad_(False)
    told = _read_json(files.folder / SYSTEM_FILE) if (files.folder / SYSTEM_FILE).is_file() else {}
    schedule, prediction = _process(files, told, dict(pipeline.scheduler.config), reference)
    denoiser = layout.denoiser(net, schedule.to(device), prediction)
    if files.system is not None:
        sampling = Sampling.from_system(files.system, layout.guidance_scale)
    elif told:
        sampling = Sampling.from_file(told)
    else:
        config = dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__}
        sampling = Sampling.from_scheduler(config, layout.guidance_scale)
    return Model(reference, files, pipeline, layout, denoiser, sampling, device)


def _layout(files: Files, reference: str) -> Layout:
    name = _read_json(files.folder / "model_index.json").get("_class_name")
    if files.system is not None:
        name = (
            files.system.layout
        )  # a repository's own pipeline class, such as InstaFlow's, is in one of diffusers' layouts
    if name not in LAYOUTS:
        raise DdilError(f"the model {reference!r} has the layout {name}; known here are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _process(files: Files, told: dict[str, Any], config: dict[str, Any], reference: str) -> tuple[Schedule, Prediction]:
    """The noise schedule, and what the network predicts: as the row says, or ``ddil.json``, or the scheduler.

    Raises:
        DdilError: ``ddil.json`` and the scheduler name different predictions, so that one of them was exchanged.
    """
    scheduled = config.get("prediction_type") or "flow"  # FlowMatchEuler knows no other
    named = files.system.prediction if files.system is not None else told.get("prediction")
    prediction: Prediction = named or scheduled
    if files.system is None and named not in (None, "rectified_flow", scheduled):
        raise DdilError(
            f"the model {reference!r} was trained to predict {named}, and its scheduler/scheduler_config.json says "
            f"{scheduled}; set its prediction_type to {named}"
        )
    if prediction not in FLOWS:
        return Schedule.from_config(config), prediction
    return FlowSchedule.straight() if prediction == "rectified_flow" else FlowSchedule.from_config(config), prediction


def _load_pipeline(folder: Path, layout: Layout, reference: str, dtype: torch.dtype) -> Any:
    import diffusers

    kind = getattr(diffusers, layout.pipeline)
    # A safety checker paints pictures black and a watermarker writes into them: neither is loaded.
    absent = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    wanted = {name: value for name, value in absent.items() if name in inspect.signature(kind.__init__).parameters}
    try:
        pipeline = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **wanted)
    except Exception as error:  # every library below raises its own kind for a damaged file
        raise DdilError(
            f"the model {reference!r} cannot be loaded from {folder}: {_brief(error)}; "
            "its files are damaged or incomplete, so fetch or make it again"
        ) from error
    if dtype == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.float()  # SDXL's autoencoder overflows in float16
    return pipeline


def _replace_network(net: nn.Module, path: Path, reference: str) -> None:
    from safetensors.torch import load_file

    try:
        net.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise DdilError(
            f"the U-Net {path} of {reference!r} does not go into its pipeline: {_brief(error)}; "
            "it is damaged or was made for another one"
        ) from error


def _add_lora(pipeline: Any, net: nn.Module, path: Path, reference: str, fuse: bool) -> None:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as weights:
            names = list(weights.keys())
        pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
        # What finds no place is no error to diffusers, and half a LoRA is none.
        parts = [name for name in names if name.startswith(("unet", "lora_unet", "transformer"))]
        wanted = sum(any(down in part for down in ("lora_A", "lora_down", "lora.down")) for part in parts)
        placed = sum(".lora_A." in name for name in net.state_dict())
        if placed != wanted or not placed:
            raise ValueError(f"{placed} of its {wanted} parts find a place")
        if fuse:
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception as error:  # safetensors, diffusers and PEFT raise kinds of their own
        raise DdilError(
            f"the LoRA {path} of {reference!r} does not go onto its pipeline: {_brief(error)}; "
            "it is damaged or was made for another base"
        ) from error


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DdilError(f"the file {path} of the model is damaged; fetch or make the model again") from error


def run_configuration(folder: Path) -> dict[str, Any] | None:
    """``run.yaml`` of a run folder; None where the folder is no run."""
    path = folder / "run.yaml"
    return read_yaml(path) if path.is_file() else None
