"""Models: what a reference names, loaded with its denoiser, text encoders and decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, NetworkDenoiser
from ddil_core.diffusion.parameterization import FLOWS, Prediction, Reflection
from ddil_core.diffusion.schedule import FlowSchedule, Schedule, is_flow
from ddil_core.models import layouts
from ddil_core.models.autoencoder import latent_scaling, require_decoder, require_encoder
from ddil_core.models.fetch import fetch_missing
from ddil_core.models.layouts import LAYOUTS, TEXT_ENCODERS, Layout
from ddil_core.models.loading import load_pipeline
from ddil_core.models.memory import decode_batch, latent_size, on_device, tiles
from ddil_core.models.references import check_files, resolve
from ddil_core.models.sampling import SYSTEM_FILE, Sampling
from ddil_core.models.systems import Files
from ddil_core.models.weights import components, read_index, read_json
from ddil_core.support.devices import choose_device, torch_dtype
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import Finite, all_finite, not_finite
from ddil_core.support.protocol import require_guidance


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
    variant: str | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the model's own resolution."""
        config: Any = self.denoiser.net.config
        return config.in_channels, *latent_size(config, self.reference)

    def guided(self, guidance_scale: float | None = None, reflection: Reflection | None = None) -> GuidedDenoiser:
        """The denoiser with guidance (the model's own scale where None is given) and reflection.

        Raises:
            WrongCommand: the guidance scale is none.
        """
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        require_guidance(scale)
        outside = scale != 1.0 and self.denoiser.guidance_width is None
        return GuidedDenoiser(self.denoiser, self.nothing() if outside else None, scale, reflection)

    def nothing(self) -> Condition:
        """What the network is told where there is no prompt, one row; encoded once."""
        return self._nothing

    @cached_property
    @torch.no_grad()
    def _nothing(self) -> Condition:
        with on_device(self.text_encoders(), self.device):
            return self._checked(Condition(self.layout.nothing(self.pipeline)))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Condition:
        """What the network is told of prompts, each distinct prompt encoded once."""
        distinct = list(dict.fromkeys(prompts))
        parts = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
        with on_device(self.text_encoders(), self.device):
            encoded = [Condition(self.layout.encode(self.pipeline, part)) for part in parts]
        place = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        return self._checked(Condition.cat(encoded)).rows(rows)

    def _checked(self, condition: Condition) -> Condition:
        """Raises DdilError: what the text encoders give is not finite."""
        if not all_finite(condition.tensors.values()):
            whose = f"the model {self.reference!r}"
            raise not_finite("the embeddings", "after its text encoders", whose, self.text_encoders())
        return condition

    def text_encoders(self) -> list[nn.Module | None]:
        """Its text encoders, None where the layout has one and the model has not."""
        return [getattr(self.pipeline, name, None) for name in TEXT_ENCODERS]

    def cut(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than a text encoder takes, so that their rest is not read."""
        return layouts.count_truncated(self.pipeline, prompts)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's posterior (mean, std) in scaled latents, for pixels float32 [B, 3, H, W] in [-1, 1].

        Raises:
            DdilError: the autoencoder gives no posterior, or one that is not finite.
        """
        vae = self.pipeline.vae
        require_encoder(vae, self.reference)
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        scale, shift = latent_scaling(vae, self.reference, self.device)
        found = (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
        if not all_finite(found):
            whose = f"the model {self.reference!r}"
            raise not_finite("the latents of pictures", "after its autoencoder encoded them", whose, [vae])
        return found

    @torch.no_grad()
    def decode(self, z: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of scaled latents [B, C, h, w], as many at once as memory allows where None is
        given, and in tiles where it does not allow one.

        Raises:
            DdilError: the latents or the pictures are not finite.
        """
        vae, whose = self.pipeline.vae, f"the model {self.reference!r}"
        if not all_finite([z]):
            raise not_finite("the latents", "before they are decoded", whose, [self.denoiser.net])
        scale, shift = latent_scaling(vae, self.reference, z.device)
        batch_size = batch_size or decode_batch(vae, z.shape[-2], z.shape[-1], self.device)
        images, finite = [], Finite[str]()
        with nullcontext() if batch_size else tiles(vae, max(z.shape[-2:])):
            for part in z.split(batch_size or 1):
                pixels = vae.decode((part / scale + shift).to(vae.dtype)).sample
                finite.see("after its autoencoder decoded them", pixels)
                images.append((pixels.float() * 127.5 + 127.5).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu())
        if (place := finite.first_broken()) is not None:
            raise not_finite("the pictures", place, whose, [vae])
        return torch.cat(images).numpy()

    def weights_sha256(self) -> str:
        """A hash of the weights that are loaded, file by file in the order of their names, its own U-Net, LoRA or file last."""
        found = dict(check_files(self.files, self.reference, self.variant).components)
        if self.files.unet is not None:
            found.pop("unet")  # another is in its place
        files = {str(path.relative_to(self.files.folder)): path for paths in found.values() for path in paths}
        own = (self.files.unet, self.files.lora, self.files.checkpoint)
        digest = hashlib.sha256()
        for name, path in [*sorted(files.items()), *((path.name, path) for path in own if path is not None)]:
            digest.update(name.encode())
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()


def load_model(
    reference: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "float32",
    variant: str | None = None,
    *,
    download: bool = False,
    fuse_lora: bool = True,
) -> Model:
    """Load a model by reference, in evaluation mode.

    Args:
        reference: The model, as in :mod:`ddil_core.models.references`: ``shapes``, a named system, a folder, a hub id …
        device: Where the model computes. None: CUDA if this machine has it, or else the CPU.
        dtype: What the model computes in: float32, bfloat16 or float16, as a name or as torch's dtype.
        variant: Which of several sets of weights to read, such as ``fp16``. None: the plain files, or the only variant.
        download: Fetch the files that are not here from the hub. Without it nothing is fetched.
        fuse_lora: Merge a LoRA into the weights. False keeps the LoRA beside the weights.

    Raises:
        WrongCommand: the reference fits nothing (the message names the nearest that does), or there is no such device.
        DdilError: the files are damaged, do not fit each other, or have an unknown layout.
    """
    if device is None or isinstance(device, str):
        device = choose_device(device)
    if isinstance(dtype, str):
        dtype = torch_dtype(dtype)
    if download:
        fetch_missing([reference], variant)
    return assemble(reference, resolve(reference), device, dtype, variant, fuse_lora=fuse_lora)


def assemble(
    reference: str,
    files: Files,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    *,
    fuse_lora: bool = True,
) -> Model:
    """A model from its files; ``reference`` is what messages and records call it. The rest is as in ``load_model``."""
    layout = _layout(files, reference)
    if (vae := components(read_index(files.folder)).get("vae")) is not None:
        require_decoder(vae[1], reference)
    pipeline = load_pipeline(files, reference, layout.pipeline, dtype, variant, fuse_lora=fuse_lora)
    device = torch.device(device)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            if name not in TEXT_ENCODERS:  # they come to the device when they are asked
                part.to(device)
    if dtype == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.float()  # SDXL's autoencoder overflows in float16
    told = read_json(files.folder / SYSTEM_FILE) if (files.folder / SYSTEM_FILE).is_file() else {}
    config = dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__}
    schedule, prediction = _process(files, told, config, reference)
    latent_scaling(pipeline.vae, reference)  # what cannot be used is told now
    latent_size(getattr(pipeline, layout.network).config, reference)
    layouts.bound_tokenizers(pipeline, reference)
    denoiser = layout.denoiser(getattr(pipeline, layout.network), schedule.to(device), prediction)
    if files.system is not None:
        _require_embedding(denoiser.guidance_width, files.system.w_embedding, reference)
        sampling = Sampling.from_system(files.system, layout.guidance_scale)
    elif told:
        sampling = Sampling.from_file(told, f"the file {files.folder / SYSTEM_FILE}")
    else:
        sampling = Sampling.from_scheduler(config, layout.guidance_scale)
    return Model(reference, files, pipeline, layout, denoiser, sampling, device, variant)


def _layout(files: Files, reference: str) -> Layout:
    name = read_index(files.folder).get("_class_name")
    if files.system is not None:  # whose repository may name a class of its own, as InstaFlow's does
        name = files.system.layout
    if not isinstance(name, str) or name not in LAYOUTS:  # a repository's own class is a list
        raise DdilError(f"the model {reference!r} has the layout {name}; known here are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _require_embedding(width: int | None, wanted: int | None, reference: str) -> None:
    """Whether a network is told its guidance as its row says.

    Raises:
        DdilError: it is not, so that these are the files of another system.
    """
    if width != wanted:
        says = "none" if wanted is None else f"one of width {wanted}"
        has = "without a guidance embedding" if width is None else f"with a guidance embedding of width {width}"
        raise DdilError(
            f"the model {reference!r} has a U-Net {has}, and its row in systems.yaml says {says}; name the files of that system"
        )


def _process(files: Files, told: dict[str, Any], config: dict[str, Any], reference: str) -> tuple[Schedule, Prediction]:
    """The noise schedule, and what the network predicts: as a single file says, or the row, or ``ddil.json``, or the scheduler.

    Raises:
        WrongCommand: the scheduler's process is not known here.
        DdilError: ``ddil.json`` and the scheduler name different predictions, so that one of them was exchanged, or the prediction
            is not known here.
    """
    flow = "flow" if is_flow(config) else "epsilon"  # diffusers' own where a scheduler names none
    scheduled: Any = config.get("prediction_type") or flow
    named: Any = files.system.prediction if files.system is not None else told.get("prediction")
    prediction: Prediction = files.prediction or named or scheduled
    if files.system is None and files.prediction is None and named not in (None, "rectified_flow", scheduled):
        raise DdilError(
            f"the model {reference!r} was trained to predict {named}, and its scheduler/scheduler_config.json says "
            f"{scheduled}; set its prediction_type to {named}"
        )
    if prediction not in get_args(Prediction):
        raise DdilError(
            f"the model {reference!r} predicts {prediction}, which is not known here; it may be {', '.join(get_args(Prediction))}"
        )
    if config.get("variance_type") in ("learned", "learned_range"):
        raise DdilError(f"the model {reference!r} predicts a variance too, which is not known here; take another model")
    if prediction not in FLOWS:
        return Schedule.from_config(config), prediction
    return FlowSchedule.straight() if prediction == "rectified_flow" else FlowSchedule.from_config(config), prediction
