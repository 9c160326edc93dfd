"""LoRA files: every tensor is read into its layer's change or refused by name, and merged as the file says.

A layer's change is ΔW = s · up @ down with the scale s = alpha / rank. The libraries below read the same files through patterns for
a whole network, drop what they do not know with a warning, and lose an alpha of one layer. Here a file is first turned into
one list of changes with the scale folded into ``up``, so that all formats are merged in one way:

- kohya's scripts: ``lora_unet_…``, ``lora_te_…``, ``lora_te1_…``, ``lora_te2_…``, with ``lora_down``, ``lora_up`` and ``alpha``,
- diffusers and PEFT: ``unet.….lora_A.weight``, with the alphas in the file's metadata (1 for alpha / rank where there are none),
- older diffusers: ``….lora.down.weight``, ``….processor.to_q_lora.down.weight``, ``….lora_linear_layer.down.weight``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_core.models.layouts import TEXT_ENCODERS
from ddil_core.models.original import unet_layer
from ddil_core.models.weights import AGAIN, read_header
from ddil_core.support.errors import DdilError

_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
"""How the name of a tensor ends, to what it is of its layer's change."""

_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA's magnitudes",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.(oft_|boft_)|oft_blocks|oft_diag": "OFT",
    r"\.on_input$|\.ia3_": "IA3",
    r"\.[abc][12]?\.weight$|\.bm\.weight$": "GLoRA",
    r"lora_mid|\.lora_cp": "a Tucker decomposition",
    r"\.diff(_b)?$|\.set_weight$": "whole differences of weights",
    r"\.[wb]_norm$": "norm layers",
    r"\.bias(_\w+)?$": "biases",
    r"\.scalar$": "LyCORIS's scalars",
    r"lora_embedding_": "embeddings of words",
    r"^bundle_emb|string_to_param|emb_params": "a textual inversion",
    r"^base_model\.model\.": "a PEFT adapter, whose alpha lies in another file",
}
"""What a tensor's name says of methods other than LoRA, for the sentence that refuses them."""

_KOHYA = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",), "text_encoder_3": ("lora_te3_",)}
_TO_TODAY = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

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
"""PEFT's ``init_lora_weights`` that leave the base as it is. The others train against a changed base."""


@dataclass(frozen=True)
class Change:
    """What a file says of one layer: ΔW = up @ down, the scale folded into ``up``. Both are float32 on the CPU.

    ``down`` is [rank, in, …] as the layer's weight [out, in, …] is, and ``up`` is [out, rank].
    """

    component: str
    layer: str
    down: Tensor
    up: Tensor

    @property
    def delta(self) -> Tensor:
        """ΔW, float32 in the shape of the layer's weight."""
        return (self.up @ self.down.flatten(1)).view(len(self.up), *self.down.shape[1:])


def read_lora(pipeline: Any, path: Path, reference: str) -> list[Change]:
    """Read a LoRA into changes of a pipeline's layers. Nothing of the file is left over.

    Args:
        pipeline: the pipeline that the LoRA goes onto. It is not changed.
        path: the file, safetensors.
        reference: what messages call the pipeline.

    Raises:
        DdilError: the file is damaged or no LoRA, was made for another base, or holds a tensor or a setting that is not read here.
    """
    from safetensors import safe_open

    read_header(path)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
        for (component, layer), part, key in _sorted_out(pipeline, list(file.keys()), path, reference):
            found = parts.setdefault((component, layer), {})
            if part in found:
                raise DdilError(f"the LoRA {path} says twice what the {part} of {component}.{layer} is; {_ANOTHER}")
            found[part] = file.get_tensor(key).float()
    settings = _settings(told, path)
    changes = [
        _change(getattr(pipeline, component).get_submodule(layer), component, layer, found, settings, path, reference)
        for (component, layer), found in parts.items()
    ]
    for component, values in settings.items():
        unused = _unused_patterns(values, [change.layer for change in changes if change.component == component])
        if unused:
            raise DdilError(
                f"the LoRA {path} has a setting for {component}.{unused[0]}, which it does not adapt; {_ANOTHER}"
            )
    return changes


_ANOTHER = "take another copy of it"
ADAPTER = "default_0"
"""What diffusers calls the first adapter that it loads."""


def _sorted_out(pipeline: Any, keys: list[str], path: Path, reference: str) -> list[tuple[tuple[str, str], str, str]]:
    """The layer and the part of each tensor, or one sentence about those that have none."""
    names = layer_names(pipeline)
    network = _network(pipeline)
    split = {key: _split(key) for key in keys}
    unread = [key for key, (_, part) in split.items() if part is None]
    if len(unread) == len(keys):
        what = f"; it holds {_named(unread)}" if unread else ""
        raise DdilError(f"the LoRA {path} adapts nothing of a {network}{what}; name a LoRA of up and down matrices")
    if unread:
        raise DdilError(
            f"the LoRA {path} holds {_named(unread)}, which {'is' if len(unread) == 1 else 'are'} not read here, "
            "and without which it would be another model; name a LoRA of up and down matrices alone"
        )
    absent = list(dict.fromkeys(stem for stem, _ in split.values() if stem not in names))
    if absent:
        stems = {stem for stem, _ in split.values()}
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DdilError(
            f"the LoRA {path} was made for another base than {reference!r}: it has no layer {absent[0].removeprefix(network + '.')}"
            f"{more} of {len(stems)} that the LoRA adapts; take the base that its page names"
        )
    return [(names[stem], part, key) for key, (stem, part) in split.items() if part is not None]


def _split(key: str) -> tuple[str, str | None]:
    """A tensor's layer, as the file calls it, and what it is of the change: down, up, alpha, or None."""
    for ending, part in _ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return key, None


def _named(keys: list[str]) -> str:
    kind = next((f" ({kind})" for pattern, kind in _OTHER_KINDS.items() if re.search(pattern, keys[0])), "")
    return f"{keys[0]}{kind}" + (f" and {len(keys) - 1} more of the like" if len(keys) > 1 else "")


def _network(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def layer_names(pipeline: Any) -> dict[str, tuple[str, str]]:
    """Every name that a LoRA file may give a layer of a pipeline, to its component and its name there."""
    names: dict[str, tuple[str, str]] = {}
    for component in (_network(pipeline), *TEXT_ENCODERS):
        module = getattr(pipeline, component, None)
        if module is None:
            continue
        for layer, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                for name in _names_of(component, layer, getattr(module, "config", {})):
                    if names.setdefault(name, (component, layer)) != (component, layer):
                        raise DdilError(f"two layers of the {component} have the name {name} in LoRA files")
    return names


def _names_of(component: str, layer: str, config: Any) -> Iterator[str]:
    if component in TEXT_ENCODERS:
        bare = layer.removeprefix("text_model.")
        for name in dict.fromkeys((layer, bare, f"text_model.{bare}")):
            yield f"{component}.{name}"
            for prefix in _KOHYA[component]:
                yield prefix + name.replace(".", "_")
            stem, _, last = name.rpartition(".")
            if last in _TO_TODAY:
                yield f"{component}.{stem}.{_TO_TODAY[last]}"
        return
    original = unet_layer(layer, config) if component == "unet" else None
    for name in (layer, re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", layer)):
        yield f"{component}.{name}"
        yield name  # as the older attention processors were saved
    yield "lora_unet_" + layer.replace(".", "_")
    if original is not None:
        yield "lora_unet_" + original.replace(".", "_")


def _change(
    module: nn.Module,
    component: str,
    layer: str,
    found: Mapping[str, Tensor],
    settings: Mapping[str, Mapping[str, Any]],
    path: Path,
    reference: str,
) -> Change:
    """One layer's change, with every number and shape looked at."""
    whose = f"the LoRA {path} has for the layer {component}.{layer}"
    if "down" not in found or "up" not in found:
        raise DdilError(f"{whose} {' and '.join(found)} without {'down' if 'down' not in found else 'up'}; {_ANOTHER}")
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise DdilError(f"{whose} numbers that are not finite; {_ANOTHER}")
    down, up, weight = found["down"], found["up"], module.get_parameter("weight")
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
            f"the LoRA {path} was made for another base than {reference!r}: its layer {layer} is of another width, with down "
            f"{list(down.shape)} and up {list(up.shape)} for {component}'s weight {list(weight.shape)}; take the base that its "
            "page names"
        )
    scale = _scale(component, layer, rank, found.get("alpha"), settings.get(component), path)
    return Change(component, layer, down.view(rank, *inner), scale * up.view(len(weight), rank))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[in, 1, 1] as [in]: a convolution of one pixel is a linear layer, and files keep either as the other."""
    return (shape[0],) if shape and all(size == 1 for size in shape[1:]) else tuple(shape)


def _scale(
    component: str, layer: str, rank: int, alpha: Tensor | None, settings: Mapping[str, Any] | None, path: Path
) -> float:
    """alpha / rank of a layer: from its own alpha, or PEFT's settings, or 1 where the file has neither."""
    if alpha is None and settings is None:
        return 1.0
    if alpha is not None and settings is not None:
        raise DdilError(f"the LoRA {path} has alphas by layer and in its settings for {component}; {_ANOTHER}")
    if settings is not None:
        wanted = _patterned(settings, "rank_pattern", layer, settings["r"])
        if wanted != rank:
            raise DdilError(
                f"the LoRA {path} has the rank {wanted} for {component}.{layer} in its settings and {rank} in its tensors; "
                f"{_ANOTHER}"
            )
    value = _patterned(settings, "alpha_pattern", layer, settings["lora_alpha"]) if settings is not None else alpha
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        raise DdilError(
            f"the LoRA {path} has the alpha {value} for the layer {component}.{layer}, which is no scale: some programs read 0 as "
            f"none and some as the rank; {_ANOTHER}"
        )
    return value / (math.sqrt(rank) if settings is not None and settings.get("use_rslora") else rank)


def _patterned(settings: Mapping[str, Any], name: str, layer: str, default: Any) -> Any:
    """A setting of PEFT for one layer: that of the first pattern that is the end of the layer's name."""
    return next((v for pattern, v in (settings.get(name) or {}).items() if _meant(pattern, layer)), default)


def _meant(pattern: str, layer: str) -> bool:
    names = (layer, f"text_model.{layer}", layer.removeprefix("text_model."))
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)


def _unused_patterns(settings: Mapping[str, Any], layers: list[str]) -> list[str]:
    patterns = {**(settings.get("rank_pattern") or {}), **(settings.get("alpha_pattern") or {})}
    return [pattern for pattern in patterns if not any(_meant(pattern, layer) for layer in layers)]


def _settings(told: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """PEFT's settings of each component, as diffusers keeps them in a file's metadata.

    Raises:
        DdilError: they are damaged, or change more of a network than up and down matrices say.
    """
    if "lora_adapter_metadata" not in told:
        return {}
    from peft import LoraConfig

    settings: dict[str, dict[str, Any]] = {}
    try:
        for name, value in json.loads(told["lora_adapter_metadata"]).items():
            component, _, setting = name.partition(".")
            settings.setdefault(component, {})[setting] = value
        for values in settings.values():
            values["r"], values["lora_alpha"] = int(values["r"]), float(values["lora_alpha"])
            for name in ("rank_pattern", "alpha_pattern"):
                values[name] = {
                    re.compile(key).pattern: float(value) for key, value in (values.get(name) or {}).items()
                }
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise DdilError(
            f"the LoRA {path} has damaged settings in its metadata (lora_adapter_metadata); {AGAIN}"
        ) from error
    usual = LoraConfig()
    for component, values in settings.items():
        for name, value in values.items():
            harmless = name in (*_READ, *_OF_TRAINING) or not value or value == getattr(usual, name, None)
            if not (value in _STARTS if name == "init_lora_weights" else harmless):
                raise DdilError(
                    f"the LoRA {path} was trained with {name} = {value!r} for its {component}, which is not read here; "
                    "name a LoRA of up and down matrices alone"
                )
    return settings


def merge_lora(pipeline: Any, changes: list[Change], path: Path) -> None:
    """Add the changes to the weights of a pipeline: W + ΔW in float32, then in the dtype of the weight.

    Raises:
        DdilError: a sum is not finite in that dtype.
    """
    for change in changes:
        weight = getattr(pipeline, change.component).get_submodule(change.layer).get_parameter("weight")
        summed = (weight.detach().float() + change.delta.to(weight.device)).to(weight.dtype)
        if not bool(summed.isfinite().all()):
            raise DdilError(
                f"the LoRA {path} makes the layer {change.component}.{change.layer} overflow or not finite in {weight.dtype}; "
                "take another dtype or LoRA"
            )
        weight.data.copy_(summed)


def keep_lora(pipeline: Any, changes: list[Change], path: Path) -> None:
    """Put the changes beside the weights of a pipeline, as PEFT's adapters, and compare them with the file.

    All adapters get one rank, filled up with zeros, and the scale 1, so that nothing depends on patterns of names.

    Raises:
        DdilError: what the adapters add is not what the file says.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    said = {(change.component, change.layer): change for change in changes}
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
            change = said.pop((component, layer), None)
            if change is not None:
                _fill(module.lora_A[ADAPTER].weight, change.down)
                _fill(module.lora_B[ADAPTER].weight, change.up)
            added = module.get_delta_weight(ADAPTER).detach().float()
            wanted = torch.zeros(1) if change is None else change.delta
            tolerance = 1e-5 if network.dtype == torch.float32 else 2e-2
            if not float((added - wanted).norm()) <= tolerance * float(wanted.norm()):  # also where one is NaN
                raise DdilError(f"the LoRA {path} cannot be kept beside the weights of {component}.{layer}; merge it")
    if said:
        raise DdilError(f"the LoRA {path} cannot be kept beside the weights of {'.'.join(next(iter(said)))}; merge it")


@torch.no_grad()
def _fill(weight: Tensor, values: Tensor) -> None:
    """Write a matrix of lower rank into an adapter's; the rest is zero."""
    weight.zero_()
    weight[: len(values), : values.shape[1]].copy_(values.view(*values.shape, *(1,) * (weight.ndim - values.ndim)))
