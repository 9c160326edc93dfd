"""Single-file checkpoints: what a file says of itself, and whether it holds every weight that its configuration asks for.

All of it is read from the file's header, before a weight is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.fit import expected_shapes, more
from ddil_core.models.original import autoencoder_weight, open_clip_weight, unet_layer
from ddil_core.models.weights import AGAIN, components, has_weights, read_header, read_index, read_json, read_metadata
from ddil_core.support.errors import DdilError, WrongCommand

if TYPE_CHECKING:
    from ddil_core.diffusion.parameterization import Prediction

V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
"""Tensors that are only there to be named: trainers mark a model that predicts v, or that has zero terminal SNR, with them."""

_EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_PREDICTIONS: dict[str, Prediction] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}
"""The values of ``modelspec.prediction_type`` that are known."""

_ARCHITECTURES: dict[str, Prediction] = {"768-v": "v_prediction", "v2-512": "epsilon"}
"""What a ``modelspec.architecture`` ends with that tells the prediction, as in ``stable-diffusion-v2-768-v``."""

_CALLED = {
    "unet": "U-Net",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
_UNET, _AUTOENCODERS = "model.diffusion_model.", ("first_stage_model.", "vae.")
_TEXT, _OPEN_CLIP = "text_model.", "model."


def said_prediction(path: Path) -> Prediction | None:
    """What a single file says that its network predicts: by a marker among its tensors, or in its metadata. None if it does not.

    Raises:
        WrongCommand: it says that it was trained with zero terminal SNR or with EDM's preconditioning, that it predicts
            something that is not known here, or two different things.
    """
    header, told = read_header(path), read_metadata(path)
    if ZERO_SNR_KEY in header or told.get("ss_zero_terminal_snr", "").lower() == "true":
        raise WrongCommand(
            f"the file {path} says that its model was trained with zero terminal SNR ({ZERO_SNR_KEY}), which is not known here; "
            "use a model trained without it"
        )
    edm = next((key for key in _EDM_KEYS if key in header), None)
    if edm is not None:
        raise WrongCommand(
            f"the file {path} says that its model was trained with EDM's preconditioning ({edm}), which is not known here; "
            "use a model trained without it"
        )
    said: dict[str, Prediction] = {V_KEY: "v_prediction"} if V_KEY in header else {}
    kind = told.get("modelspec.prediction_type")
    if kind:
        if kind.lower() not in _PREDICTIONS:
            raise WrongCommand(
                f"the file {path} says that its model predicts {kind!r} (modelspec.prediction_type), which is not known here; "
                "use one that predicts epsilon or v"
            )
        said["modelspec.prediction_type"] = _PREDICTIONS[kind.lower()]
    architecture = told.get("modelspec.architecture", "").partition("/")[0]
    for end, one in _ARCHITECTURES.items():
        if architecture.endswith(end):
            said["modelspec.architecture"] = one
    if len(set(said.values())) > 1:
        words = " and ".join(f"{one} ({place})" for place, one in said.items())
        raise WrongCommand(f"the file {path} says that its model predicts {words}; use a copy that says one of them")
    return next(iter(said.values()), None)


def check_checkpoint(path: Path, folder: Path) -> None:
    """Whether a single file holds the weights of the networks that a pipeline's configuration describes, by its header.

    Raises:
        DdilError: it lacks weights, or has some of another shape, or more layers of the U-Net or the autoencoder than
            the configuration has a place for; the message names the part and the first of them.
    """
    header = read_header(path)
    for name, wanted in wanted_weights(folder, header).items():
        part = f"the file {path}"
        missing = [key for key in wanted if key not in header]
        if len(missing) == len(wanted):
            raise DdilError(
                f"{part} holds no {_CALLED.get(name, name)}: {missing[0]}{more(missing)} are not in it; {_WHOLE}"
            )
        if missing:
            raise DdilError(
                f"{part} lacks weights of the {_CALLED.get(name, name)}: {missing[0]} is not in it{more(missing)}; {_WHOLE}"
            )
        wrong = [key for key, shape in wanted.items() if not _same_shape(key, header[key].shape, shape)]
        if wrong:
            raise DdilError(
                f"{part} has weights of another model than {folder}: {wrong[0]} has the shape {list(header[wrong[0]].shape)}, and "
                f"{list(wanted[wrong[0]])} by the configuration of the {_CALLED.get(name, name)}{more(wrong)}; {_CONFIGURED}"
            )
        surplus = _surplus(name, header, wanted)
        if surplus:
            raise DdilError(
                f"{part} has weights that the {_CALLED.get(name, name)} configured in {folder} has no place for: {surplus[0]}"
                f"{more(surplus)}; {_CONFIGURED}"
            )


def wanted_weights(folder: Path, header: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The weights of each network of a pipeline's configuration, by their names in a single file, and their shapes today.

    The names in ``header`` tell which of Stable Diffusion's versions it is, and so what a text encoder is called.
    """
    prefixes, wanted = _prefixes(header), {}
    for name, kind in components(read_index(folder)).items():
        if has_weights(kind[1]):
            config, prefix = read_json(folder / name / "config.json"), prefixes.get(name, f"{name}.")
            shapes = expected_shapes(folder / name, *kind, whose=f"the component {name} of {folder}")
            wanted[name] = {prefix + _original(weight, prefix, config): shape for weight, shape in shapes.items()}
    return wanted


def _prefixes(header: Iterable[str]) -> dict[str, str]:
    """How the names of each component's weights begin in a single file of Stable Diffusion 1, 2 or XL."""
    starts = {".".join(key.split(".")[:2]) + "." for key in header}
    text = f"cond_stage_model.transformer.{_TEXT}"
    if "conditioner.embedders." in starts:
        text = f"conditioner.embedders.0.transformer.{_TEXT}"
    elif f"cond_stage_model.{_OPEN_CLIP}" in starts:
        text = f"cond_stage_model.{_OPEN_CLIP}"
    return {
        "unet": _UNET,
        "vae": _AUTOENCODERS[
            not any(start.startswith(_AUTOENCODERS[0]) for start in starts) and "vae.decoder." in starts
        ],
        "text_encoder": text,
        "text_encoder_2": f"conditioner.embedders.1.{_OPEN_CLIP}",
    }


_CONFIGURED = "name the system or pipeline folder whose layout it has, as in FOLDER:FILE"
_WHOLE = f"{AGAIN}, or {_CONFIGURED}"


def _original(weight: str, prefix: str, config: Mapping[str, Any]) -> str:
    """What a weight, which is called ``weight`` today, is called in a single file behind its prefix."""
    if prefix == _UNET:
        layer, _, end = weight.rpartition(".")
        original = unet_layer(layer, config)
        return weight if original is None else f"{original}.{end}"
    if prefix in _AUTOENCODERS:
        return autoencoder_weight(weight, len(config.get("block_out_channels", ())))
    return open_clip_weight(weight) if prefix.endswith(f".{_OPEN_CLIP}") else weight


def _same_shape(key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """The autoencoder's attention is kept as convolutions of one pixel. ``open_clip`` turns and joins its matrices."""
    if f".{_OPEN_CLIP}" in key:
        return True
    return found == wanted or (key.startswith(_AUTOENCODERS) and found == (*wanted, 1, 1))


def _surplus(component: str, header: Iterable[str], wanted: Mapping[str, Any]) -> list[str]:
    """Layers of the U-Net or the autoencoder that nobody asks for; a text encoder may have a last layer that is not used."""
    coders = tuple(f"{prefix}{half}coder." for prefix in _AUTOENCODERS for half in ("en", "de"))
    prefixes = {"unet": (_UNET,), "vae": coders}.get(component)
    return [key for key in header if key.startswith(prefixes) and key not in wanted] if prefixes else []
