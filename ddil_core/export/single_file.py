"""The student as one checkpoint file in the key layout of Stable Diffusion's first authors.

Other programs and diffusers' ``from_single_file`` read it. The names are those of ``ddil_core.models.original``, which
also serves to read such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_core.export.finished import FinishedRun
from ddil_core.export.options import Options
from ddil_core.export.pipeline import copy_pipeline
from ddil_core.export.stock import require_stock, stock_call
from ddil_core.models.checkpoint import V_KEY
from ddil_core.models.convert import own_memory
from ddil_core.models.original import autoencoder_weight, open_clip_weight, unet_layer
from ddil_core.support.checksums import MANIFEST
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.files import sort_metadata, write_tensors

CONFIG = "config"
"""The folder with the configuration, which a checkpoint file itself does not hold."""

_ARCHITECTURES = {
    ("1", "epsilon"): "stable-diffusion-v1",
    ("1", "v_prediction"): "stable-diffusion-v1",
    ("2", "epsilon"): "stable-diffusion-v2-512",
    ("2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("xl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("xl", "v_prediction"): "stable-diffusion-xl-v1-base",
}
"""``modelspec.architecture`` by the version of Stable Diffusion and by the prediction (Stability AI's ModelSpec)."""
_MODELSPEC = {"epsilon": "epsilon", "v_prediction": "v"}


def require(run: FinishedRun, options: Options) -> None:
    """Refuse a student whose weights have no names in the original layout.

    Raises:
        WrongCommand: the layout, the prediction or a guidance embedding of the student has no place in such a file.
    """
    require_stock(run)
    known = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    if run.network_config.get("time_cond_proj_dim") is not None:
        raise WrongCommand(
            f"the student in {run.student} has an embedding of its guidance scale, which the original layout of Stable "
            "Diffusion has no name for; export it --to diffusers"
        )
    if run.layout.pipeline not in known:
        raise WrongCommand(
            f"the student in {run.student} has the layout {run.layout.pipeline}, and a single file is written of "
            f"{' and '.join(known)} alone; export it --to diffusers"
        )
    if run.prediction not in _MODELSPEC:
        raise WrongCommand(
            f"the student in {run.student} predicts {run.prediction}, which no single file can say; export it "
            "--to diffusers"
        )


def write(run: FinishedRun, folder: Path, options: Options) -> str:
    """Write the checkpoint, and the configuration without weights beside it."""
    call = stock_call(run)
    copy_pipeline(run, call, folder / CONFIG, ignored=(MANIFEST, "*.safetensors", "*.safetensors.index.json"))
    write_checkpoint(run, folder / f"{options.name}.safetensors", options.name)
    kind = run.layout.pipeline
    return f"""\
```python
from diffusers import {kind}

pipeline = {kind}.from_single_file("{options.name}.safetensors", config="{CONFIG}")
image = pipeline("a prompt", {call.text()}).images[0]
```

The folder `{CONFIG}` holds the configuration and the scheduler, which a checkpoint file does not. Other programs must
be told the scheduler, and what the network predicts.
"""


def write_checkpoint(run: FinishedRun, path: Path, title: str) -> None:
    """Write all weights of the student to one file. Its metadata say what the network predicts.

    A network that predicts v is marked by a tensor too, as trainers do, and as ComfyUI reads it for SDXL.

    Raises:
        DdilError: a weight has no name in the original layout.
    """
    tensors = original_weights(run.model.pipeline)
    if run.prediction == "v_prediction":
        tensors[V_KEY] = torch.tensor([])
    height, width = run.model.image_size
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[version(run.model.pipeline), run.prediction],
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": _MODELSPEC[run.prediction],
        "ddil.sampling": json.dumps(run.settings, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, own_memory(tensors), metadata)
    sort_metadata(path)


def version(pipeline: Any) -> str:
    """Return the version of Stable Diffusion whose key layout a pipeline gets: "1", "2" or "xl".

    Version 2 has a text encoder of OpenCLIP, whose activation is GELU. CLIP's is QuickGELU.
    """
    if hasattr(pipeline, "text_encoder_2"):
        return "xl"
    return "2" if pipeline.text_encoder.config.hidden_act == "gelu" else "1"


def original_weights(pipeline: Any) -> dict[str, Tensor]:
    """Return all weights of a Stable Diffusion pipeline by their names in a single file.

    Raises:
        DdilError: a layer of the U-Net has no name there.
    """
    named = {f"model.diffusion_model.{name}": weight for name, weight in _unet(pipeline.unet).items()}
    named |= {f"first_stage_model.{name}": weight for name, weight in _autoencoder(pipeline.vae).items()}
    first = pipeline.text_encoder.state_dict()
    kind = version(pipeline)
    if kind == "2":
        return named | {f"cond_stage_model.model.{name}": weight for name, weight in _open_clip(first).items()}
    place = "cond_stage_model" if kind == "1" else "conditioner.embedders.0"
    for name, weight in first.items():
        named[f"{place}.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    if kind == "xl":
        second = _open_clip(pipeline.text_encoder_2.state_dict())
        named |= {f"conditioner.embedders.1.model.{name}": weight for name, weight in second.items()}
    return named


def _unet(net: Any) -> dict[str, Tensor]:
    named = {}
    for name, weight in net.state_dict().items():
        layer, _, end = name.rpartition(".")
        original = unet_layer(layer, net.config)
        if original is None:
            raise DdilError(
                f"the layer {layer} of the student's U-Net has no name in the original layout of Stable Diffusion; "
                "export it --to diffusers"
            )
        named[f"{original}.{end}"] = weight
    return named


def _autoencoder(vae: Any) -> dict[str, Tensor]:
    """Name an autoencoder's weights. The projections of its attention were convolutions of one pixel."""
    named, levels = {}, len(vae.config.block_out_channels)
    for name, weight in vae.state_dict().items():
        original = autoencoder_weight(name, levels)
        linear = ".attn_1." in original and weight.ndim == 2
        named[original] = weight[:, :, None, None] if linear else weight
    return named


def _open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a text encoder's weights as ``open_clip`` does, which joins query, key and value in one matrix."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, weight in state.items():
        original = open_clip_weight(name.removeprefix("text_model."))
        place = next((i for i, part in enumerate("qkv") if f".{part}_proj." in name), 0)
        parts.setdefault(original, []).append((place, weight.T if original == "text_projection" else weight))
    return {name: torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) for name, parts in parts.items()}
