"""LoRA files: read every tensor into the change of a layer, or refuse it, and merge the changes into the weights.

The change of a layer is ΔW = s · up @ down with the scale s = alpha / rank. diffusers and PEFT read these files through
patterns for a whole network. They drop unknown tensors with a warning and lose the alpha of a single layer. Here a file
first becomes a list of changes, with the scale inside ``up``. So all formats are merged in the same way:

- kohya's scripts: ``lora_unet_…``, ``lora_te_…``, ``lora_te1_…``, ``lora_te2_…``, with ``lora_down``, ``lora_up``,
  ``alpha``,
- diffusers and PEFT: ``unet.….lora_A.weight``. The alphas are in the file's metadata. Without them alpha / rank is 1,
- older diffusers: ``….lora.down.weight``, ``….processor.to_q_lora.down.weight``, ``….lora_linear_layer.down.weight``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.models.fit import more
from ddil_core.models.lora_names import describe_tensors, layer_names, network_name, split_name
from ddil_core.models.weights import AGAIN, read_header
from ddil_core.support.errors import DdilError
from ddil_core.support.outside import parse_json

_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_OF_TRAINING = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of PEFT's ``init_lora_weights`` that keep the weights of the base. The other values change the base."""

BASE_SHA256 = "ddil.base_sha256"
"""The key of a LoRA's metadata with the hash of the weights that it was trained on (``weights_sha256``)."""

_ALPHAS = ("ss_network_alpha", "network_alphas", "network_alpha", "lora_alpha", "alpha")
"""Names in a file's metadata under which programs keep an alpha of the whole file."""


@dataclass(frozen=True)
class Change:
    """The change of one layer: ΔW = up @ down. The matrices are float32 on the CPU.

    Attributes:
        component: The name of the network in the pipeline, such as ``unet``.
        layer: The name of the layer in the network.
        down: [rank, in, …], with the axes after ``in`` of the layer's weight [out, in, …].
        up: [out, rank], with the scale alpha / rank inside.
    """

    component: str
    layer: str
    down: Tensor
    up: Tensor

    @property
    def delta(self) -> Tensor:
        """ΔW in the shape of the layer's weight, float32."""
        return (self.up @ self.down.flatten(1)).view(len(self.up), *self.down.shape[1:])


def read_lora(pipeline: Any, path: Path, reference: str) -> list[Change]:
    """Read a LoRA file into changes of a pipeline's layers. Use every tensor of the file.

    Args:
        pipeline: The pipeline that the LoRA adapts. It is not changed.
        path: The file (safetensors).
        reference: The name of the pipeline in messages.

    Raises:
        DdilError: the file is damaged or no LoRA, belongs to another base, or holds an unsupported tensor or setting.
    """
    from safetensors import safe_open

    read_header(path)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for (component, layer), part, key in _assign_tensors(pipeline, list(file.keys()), path, reference):
            tensors = parts.setdefault((component, layer), {})
            if part in tensors:
                raise DdilError(f"the LoRA {path} holds the {part} of {component}.{layer} twice; {_ANOTHER}")
            tensor = file.get_tensor(key)
            if part != "alpha" and not tensor.is_floating_point():
                raise DdilError(f"the LoRA {path} holds {key} in {tensor.dtype}, which is no matrix; {_ANOTHER}")
            tensors[part] = tensor.float()
    settings = _settings(metadata, network_name(pipeline), path)
    for (component, layer), tensors in parts.items():
        if "alpha" not in tensors and component not in settings:
            _require_no_alpha(metadata, component, layer, tensors.get("down"), path)
    changes = [
        _change(getattr(pipeline, component).get_submodule(layer), component, layer, tensors, settings, path, reference)
        for (component, layer), tensors in parts.items()
    ]
    for component, values in settings.items():
        if not any(change.component == component for change in changes):
            raise DdilError(f"the LoRA {path} has settings for {component}, which it does not adapt; {_ANOTHER}")
        unused = _unused_patterns(values, [change.layer for change in changes if change.component == component])
        if unused:
            raise DdilError(
                f"the LoRA {path} has a setting for {component}.{unused[0]}, which it does not adapt; {_ANOTHER}"
            )
    return changes


_ANOTHER = "take another copy of it"
ADAPTER = "default_0"
"""diffusers' name of the first adapter."""


def _assign_tensors(
    pipeline: Any, keys: list[str], path: Path, reference: str
) -> list[tuple[tuple[str, str], str, str]]:
    """Return ((component, layer), part, key) for each tensor.

    Raises:
        DdilError: a tensor is no part of a LoRA, or belongs to no layer of the pipeline.
    """
    names = layer_names(pipeline)
    network = network_name(pipeline)
    split = {key: split_name(key) for key in keys}
    unknown = [key for key, (_, part) in split.items() if part is None]
    if len(unknown) == len(keys):
        what = f"; it holds {describe_tensors(unknown)}" if unknown else ""
        raise DdilError(f"the LoRA {path} adapts nothing of a {network}{what}; name a LoRA of up and down matrices")
    if unknown:
        raise DdilError(
            f"the LoRA {path} holds {describe_tensors(unknown)}, which {'is' if len(unknown) == 1 else 'are'} not "
            "supported; without such tensors the LoRA would give another model; name a LoRA of only up and down "
            "matrices"
        )
    absent = list(dict.fromkeys(stem for stem, _ in split.values() if stem not in names))
    if absent:
        stems = {stem for stem, _ in split.values()}
        layer = absent[0].removeprefix(f"{network}.")
        raise DdilError(
            f"the LoRA {path} was made for another base than {reference!r}: the base has no layer "
            f"{layer}{more(absent)} of {len(stems)} that the LoRA adapts; take the base that the LoRA's page names"
        )
    return [(names[stem], part, key) for key, (stem, part) in split.items() if part is not None]


def _change(
    module: nn.Module,
    component: str,
    layer: str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Mapping[str, Any]],
    path: Path,
    reference: str,
) -> Change:
    """Make the change of one layer. Check every number and shape."""
    start = f"the LoRA {path} has for the layer {component}.{layer}"
    if "down" not in tensors or "up" not in tensors:
        missing = "down" if "down" not in tensors else "up"
        raise DdilError(f"{start} {' and '.join(tensors)} without {missing}; {_ANOTHER}")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise DdilError(f"{start} numbers that are not finite; {_ANOTHER}")
    down, up, weight = tensors["down"], tensors["up"], module.get_parameter("weight")
    rank = len(down) if down.ndim else 0
    inner = weight.shape[1:]
    fits = (
        rank > 0
        and up.shape[:2] == (len(weight), rank)
        and all(size == 1 for size in up.shape[2:])
        and _squeezed(down.shape[1:]) == _squeezed(inner)
    )
    if not fits:
        raise DdilError(
            f"the LoRA {path} was made for another base than {reference!r}: its layer {layer} has another width, with "
            f"down {list(down.shape)} and up {list(up.shape)} for {component}'s weight {list(weight.shape)}; take the "
            "base that the LoRA's page names"
        )
    scale = _scale(component, layer, rank, tensors.get("alpha"), settings.get(component), path)
    return Change(component, layer, down.view(rank, *inner), scale * up.view(len(weight), rank))


def _require_no_alpha(metadata: Mapping[str, str], component: str, layer: str, down: Tensor | None, path: Path) -> None:
    """Refuse a layer without an alpha in a file whose metadata name an alpha that is not the layer's rank.

    The scale is 1 without an alpha. Programs that read these metadata would take another.

    Raises:
        DdilError: the metadata name such an alpha.
    """
    rank = len(down) if down is not None and down.ndim else 0
    for name in _ALPHAS:
        if name in metadata and metadata[name] not in (str(rank), str(float(rank))):
            raise DdilError(
                f"the LoRA {path} has the {name} {metadata[name][:80]} in its metadata, and no alpha with the layer "
                f"{component}.{layer} of rank {rank}, so that its scale is not known; {_ANOTHER}"
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return [in] for [in, 1, 1]: files may store a convolution of one pixel as a linear layer, and the reverse."""
    return (shape[0],) if shape and all(size == 1 for size in shape[1:]) else tuple(shape)


def _scale(
    component: str, layer: str, rank: int, alpha: Tensor | None, settings: Mapping[str, Any] | None, path: Path
) -> float:
    """Return alpha / rank of a layer. alpha is the layer's tensor or in PEFT's settings. Without an alpha, return 1."""
    if alpha is None and settings is None:
        return 1.0
    if alpha is not None and settings is not None:
        raise DdilError(f"the LoRA {path} has alphas by layer and in its settings for {component}; {_ANOTHER}")
    if settings is not None:
        wanted = _patterned(settings, "rank_pattern", layer, settings["r"])
        if wanted != rank:
            raise DdilError(
                f"the LoRA {path} has the rank {wanted} for {component}.{layer} in its settings and {rank} in its "
                f"tensors; {_ANOTHER}"
            )
    value = _patterned(settings, "alpha_pattern", layer, settings["lora_alpha"]) if settings is not None else alpha
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        raise DdilError(
            f"the LoRA {path} has the alpha {value} for the layer {component}.{layer}, which is no scale: some "
            f"programs read 0 as none and some as the rank; {_ANOTHER}"
        )
    return value / (math.sqrt(rank) if settings is not None and settings.get("use_rslora") else rank)


def _patterned(settings: Mapping[str, Any], name: str, layer: str, default: Any) -> Any:
    """Return the value of the first of PEFT's patterns that matches the end of a layer's name, or the default."""
    return next((v for pattern, v in (settings.get(name) or {}).items() if _matches(pattern, layer)), default)


def _matches(pattern: str, layer: str) -> bool:
    names = (layer, f"text_model.{layer}", layer.removeprefix("text_model."))
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)


def _unused_patterns(settings: Mapping[str, Any], layers: list[str]) -> list[str]:
    patterns = {**(settings.get("rank_pattern") or {}), **(settings.get("alpha_pattern") or {})}
    return [pattern for pattern in patterns if not any(_matches(pattern, layer) for layer in layers)]


def _pattern(key: str) -> str:
    """Return PEFT's pattern of layers. Raises ValueError where matching it could take very long."""
    if len(key) > 200 or len(re.findall(r"[*+{]", key)) > 3 or re.search(r"\)[*+{]", key):
        raise ValueError("a pattern repeats a repetition")
    return re.compile(key).pattern


def _settings(metadata: Mapping[str, str], network: str, path: Path) -> dict[str, dict[str, Any]]:
    """Return PEFT's settings of each component from a file's metadata, where diffusers writes them.

    Settings without a component, as ``save_lora_adapter`` writes them, are those of the ``network``.

    Raises:
        DdilError: the settings are damaged, or change a network by more than up and down matrices.
    """
    if "lora_adapter_metadata" not in metadata:
        return {}
    from peft import LoraConfig

    settings: dict[str, dict[str, Any]] = {}
    try:
        for name, value in parse_json(metadata["lora_adapter_metadata"]).items():
            component, _, setting = name.rpartition(".")
            settings.setdefault(component or network, {})[setting] = value
        for values in settings.values():
            values["r"], values["lora_alpha"] = int(values["r"]), float(values["lora_alpha"])
            for name in ("rank_pattern", "alpha_pattern"):
                values[name] = {_pattern(key): float(value) for key, value in (values.get(name) or {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise DdilError(
            f"the LoRA {path} has damaged settings in its metadata (lora_adapter_metadata); {AGAIN}"
        ) from error
    default = LoraConfig()
    for component, values in settings.items():
        for name, value in values.items():
            harmless = name in (*_READ, *_OF_TRAINING) or not value or value == getattr(default, name, None)
            if not (value in _STARTS if name == "init_lora_weights" else harmless):
                raise DdilError(
                    f"the LoRA {path} was trained with {name} = {value!r} for its {component}, which is not supported; "
                    "name a LoRA of only up and down matrices"
                )
    return settings


def merge_lora(pipeline: Any, changes: list[Change], path: Path) -> None:
    """Add the changes to the weights of a pipeline. Add in float32, then round to the dtype of the weight.

    Raises:
        DdilError: a sum is not finite in that dtype.
    """
    for change in changes:
        weight = getattr(pipeline, change.component).get_submodule(change.layer).get_parameter("weight")
        summed = (weight.detach().float() + change.delta.to(weight.device)).to(weight.dtype)
        if not bool(summed.isfinite().all()):
            raise DdilError(
                f"the LoRA {path} makes the layer {change.component}.{change.layer} overflow or not finite in "
                f"{weight.dtype}; take another dtype or LoRA"
            )
        weight.data.copy_(summed)


def keep_lora(pipeline: Any, changes: list[Change], path: Path) -> None:
    """Put the changes beside the weights of a pipeline as PEFT's adapters, and compare what they add with the changes.

    All adapters of a network get the largest rank (filled up with zeros) and the scale 1, so no pattern of names
    matters.

    Raises:
        DdilError: an adapter adds something else than its change.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    left = {(change.component, change.layer): change for change in changes}
    for component in {change.component for change in changes}:
        own = [change for change in changes if change.component == component]
        rank = max(len(change.down) for change in own)
        network = getattr(pipeline, component)
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=[change.layer for change in own])
        inject_adapter_in_model(settings, network, adapter_name=ADAPTER)
        adapters: dict[str, Any] = {
            layer: module for layer, module in network.named_modules() if isinstance(module, LoraLayer)
        }
        for layer, module in adapters.items():
            change = left.pop((component, layer), None)
            if change is not None:
                _fill(module.lora_A[ADAPTER].weight, change.down)
                _fill(module.lora_B[ADAPTER].weight, change.up)
            added = module.get_delta_weight(ADAPTER).detach().float()
            wanted = torch.zeros(1) if change is None else change.delta
            tolerance = 1e-5 if network.dtype == torch.float32 else 2e-2
            if not float((added - wanted).norm()) <= tolerance * float(wanted.norm()):  # also refuses NaN
                raise DdilError(f"the LoRA {path} cannot be kept beside the weights of {component}.{layer}; merge it")
    if left:
        raise DdilError(f"the LoRA {path} cannot be kept beside the weights of {'.'.join(next(iter(left)))}; merge it")


@torch.no_grad()
def _fill(weight: Tensor, values: Tensor) -> None:
    """Write a matrix into an adapter's matrix of the same or a higher rank. Set the rest to zero."""
    weight.zero_()
    weight[: len(values), : values.shape[1]].copy_(values.view(*values.shape, *(1,) * (weight.ndim - values.ndim)))
