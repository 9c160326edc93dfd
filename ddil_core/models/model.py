"""Models: load a reference with its denoiser, text encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddil_core.diffusion.denoiser import Condition, GuidedDenoiser, NetworkDenoiser
from ddil_core.diffusion.parameterization import Reflection
from ddil_core.models import layouts
from ddil_core.models.autoencoder import (
    latent_scaling,
    require_decoder,
    require_encoder,
    require_finite_tiny,
    require_scaling,
)
from ddil_core.models.compiling import prepare_networks
from ddil_core.models.decoding import begin_decoding
from ddil_core.models.fetch import fetch_missing
from ddil_core.models.image_size import Geometry, Size
from ddil_core.models.layouts import TEXT_ENCODERS, Layout, Tensors
from ddil_core.models.loading import empty_pipeline, load_pipeline
from ddil_core.models.memory import decode_batch, latent_channels, latent_scale, latent_size, on_device
from ddil_core.models.references import resolve, weights_sha256
from ddil_core.models.sampling import SYSTEM_FILE, Sampling, assumed_guidance
from ddil_core.models.settings import layout_of, process_of, sampling_of
from ddil_core.models.system_specs import Files
from ddil_core.models.weights import components, read_index, read_json
from ddil_core.support.compute import FP32, Compute
from ddil_core.support.devices import beside, choose_device, sent
from ddil_core.support.errors import WrongCommand
from ddil_core.support.finite import Checks, all_finite, not_finite
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
        size: The size (H, W) in pixels of the images. None: the size that the model's network names.
        asked_size: Whether the user asked for another size than the model's own.
        text_encoders_stay: Whether the text encoders stay on a GPU that has room for them. Else they leave it after
            each use.
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
    size: Size | None = None
    asked_size: bool = False
    text_encoders_stay: bool = False
    _sha256: str | None = field(default=None, init=False, repr=False)

    @property
    def static(self) -> bool:
        """Whether batches are filled up to one number of rows: for compiled code, and for the kernels of a GPU."""
        return self.compute.compile or self.device.type == "cuda"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a latent of the model's images."""
        config = self.denoiser.config
        if self.size is None:
            return latent_channels(config), *latent_size(config, self.reference)
        scale = latent_scale(self.pipeline.vae.config, self.reference)
        return latent_channels(config), self.size[0] // scale, self.size[1] // scale

    @property
    def image_size(self) -> Size:
        """The size (H, W) in pixels of the model's images."""
        if self.size is not None:
            return self.size
        scale = latent_scale(self.pipeline.vae.config, self.reference)
        return self.latent_shape[1] * scale, self.latent_shape[2] * scale

    def guided(self, guidance_scale: float | None = None, reflection: Reflection | None = None) -> GuidedDenoiser:
        """Return the denoiser with guidance and reflection. None takes the model's own guidance scale.

        Raises:
            WrongCommand: the number is no guidance scale.
        """
        scale = self.own_guidance() if guidance_scale is None else guidance_scale
        require_guidance(scale)
        outside = self.evaluations(scale) > 1
        return GuidedDenoiser(self.denoiser, self.nothing() if outside else None, scale, reflection)

    def evaluations(self, guidance_scale: float) -> int:
        """Return how often a call evaluates the network: twice with guidance, unless it reads the scale."""
        return 1 if guidance_scale == 1.0 or self.denoiser.reads_guidance else 2

    def own_guidance(self) -> float:
        """Return the model's own guidance scale. Warn once where it is an assumption."""
        scale = self.sampling.guidance_scale
        if self.guidance_assumed:
            warn_once(assumed_guidance(self.reference, scale))
        return scale

    def nothing(self) -> Condition:
        """Return the condition without a prompt, one row. It is encoded once."""
        return self._nothing

    @cached_property
    @torch.no_grad()
    def _nothing(self) -> Condition:
        with on_device(self.text_encoders(), self.device, stay=self.text_encoders_stay):
            return self._checked(self.with_size(self.layout.nothing(self.pipeline)))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64, checks: Checks | None = None) -> Condition:
        """Return the condition of the prompts, one row a prompt. Encode each distinct prompt once.

        A GPU encodes beside its other work, because diffusers waits for the tokens' copy.

        Args:
            prompts: The prompts.
            batch_size: The most prompts at once.
            checks: Checks the embeddings later, together with others. Without it they are checked now.

        Raises:
            DdilError: an embedding is not finite.
        """
        distinct = list(dict.fromkeys(prompts))
        parts = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
        row_of = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[prompt] for prompt in prompts])
        with on_device(self.text_encoders(), self.device, stay=self.text_encoders_stay):
            with beside(self.device, "prompts") as taken_over:
                encoded = [self.with_size(self.layout.encode(self.pipeline, part)) for part in parts]
            taken_over([tensor for condition in encoded for tensor in condition.tensors.values()])
            condition = Condition.cat(encoded)
        return self._checked(condition, checks).rows(sent(rows, self.device))

    def with_size(self, encoded: Tensors) -> Condition:
        """Return the condition of encoded prompts: their tensors [B, …], and what depends on the images' size."""
        if self.layout.sized is None:
            return Condition(encoded)
        like = next(iter(encoded.values()))
        sized = self.layout.sized(self.image_size)
        rows = {name: tensor.to(like).expand(len(like), *tensor.shape[1:]) for name, tensor in sized.items()}
        return Condition(encoded | rows)

    def _checked(self, condition: Condition, later: Checks | None = None) -> Condition:
        """Return the condition, whose numbers are checked now, or with ``later``."""
        checks, owner = later or Checks(), f"the model {self.reference!r}"
        error = partial(not_finite, "the embeddings", "after its text encoders", owner, self.text_encoders())
        for tensor in condition.tensors.values():
            checks.see(error, tensor)
        if later is None and checks.first_broken() is not None:
            raise error()
        return condition

    def text_encoders(self) -> list[nn.Module | None]:
        """Return the text encoders. None stands for one that the model lacks."""
        return [getattr(self.pipeline, name, None) for name in TEXT_ENCODERS]

    def cut(self, prompts: Sequence[str]) -> int:
        """Count the prompts that are too long for a text encoder. The encoder ignores the rest of such a prompt."""
        return layouts.count_truncated(self.pipeline, self.layout, prompts)

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

        ``pixels`` are what ``values`` returns: of pictures float32 [B, 3, H, W] in [-1, 1]. An AutoencoderDC encodes an
        image as one latent, so that std is 0.

        Raises:
            DdilError: the autoencoder has no encoder, or the latents are not finite.
        """
        vae = self.pipeline.vae
        require_encoder(vae, self.reference)
        encoded = vae.encode(pixels.to(self.device, vae.dtype))
        scale, shift = latent_scaling(vae, self.reference, self.device)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        else:
            mean, std = encoded.latent.float(), torch.zeros_like(encoded.latent, dtype=torch.float32)
        latents = (mean - shift) * scale, std * scale
        if not all_finite(latents):
            owner = f"the model {self.reference!r}"
            raise not_finite("the latents of images", "after its autoencoder encoded them", owner, [vae])
        return latents

    def decode(self, z: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Decode scaled latents [B, C, h, w] to images [B, H, W, …], and wait for them (``begin_decode``).

        Pictures are uint8 [B, H, W, 3], and points float32 [B, 1, 1, D].
        """
        return self.begin_decode(z, batch_size)()

    def begin_decode(
        self, z: Tensor, batch_size: int | None = None, whole: int = 0, checks: Checks | None = None
    ) -> Callable[[], np.ndarray]:
        """Begin to decode scaled latents [B, C, h, w], and return a function that waits for the images.

        Args:
            z: The latents.
            batch_size: The most images at once. Without it, as many as the memory allows, and in tiles if it does not
                allow one.
            whole: Where shapes stay the same (``static``), a last batch is decoded in the parts of a batch of ``whole``
                rows.
            checks: What else must be finite before the images count.

        Raises:
            DdilError: (on a GPU by the returned function) latents, images or what ``checks`` saw are not finite.
        """
        vae, owner, checks = self.pipeline.vae, f"the model {self.reference!r}", checks or Checks()
        checks.see(partial(not_finite, "the latents", "before they are decoded", owner, [self.denoiser.net]), z)
        if not z.is_cuda and (error := checks.first_broken()) is not None:
            raise error()  # before a long decoding
        if batch_size is None:
            batch_size = decode_batch(vae, z.shape[-2], z.shape[-1], self.device)
        scaling = latent_scaling(vae, self.reference, z.device)
        return begin_decoding(
            vae, z, scaling, batch_size, owner, self.layout.images.to_images,
            checks=checks, static=self.static, whole=whole,
        )  # fmt: skip

    def weights_sha256(self) -> str:
        """Return a SHA-256 over all files of weights: the pipeline's in the order of their names, then the rest.

        The files are read at the first call alone. What becomes of them later is not of the weights in memory.
        """
        if self._sha256 is None:
            self._sha256 = weights_sha256(self.files, self.reference, self.variant)
        return self._sha256


def load_model(
    reference: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "float32",
    variant: str | None = None,
    *,
    compute: Compute | None = None,
    height: int | None = None,
    width: int | None = None,
    download: bool = False,
    fuse_lora: bool = True,
) -> Model:
    """Load a model by reference, in evaluation mode. Its text encoders stay on a GPU that has room for them.

    Args:
        reference: The model: ``shapes``, a named system, a folder, a run folder, a file, a hub id …
        device: Where the model computes. None: CUDA if this machine has it, or else the CPU.
        dtype: What the model computes in: float32, bfloat16 or float16, as a name or as torch's dtype.
        variant: Which of several sets of weights to read, such as ``fp16``. None: the plain files, or the only variant.
        compute: The dtype with TF32 and compilation; it replaces ``dtype``.
        height: The height of the images in pixels. None: the model's own.
        width: The width of the images in pixels. None: the model's own.
        download: Fetch the files that are not here from the hub. Without it nothing is fetched.
        fuse_lora: Merge a LoRA into the weights. False keeps the LoRA beside the weights.

    Raises:
        WrongCommand: the reference fits nothing (the message names the nearest that does), there is no such device, a
            setting has no effect on it, or the model cannot draw images of this size.
        DdilError: the files are damaged, do not fit each other, or have an unknown layout.
    """
    if device is None or isinstance(device, str):
        device = choose_device(device)
    compute = compute or Compute.of(dtype)
    compute.require_device(torch.device(device))
    if download:
        fetch_missing([reference], variant)
    size = {"height": height, "width": width}
    model = assemble(reference, resolve(reference), device, compute, variant, fuse_lora=fuse_lora, **size)
    model.text_encoders_stay = True
    return model


def assemble(
    reference: str,
    files: Files,
    device: torch.device | str = "cpu",
    compute: Compute = FP32,
    variant: str | None = None,
    *,
    fuse_lora: bool = True,
    height: int | None = None,
    width: int | None = None,
) -> Model:
    """Load a model from its files. ``reference`` is the model's name in messages and records.

    For the arguments and errors see :func:`outline` and :func:`with_weights`.
    """
    return with_weights(outline(reference, files, height, width), device, compute, variant, fuse_lora=fuse_lora)


def outline(reference: str, files: Files, height: int | None = None, width: int | None = None) -> Model:
    """Return a model without its weights: its networks have shapes alone, on torch's meta device.

    Only configurations are read, so that what does not fit the model is refused before anything heavy is loaded.

    Args:
        reference: The name of the model in messages and records.
        files: The files of the model.
        height: See :func:`load_model`.
        width: See :func:`load_model`.

    Raises:
        WrongCommand: the model cannot draw images of this size, or its noise process is not supported.
        DdilError: the configurations are damaged, do not fit each other, or have an unknown layout.
    """
    layout = layout_of(files, reference)
    if (vae := components(read_index(files.folder)).get("vae")) is not None:
        require_decoder(vae[1], reference)
    pipeline = empty_pipeline(files, reference, layout.pipeline, layout.library)
    geometry = Geometry.of_files(files.folder, reference)
    size = geometry.size(height, width, reference)
    require_scaling(pipeline.vae, reference)
    own_sampling = read_json(files.folder / SYSTEM_FILE) if (files.folder / SYSTEM_FILE).is_file() else {}
    config = dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__}
    schedule, prediction = process_of(files, own_sampling, config, reference, geometry.tokens(size))
    denoiser = layout.denoiser(getattr(pipeline, layout.network), schedule, prediction)
    sampling, assumed = sampling_of(files, own_sampling, config, layout, denoiser, reference)
    model = Model(
        reference, files, pipeline, layout, denoiser, sampling, torch.device("meta"), guidance_assumed=assumed
    )
    if size != model.image_size:
        model.size = size
    model.asked_size = size != geometry.own
    return model


def with_weights(
    model: Model,
    device: torch.device | str = "cpu",
    compute: Compute = FP32,
    variant: str | None = None,
    *,
    fuse_lora: bool = True,
) -> Model:
    """Return a model of :func:`outline` with its weights, in evaluation mode.

    Args:
        model: The model without its weights.
        device: Where the model computes.
        compute: How the model computes.
        variant: See :func:`load_model`.
        fuse_lora: See :func:`load_model`.

    Raises:
        WrongCommand: the model has no such variant.
        DdilError: the weights are missing or damaged, or do not fit the configurations.
    """
    layout, reference, device = model.layout, model.reference, torch.device(device)
    options: dict[str, Any] = {"fuse_lora": fuse_lora, "library": layout.library, "empty": model.pipeline}
    pipeline = load_pipeline(model.files, reference, layout.pipeline, compute.torch_dtype, variant, **options)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            if name not in TEXT_ENCODERS:  # ``Model.encode`` moves the text encoders to the device
                part.to(device)
    if compute.dtype == "fp16" and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.float()  # SDXL's autoencoder overflows in float16
    require_finite_tiny(pipeline.vae, reference)
    layouts.bound_tokenizers(pipeline, layout, reference)
    own = model.denoiser
    denoiser = layout.denoiser(getattr(pipeline, layout.network), own.schedule.to(device), own.prediction)
    prepare_networks(denoiser, pipeline.vae, device, compute)
    return replace(model, pipeline=pipeline, denoiser=denoiser, device=device, variant=variant, compute=compute)
