"""Check that the components, weights and configurations of a model fit each other."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.weights import (
    AGAIN,
    LIBRARIES,
    PipelineFiles,
    components,
    has_weights,
    read_header,
    read_index,
    read_json,
)
from ddil_core.support.errors import DdilError
from ddil_core.support.misfits import value_text

if TYPE_CHECKING:
    from torch import nn

_RENAMED = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
"""diffusers' old and new names of an attention block's weights. Autoencoders of 2022 have the old names."""

_TIED = {"shared.weight": "encoder.embed_tokens.weight"}
"""A weight of T5 that has two names. A file may have either name."""


def check_pipeline(files: PipelineFiles, empty: Any, reference: str) -> None:
    """Check that a pipeline's weights fit its configurations.

    Args:
        files: The files of weights.
        empty: The pipeline with networks without weights (``loading.empty_pipeline``).
        reference: The name of the model in messages.

    Raises:
        DdilError: they do not. The message names the component.
    """
    for name, paths in files.components.items():
        check_weights(getattr(empty, name), paths, f"the component {name} of the model {reference!r}")


def check_sizes(folder: Path, reference: str) -> None:
    """Check by the sizes in the configurations that the components of a pipeline belong to one model.

    Raises:
        DdilError: the width of the text embeddings, the number of channels of the latents, or the size of a vocabulary
            differs between two components.
    """
    parts = components(read_index(folder))
    networks = [name for name, (_, class_name) in parts.items() if has_weights(class_name)]
    configs = {name: read_json(folder / name / "config.json") for name in networks}
    unet, vae = configs.get("unet"), configs.get("vae", {})
    texts = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    widths = [_whole(text, "hidden_size", reference) or 0 for text in texts]
    if unet is not None:
        wanted, given = unet.get("cross_attention_dim"), sum(widths)
        if isinstance(wanted, int) and texts and wanted != given:
            raise _misfit(
                reference, "unet", f"takes text embeddings of {wanted} numbers", f"text_encoder gives {given}"
            )
        channels, latent = (_whole(*part, reference) for part in ((unet, "in_channels"), (vae, "latent_channels")))
        if latent is not None and channels != latent:
            raise _misfit(reference, "vae", f"gives latents of {latent} channels", f"unet takes {channels}")
    for name, config in configs.items():
        if not name.startswith("text_encoder"):
            continue
        tokenizer = name.replace("text_encoder", "tokenizer")
        words, known = _words(folder / tokenizer), _whole(config, "vocab_size", reference) or math.inf
        if words > known:
            raise _misfit(reference, tokenizer, f"has {words} words", f"{name} knows {known}")


def _whole(config: dict[str, Any], key: str, reference: str) -> int | None:
    """Return a whole number of a configuration, or None where it has no such key. Raises DdilError: it is none."""
    value = config.get(key)
    if value is not None and type(value) is not int:
        raise DdilError(
            f"a configuration of the model {reference!r} has the {key} {value_text(value)}, which is no whole number; "
            f"{AGAIN}"
        )
    return value


def _words(tokenizer: Path) -> int:
    """Return the size of a tokenizer's vocabulary, or 0 for a file format that is not supported."""
    if (tokenizer / "vocab.json").is_file():
        return len(read_json(tokenizer / "vocab.json"))
    if (tokenizer / "tokenizer.json").is_file():
        model = read_json(tokenizer / "tokenizer.json").get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list):
            raise DdilError(f"the file {tokenizer / 'tokenizer.json'} of the model names no vocabulary; {AGAIN}")
        return len(vocabulary)
    return 0


def _misfit(reference: str, component: str, has: str, other: str) -> DdilError:
    return DdilError(
        f"the component {component} of the model {reference!r} {has}, but its {other}: the {component} is of another "
        f"model; put back the {component} that belongs to this model, or {AGAIN}"
    )


def check_weights(empty: nn.Module, paths: Sequence[Path], owner: str) -> None:
    """Check by the headers that safetensors hold all weights of a network.

    diffusers and transformers fill a missing weight with random numbers and only log it, so a missing weight is refused
    here.

    Args:
        empty: The network without weights (``empty_network``).
        paths: The files of weights.
        owner: What messages call the network.

    Raises:
        DdilError: a weight has another shape, or is missing.
    """
    stored = {_today(name): (entry, path) for path in paths for name, entry in read_header(path).items()}
    wanted = expected_shapes(empty)
    shared = [name for name in wanted if name in stored]
    wrong = [name for name in shared if stored[name][0].shape != wanted[name]]
    missing = [name for name in wanted if name not in stored and _TIED.get(name) not in stored]
    if wrong:
        entry, path = stored[wrong[0]]
        what = f"{wrong[0]} has the shape {list(entry.shape)} in {path} and {list(wanted[wrong[0]])} by its config.json"
        raise DdilError(f"{owner} has weights of another model: {what}{more(wrong)}; put back its own, or {AGAIN}")
    if missing:
        names = ", ".join(sorted(map(str, paths)))
        raise DdilError(
            f"{owner} lacks weights: {missing[0]} is not in {names}{more(missing)}; put back its own, or {AGAIN}"
        )


def empty_network(folder: Path, library: str, class_name: str, owner: str) -> nn.Module:
    """Return the network that ``folder/config.json`` describes, on torch's meta device: with shapes, without weights.

    Raises:
        DdilError: there is no such class, or the class refuses the configuration.
    """
    import torch

    network = getattr(importlib.import_module(library), class_name, None) if library in LIBRARIES else None
    if network is None:
        raise DdilError(f"{owner} is of the class {library}.{class_name}, which is not supported")
    try:
        with torch.device("meta"):
            config = read_json(folder / "config.json")
            if library == "transformers":
                module: nn.Module = network(network.config_class.from_dict(config))
            else:
                module = network.from_config(config)
    except DdilError:
        raise
    except Exception as error:  # each class raises errors of its own
        reason = " ".join(str(error).split())[:200]
        raise DdilError(
            f"{owner} has a configuration that does not fit, {folder / 'config.json'}: {reason}; {AGAIN}"
        ) from error
    return module


def expected_shapes(empty: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a network (``empty_network``), by its name in today's libraries."""
    return {_today(name): tuple(weight.shape) for name, weight in empty.named_parameters()}


def _today(name: str) -> str:
    """Return a weight's name in today's libraries."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name.removeprefix("text_model.")


def more(names: list[str]) -> str:
    """Return ", and N more" for a list if a message names only the first."""
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
