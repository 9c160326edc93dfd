"""A LoRA's adapters in two key layouts: diffusers' (PEFT's), and that of kohya's scripts, which most programs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ddil_core.distillation.student import LORA_FILE
from ddil_core.export.base import base_of
from ddil_core.export.finished import FinishedRun
from ddil_core.export.options import Options
from ddil_core.export.stock import require_stock, stock_call
from ddil_core.models.convert import own_memory
from ddil_core.models.lora import BASE_SHA256, Change, read_lora
from ddil_core.models.original import unet_layer
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.models.weights import read_metadata
from ddil_core.support.errors import WrongCommand
from ddil_core.support.files import sort_metadata, write_tensors
from ddil_core.support.outside import parse_json

_SETTINGS = "lora_adapter_metadata"
"""The key of PEFT's settings in the metadata of diffusers' files."""


def require(run: FinishedRun, options: Options) -> None:
    """Refuse a student without adapters.

    Raises:
        WrongCommand: the run trained a whole student.
    """
    require_stock(run)
    if run.lora is None:
        raise WrongCommand(
            f"the run in {run.folder} trained a whole student and no LoRA; distil one with --lora, or export it "
            "--to diffusers"
        )


def write(run: FinishedRun, folder: Path, options: Options) -> str:
    """Write the adapters and the scheduler. kohya's layout is written for U-Nets alone."""
    call, base = stock_call(run), base_of(run.content["teacher"])
    write_diffusers(run, folder / LORA_FILE, base.hub)
    also = "kohya's layout is not written for transformers."
    if run.layout.network == "unet":
        write_kohya(run, folder / f"{options.name}.safetensors", options.name)
        also = f"`{options.name}.safetensors` holds the same adapters in kohya's layout, for other programs."
    shutil.copyfile(run.student / SYSTEM_FILE, folder / SYSTEM_FILE)
    call.scheduler.save_pretrained(folder / "scheduler")
    kind = type(call.scheduler).__name__
    missing = "" if base.hub is not None else "  # the pipeline of the teacher named below"
    return f"""\
```python
from diffusers import DiffusionPipeline, {kind}

pipeline = DiffusionPipeline.from_pretrained("{base.hub or "BASE"}"){missing}
pipeline.load_lora_weights("{options.name}", weight_name="{LORA_FILE}")
pipeline.scheduler = {kind}.from_pretrained("{options.name}", subfolder="scheduler")
image = pipeline("a prompt", {call.text()}).images[0]
```

The strength of the LoRA is 1. {also}
"""


def write_diffusers(run: FinishedRun, path: Path, base: str | None) -> None:
    """Write the adapters in diffusers' layout, with the hub id of their base in place of a path of this machine."""
    from safetensors.torch import load_file

    assert run.lora is not None, "require refuses a whole student"
    metadata = read_metadata(run.lora)
    if _SETTINGS in metadata:
        settings = parse_json(metadata[_SETTINGS])
        settings |= {key: base for key in settings if key.endswith("base_model_name_or_path")}
        metadata[_SETTINGS] = json.dumps(settings, indent=2, sort_keys=True)
    write_tensors(path, load_file(run.lora), metadata)
    sort_metadata(path)


def write_kohya(run: FinishedRun, path: Path, title: str) -> None:
    """Write the adapters in kohya's layout. alpha is the rank: the scale of the training is inside ``lora_up``."""
    assert run.lora is not None, "require refuses a whole student"
    pipeline = run.model.pipeline
    changes = read_lora(pipeline, run.lora, str(run.student))
    sdxl = hasattr(pipeline, "text_encoder_2")
    tensors: dict[str, Tensor] = {}
    for change in changes:
        original = unet_layer(change.layer, pipeline.unet.config) if sdxl else None
        name = "lora_unet_" + (original or change.layer).replace(".", "_")
        tensors |= {f"{name}.{part}": tensor for part, tensor in _kohya(change).items()}
    ranks = {len(change.down) for change in changes}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # kohya's word for ranks that differ
    metadata = {
        "format": "pt",
        "modelspec.title": title,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(run.prediction, run.prediction),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ddil.sampling": json.dumps(run.settings, sort_keys=True),
    }
    metadata |= {key: text for key, text in read_metadata(run.lora).items() if key == BASE_SHA256}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, own_memory(tensors), metadata)
    sort_metadata(path)


def _kohya(change: Change) -> dict[str, Tensor]:
    """Return the tensors of one layer. The up matrix of a convolution has two more axes, as a convolution of one pixel.

    kohya's scripts keep matrices of linear layers with two axes.
    """
    up = change.up.view(*change.up.shape, *(1,) * (change.down.ndim - 2))
    return {"lora_down.weight": change.down, "lora_up.weight": up, "alpha": torch.tensor(float(len(change.down)))}
