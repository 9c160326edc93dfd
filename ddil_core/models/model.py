"""Models: load a reference with its denoiser, text encoders and autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from ddil_core.models.autoencoder import (
    latent_scaling,
    require_decoder,
    require_encoder,
    require_finite_tiny,
    require_scaling,
)
from ddil_core.models.compiling import compile_module
from ddil_core.models.decoding import begin_decoding
from ddil_core.models.fetch import fetch_missing
from ddil_core.models.layouts import LAYOUTS, TEXT_ENCODERS, Layout
from ddil_core.models.loading import load_pipeline
from ddil_core.models.memory import decode_batch, latent_size, on_device
from ddil_core.models.references import check_files, resolve
from ddil_core.models.sampling import SYSTEM_FILE, Sampling
from ddil_core.models.system_specs import Files
from ddil_core.models.weights import components, read_index, read_json
from ddil_core.support.compute import FP32, Compute
from ddil_core.support.devices import choose_device
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.finite import all_finite, not_finite
from ddil_core.support.progress import warn_once
from ddil_core.support.protocol import require_guidance


@dataclass(eq=False)
class Model:
    """A text-to-image model.

    Attributes:
        reference: The name of the model in messages and records.
        files: The files of the model.
        pipeline: diffusers' pipeline, with the tokenizers, text encoders and autoencoder.
        layout: The layout of the pipeline.
        denoiser: The pipeline's network with its noise schedule.
        sampling: How the model is meant to be sampled.
        device: Where the model computes.
        variant: The set of weights that the user asked for, such as ``fp16``.
        guidance_assumed: Whether the model names no guidance scale, so that ``sampling`` has diffusers' default.
        compute: The number format, TF32, and whether the networks are compiled.
    """

    reference: str
    files: Files
    pipeline: Any
    layout: Layout
    denoiser: NetworkDenoiser
    sampling: Sampling
    device: torch.device
    variant: str | None = None
    guidance_assumed: bool = False
    compute: Compute = FP32

    @property
    def static(self) -> bool:
        """Whether batches are filled up to one number of rows: for compiled code, and for the kernels of a GPU."""
        return self.compute.compile or self.device.type == "cuda"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a latent at the model's own resolution."""
        config: Any = self.denoiser.net.config
        return config.in_channels, *latent_size(config, self.reference)

    def guided(self, guidance_scale: float | None = None, reflection: Reflection | None = None) -> GuidedDenoiser:
        """Return the denoiser with guidance and reflection. None takes the model's own guidance scale.

        Raises:
            WrongCommand: the number is no guidance scale.
        """
        scale = self.own_guidance() if guidance_scale is None else guidance_scale
        require_guidance(scale)
        outside = scale != 1.0 and self.denoiser.guidance_width is None
        return GuidedDenoiser(self.denoiser, self.nothing() if outside else None, scale, reflection)

    def own_guidance(self) -> float:
        """Return the model's own guidance scale. Warn once where it is an assumption."""
        scale = self.sampling.guidance_scale
        if self.guidance_assumed:
            warn_once(
                f"{self.reference!r} names no guidance scale, so that diffusers' default {scale:g} is assumed; say "
                "another with --guidance or with guidance_scale in a protocol"
            )
        return scale

    def nothing(self) -> Condition:
        """Return the condition without a prompt, one row. It is encoded once."""
        return self._nothing

    @cached_property
    @torch.no_grad()
    def _nothing(self) -> Condition:
        with on_device(self.text_encoders(), self.device):
            return self._checked(Condition(self.layout.nothing(self.pipeline)))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Condition:
        """Return the condition of the prompts, one row a prompt. Encode each distinct prompt once."""
        distinct = list(dict.fromkeys(prompts))
        parts = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
        with on_device(self.text_encoders(), self.device):
            encoded = [Condition(self.layout.encode(self.pipeline, part)) for part in parts]
        row_of = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[prompt] for prompt in prompts], device=self.device)
        return self._checked(Condition.cat(encoded)).rows(rows)

    def _checked(self, condition: Condition) -> Condition:
        """Return the condition if all its numbers are finite.

        Raises:
            DdilError: an embedding is not finite.
        """
        if not all_finite(condition.tensors.values()):
            owner = f"the model {self.reference!r}"
            raise not_finite("the embeddings", "after its text encoders", owner, self.text_encoders())
        return condition

    def text_encoders(self) -> list[nn.Module | None]:
        """Return the text encoders. None stands for one that the model lacks."""
        return [getattr(self.pipeline, name, None) for name in TEXT_ENCODERS]

    def cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that are too long for a text encoder. The encoder ignores the rest of such a prompt."""
        return layouts.count_truncated(self.pipeline, prompts)

    def require_pictures(self, instead: str) -> None:
        """Refuse a model that draws points. ``instead`` is what the message advises.

        Raises:
            WrongCommand: it does.
        """
        if not self.layout.images.pictures:
            raise WrongCommand(f"the model {self.reference!r} draws points, which are no pictures; {instead}")

    def values(self, images: np.ndarray) -> Tensor:
        """Return the values, float32 [B, C, H, W], that the autoencoder reads of images [B, H, W, C]."""
        return self.layout.images.to_values(images)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images: return (mean, std) of the autoencoder's posterior, in scaled latents [B, C, h, w].

        ``pixels`` are what ``values`` returns: of pictures float32 [B, 3, H, W] in [-1, 1].

        Raises:
            DdilError: the autoencoder has no posterior, or the posterior is not finite.
        """
        vae = self.pipeline.vae
        require_encoder(vae, self.reference)
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        scale, shift = latent_scaling(vae, self.reference, self.device)
        latents = (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
        if not all_finite(latents):
            owner = f"the model {self.reference!r}"
            raise not_finite("the latents of images", "after its autoencoder encoded them", owner, [vae])
        return latents

    def decode(self, z: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Decode scaled latents [B, C, h, w] to images [B, H, W, …], and wait for them (``begin_decode``).

        Pictures are uint8 [B, H, W, 3], and points float32 [B, 1, 1, D].
        """
        return self.begin_decode(z, batch_size)()

    def begin_decode(self, z: Tensor, batch_size: int | None = None, whole: int = 0) -> Callable[[], np.ndarray]:
        """Begin to decode scaled latents [B, C, h, w], and return a function that waits for the images.

        Without ``batch_size``, decode as many images at once as the memory allows, and in tiles if it does not allow
        one. Where shapes stay the same (``static``), a last batch is decoded in the parts of a batch of ``whole`` rows.

        Raises:
            DdilError: the latents are not finite, or (by the returned function) the images.
        """
        vae, owner = self.pipeline.vae, f"the model {self.reference!r}"
        if not all_finite([z]):
            raise not_finite("the latents", "before they are decoded", owner, [self.denoiser.net])
        if batch_size is None:
            batch_size = decode_batch(vae, z.shape[-2], z.shape[-1], self.device)
        scaling = latent_scaling(vae, self.reference, z.device)
        return begin_decoding(
            vae, z, scaling, batch_size, owner, self.layout.images.to_images, static=self.static, whole=whole
        )

    def weights_sha256(self) -> str:
        """Return a SHA-256 over all files of weights: the pipeline's in the order of their names, then the rest."""
        files = dict(check_files(self.files, self.reference, self.variant).components)
        if self.files.unet is not None:
            files.pop("unet")  # the system's own U-Net replaces it
        by_name = {str(path.relative_to(self.files.folder)): path for paths in files.values() for path in paths}
        own = (self.files.unet, self.files.lora, self.files.checkpoint)
        digest = hashlib.sha256()
        for name, path in [*sorted(by_name.items()), *((path.name, path) for path in own if path is not None)]:
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
    compute: Compute | None = None,
    download: bool = False,
    fuse_lora: bool = True,
) -> Model:
    """Load a model by reference, in evaluation mode.

    Args:
        reference: The model: ``shapes``, a named system, a folder, a run folder, a file, a hub id …
        device: Where the model computes. None: CUDA if this machine has it, or else the CPU.
        dtype: What the model computes in: float32, bfloat16 or float16, as a name or as torch's dtype.
        variant: Which of several sets of weights to read, such as ``fp16``. None: the plain files, or the only variant.
        compute: The dtype with TF32 and compilation; it replaces ``dtype``.
        download: Fetch the files that are not here from the hub. Without it nothing is fetched.
        fuse_lora: Merge a LoRA into the weights. False keeps the LoRA beside the weights.

    Raises:
        WrongCommand: the reference fits nothing (the message names the nearest that does), there is no such device, or
            a setting has no effect on it.
        DdilError: the files are damaged, do not fit each other, or have an unknown layout.
    """
    if device is None or isinstance(device, str):
        device = choose_device(device)
    compute = compute or Compute.of(dtype)
    compute.require_device(torch.device(device))
    if download:
        fetch_missing([reference], variant)
    return assemble(reference, resolve(reference), device, compute, variant, fuse_lora=fuse_lora)


def assemble(
    reference: str,
    files: Files,
    device: torch.device | str = "cpu",
    compute: Compute = FP32,
    variant: str | None = None,
    *,
    fuse_lora: bool = True,
) -> Model:
    """Load a model from its files. ``reference`` is the model's name in messages and records.

    Args:
        reference: The name of the model in messages and records.
        files: The files of the model.
        device: Where the model computes.
        compute: How the model computes.
        variant: See :func:`load_model`.
        fuse_lora: See :func:`load_model`.

    Raises:
        DdilError: see :func:`load_model`.
    """
    layout = _layout(files, reference)
    if (vae := components(read_index(files.folder)).get("vae")) is not None:
        require_decoder(vae[1], reference)
    options: dict[str, Any] = {"fuse_lora": fuse_lora, "library": layout.library}
    pipeline = load_pipeline(files, reference, layout.pipeline, compute.torch_dtype, variant, **options)
    device = torch.device(device)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            if name not in TEXT_ENCODERS:  # ``Model.encode`` moves the text encoders to the device
                part.to(device)
    if compute.dtype == "fp16" and pipeline.vae.config.force_upcast:
        pipeline.vae.float()  # SDXL's autoencoder overflows in float16
    own_sampling = read_json(files.folder / SYSTEM_FILE) if (files.folder / SYSTEM_FILE).is_file() else {}
    config = dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__}
    schedule, prediction = _process(files, own_sampling, config, reference)
    require_scaling(pipeline.vae, reference)
    require_finite_tiny(pipeline.vae, reference)
    latent_size(getattr(pipeline, layout.network).config, reference)
    layouts.bound_tokenizers(pipeline, reference)
    denoiser = layout.denoiser(getattr(pipeline, layout.network), schedule.to(device), prediction)
    if files.system is not None:
        _require_embedding(denoiser.guidance_width, files.system.w_embedding, reference)
        sampling = Sampling.from_system(files.system, layout.guidance_scale)
    elif own_sampling:
        sampling = Sampling.from_file(own_sampling, f"the file {files.folder / SYSTEM_FILE}")
    else:
        sampling = Sampling.from_scheduler(config, layout.guidance_scale)
    channels = getattr(pipeline, layout.network).config.in_channels
    if sampling.bounds is not None and len(sampling.bounds.bound) != channels:
        raise DdilError(
            f"the file {files.folder / SYSTEM_FILE} has bounds for {len(sampling.bounds.bound)} channels, and the "
            f"model's latents have {channels}; take the file of this model"
        )
    assumed = files.system is None and not own_sampling and denoiser.guidance_width is None
    prepare_networks(denoiser, pipeline.vae, device, compute)
    return Model(reference, files, pipeline, layout, denoiser, sampling, device, variant, assumed, compute)


def prepare_networks(denoiser: NetworkDenoiser, vae: Any, device: torch.device, compute: Compute) -> None:
    """Bring the networks that draw into the form that is quick on the device.

    Raises:
        DdilError: they are to be compiled, and this machine cannot compile.
    """
    if device.type == "cuda" and compute.dtype != "fp32":  # tensor cores read the channels of a pixel together
        for net in (denoiser.net, vae):
            net.to(memory_format=torch.channels_last)
    if compute.compile:
        compile_module(denoiser.net, device)
        compile_module(vae.decoder, device)
        denoiser.reuses_output = device.type == "cuda"


def _layout(files: Files, reference: str) -> Layout:
    name = read_index(files.folder).get("_class_name")
    if files.system is not None:  # the repository may name a class of its own, as InstaFlow's does
        name = files.system.layout
    if not isinstance(name, str) or name not in LAYOUTS:  # a list names a class of the repository
        raise DdilError(f"the model {reference!r} has the layout {name}; known here are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _require_embedding(width: int | None, wanted: int | None, reference: str) -> None:
    """Refuse a network with another guidance embedding than its row in ``systems.yaml`` says.

    Raises:
        DdilError: the widths differ, so these are the files of another system.
    """
    if width != wanted:
        says = "none" if wanted is None else f"one of width {wanted}"
        has = "without a guidance embedding" if width is None else f"with a guidance embedding of width {width}"
        raise DdilError(
            f"the model {reference!r} has a U-Net {has}, and its row in systems.yaml says {says}; "
            "name the files of that system"
        )


def _process(
    files: Files, own_sampling: dict[str, Any], config: dict[str, Any], reference: str
) -> tuple[Schedule, Prediction]:
    """Return the noise schedule and what the network predicts.

    The first of these that names a prediction decides: the single file, the row or ``ddil.json``, the scheduler's
    ``config``.

    Raises:
        WrongCommand: the scheduler's process is not supported.
        DdilError: ``ddil.json`` and the scheduler name different predictions, or the prediction is not supported.
    """
    flow = "flow" if is_flow(config) else "epsilon"  # diffusers' default
    scheduled: Any = config.get("prediction_type") or flow
    named: Any = files.system.prediction if files.system is not None else own_sampling.get("prediction")
    prediction: Prediction = files.prediction or named or scheduled
    if files.system is None and files.prediction is None and named not in (None, "rectified_flow", scheduled):
        raise DdilError(
            f"the model {reference!r} was trained to predict {named}, and its scheduler/scheduler_config.json says "
            f"{scheduled}; set its prediction_type to {named}"
        )
    if prediction not in get_args(Prediction):
        raise DdilError(
            f"the model {reference!r} predicts {prediction}, which is not supported; the prediction may be "
            f"{', '.join(get_args(Prediction))}"
        )
    if config.get("variance_type") in ("learned", "learned_range"):
        raise DdilError(f"the model {reference!r} also predicts a variance, which is not supported; take another model")
    if prediction not in FLOWS:
        return Schedule.from_config(config), prediction
    if "shift" in own_sampling:  # a student's scheduler has the shift and the end of the student's own grid
        config = config | {"shift": own_sampling["shift"], "shift_terminal": None}
    return FlowSchedule.straight() if prediction == "rectified_flow" else FlowSchedule.from_config(config), prediction
