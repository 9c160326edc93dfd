"""Whether the parts of a model fit one another: components, weights and configurations."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from pathlib import Path

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

_RENAMED = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
"""What diffusers called an attention block's weights before, as the autoencoders of 2022 still do."""

_TIED = {"shared.weight": "encoder.embed_tokens.weight"}
"""A weight of a text encoder that has two names, of which a file may have either: T5's words."""


def check_pipeline(files: PipelineFiles, reference: str) -> None:
    """Whether a pipeline's components are of one model and their weights are those of their configurations.

    Raises:
        DdilError: they are not; the message names the component.
    """
    check_sizes(files.folder, reference)
    kinds = components(read_index(files.folder))
    for name, paths in files.components.items():
        check_weights(files.folder / name, kinds[name], paths, f"the component {name} of the model {reference!r}")


def check_sizes(folder: Path, reference: str) -> None:
    """Whether the components of a pipeline are of one model, by the sizes in their configurations.

    Raises:
        DdilError: the text encoders give embeddings of another width than the denoiser takes, the autoencoder gives latents
            of another number of channels, or a tokenizer has more words than its text encoder.
    """
    parts = components(read_index(folder))
    configs = {name: read_json(folder / name / "config.json") for name, (_, kind) in parts.items() if has_weights(kind)}
    unet, vae = configs.get("unet"), configs.get("vae", {})
    texts = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    widths = [text.get("hidden_size", 0) for text in texts]
    if unet is not None:
        wanted, given = unet.get("cross_attention_dim"), sum(widths)
        if isinstance(wanted, int) and texts and wanted != given:
            raise _misfit(
                reference, "unet", f"takes text embeddings of {wanted} numbers", f"text_encoder gives {given}"
            )
        channels, latent = unet.get("in_channels"), vae.get("latent_channels")
        if latent is not None and channels != latent:
            raise _misfit(reference, "vae", f"gives latents of {latent} channels", f"unet takes {channels}")
    for name, config in configs.items():
        if not name.startswith("text_encoder"):
            continue
        tokenizer = name.replace("text_encoder", "tokenizer")
        words, known = _words(folder / tokenizer), config.get("vocab_size", math.inf)
        if words > known:
            raise _misfit(reference, tokenizer, f"has {words} words", f"{name} knows {known}")


def _words(tokenizer: Path) -> int:
    """The size of a tokenizer's vocabulary; 0 where it is kept in a form that is not read here."""
    if (tokenizer / "vocab.json").is_file():
        return len(read_json(tokenizer / "vocab.json"))
    if (tokenizer / "tokenizer.json").is_file():
        return len(read_json(tokenizer / "tokenizer.json").get("model", {}).get("vocab", ()))
    return 0


def _misfit(reference: str, component: str, has: str, other: str) -> DdilError:
    return DdilError(
        f"the component {component} of the model {reference!r} {has}, but its {other}: it is of another model; "
        f"put back the {component} that belongs to it, or {AGAIN}"
    )


def check_weights(folder: Path, kind: tuple[str, str], paths: Iterable[Path], whose: str) -> None:
    """Whether safetensors hold the weights of the network that ``folder/config.json`` describes, by their headers.

    Every weight must be there: the libraries fill in what is missing with random numbers, and say so only in a log.

    Raises:
        DdilError: a weight has another shape, or is missing.
    """
    found = {_today(name): (entry, path) for path in paths for name, entry in read_header(path).items()}
    wanted = expected_shapes(folder, *kind, whose=whose)
    shared = [name for name in wanted if name in found]
    wrong = [name for name in shared if found[name][0].shape != wanted[name]]
    missing = [name for name in wanted if name not in found and _TIED.get(name) not in found]
    if wrong:
        entry, path = found[wrong[0]]
        what = f"{wrong[0]} has the shape {list(entry.shape)} in {path} and {list(wanted[wrong[0]])} by its config.json"
        raise DdilError(f"{whose} has weights of another model: {what}{more(wrong)}; put back its own, or {AGAIN}")
    if missing:
        names = ", ".join(sorted({str(path) for _, path in found.values()})) or str(folder)
        raise DdilError(
            f"{whose} lacks weights: {missing[0]} is not in {names}{more(missing)}; put back its own, or {AGAIN}"
        )


def expected_shapes(folder: Path, library: str, kind: str, whose: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's parameters by its ``config.json`` alone; nothing is allocated.

    Raises:
        DdilError: no such class, or a configuration that it does not take.
    """
    import torch

    network = getattr(importlib.import_module(library), kind, None) if library in LIBRARIES else None
    if network is None:
        raise DdilError(f"{whose} is of the class {library}.{kind}, which is not known here")
    try:
        with torch.device("meta"):
            if library == "diffusers":
                module = network.from_config(read_json(folder / "config.json"))
            else:
                module = network(network.config_class.from_dict(read_json(folder / "config.json")))
    except DdilError:
        raise
    except Exception as error:  # each class has its own complaints about a configuration
        reason = " ".join(str(error).split())[:200]
        raise DdilError(
            f"{whose} has a configuration that does not fit, {folder / 'config.json'}: {reason}; {AGAIN}"
        ) from error
    return {_today(name): tuple(weight.shape) for name, weight in module.named_parameters()}


def _today(name: str) -> str:
    """A weight's name as it is called in today's libraries."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name.removeprefix("text_model.")


def more(names: list[str]) -> str:
    """What a sentence says of the rest of a list whose first it names."""
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
