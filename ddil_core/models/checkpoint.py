"""Single-file checkpoints: the prediction that a file records, and a check that no weight is missing.

Both read only the file's header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.fit import empty_network, expected_shapes, more
from ddil_core.models.original import autoencoder_weight, open_clip_weight, unet_layer
from ddil_core.models.weights import AGAIN, components, has_weights, read_header, read_index, read_json, read_metadata
from ddil_core.support.errors import DdilError, WrongCommand

if TYPE_CHECKING:
    from ddil_core.diffusion.parameterization import Prediction

V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
"""Names of marker tensors. Trainers add them to mark a model that predicts v, or a model with zero terminal SNR."""

_EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_PREDICTIONS: dict[str, Prediction] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}
"""The known values of ``modelspec.prediction_type``."""

_ARCHITECTURES: dict[str, Prediction] = {"768-v": "v_prediction", "v2-512": "epsilon"}
"""Last words of a ``modelspec.architecture`` that imply a prediction, as in ``stable-diffusion-v2-768-v``."""

_NOUNS = {
    "unet": "U-Net",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
_UNET, _AUTOENCODERS = "model.diffusion_model.", ("first_stage_model.", "vae.")
_TEXT, _OPEN_CLIP = "text_model.", "model."


def recorded_prediction(path: Path) -> Prediction | None:
    """Return the prediction that a single file records in a marker tensor or in its metadata. None: it records none.

    Raises:
        WrongCommand: the file records zero terminal SNR, EDM's preconditioning, an unknown prediction or two
            predictions.
    """
    header, metadata = read_header(path), read_metadata(path)
    if ZERO_SNR_KEY in header or metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        raise WrongCommand(
            f"the file {path} says that its model was trained with zero terminal SNR ({ZERO_SNR_KEY}), which is not "
            "supported; use a model trained without it"
        )
    edm = next((key for key in _EDM_KEYS if key in header), None)
    if edm is not None:
        raise WrongCommand(
            f"the file {path} says that its model was trained with EDM's preconditioning ({edm}), which is not "
            "supported; use a model trained without it"
        )
    recorded: dict[str, Prediction] = {V_KEY: "v_prediction"} if V_KEY in header else {}
    kind = metadata.get("modelspec.prediction_type")
    if kind:
        if kind.lower() not in _PREDICTIONS:
            raise WrongCommand(
                f"the file {path} says that its model predicts {kind!r} (modelspec.prediction_type), which is not "
                "supported; use a model that predicts epsilon or v"
            )
        recorded["modelspec.prediction_type"] = _PREDICTIONS[kind.lower()]
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    for ending, prediction in _ARCHITECTURES.items():
        if architecture.endswith(ending):
            recorded["modelspec.architecture"] = prediction
    if len(set(recorded.values())) > 1:
        words = " and ".join(f"{prediction} ({place})" for place, prediction in recorded.items())
        raise WrongCommand(f"the file {path} says that its model predicts {words}; use a copy that says one of them")
    return next(iter(recorded.values()), None)


def check_checkpoint(path: Path, folder: Path) -> None:
    """Check by the header that a single file holds all weights of a pipeline's configuration.

    Raises:
        DdilError: the file lacks weights, has weights of another shape, or has weights of the U-Net or the autoencoder
            that the configuration lacks. The message names the network and the first such weight.
    """
    header, file = read_header(path), f"the file {path}"
    for name, wanted in wanted_weights(folder, header).items():
        noun = _NOUNS.get(name, name)
        missing = [key for key in wanted if key not in header]
        if len(missing) == len(wanted):
            raise DdilError(f"{file} holds no {noun}: {missing[0]}{more(missing)} are not in it; {_WHOLE}")
        if missing:
            raise DdilError(f"{file} lacks weights of the {noun}: {missing[0]} is not in it{more(missing)}; {_WHOLE}")
        wrong = [key for key, shape in wanted.items() if not _same_shape(key, header[key].shape, shape)]
        if wrong:
            raise DdilError(
                f"{file} has weights of another model than {folder}: {wrong[0]} has the shape "
                f"{list(header[wrong[0]].shape)}, and {list(wanted[wrong[0]])} by the configuration of the "
                f"{noun}{more(wrong)}; {_CONFIGURED}"
            )
        surplus = _surplus(name, header, wanted)
        if surplus:
            raise DdilError(
                f"{file} has weights that the {noun} configured in {folder} has no place for: "
                f"{surplus[0]}{more(surplus)}; {_CONFIGURED}"
            )


def wanted_weights(folder: Path, header: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return each network's weights by a pipeline's configuration: names in a single file, and diffusers' shapes.

    The names in ``header`` tell the version of Stable Diffusion, and so the names of its text encoders.
    """
    prefixes, wanted = _prefixes(header), {}
    for name, (library, class_name) in components(read_index(folder)).items():
        if has_weights(class_name):
            config, prefix = read_json(folder / name / "config.json"), prefixes.get(name, f"{name}.")
            empty = empty_network(folder / name, library, class_name, f"the component {name} of {folder}")
            shapes = expected_shapes(empty)
            wanted[name] = {prefix + _original(weight, prefix, config): shape for weight, shape in shapes.items()}
    return wanted


def _prefixes(header: Iterable[str]) -> dict[str, str]:
    """Return the prefix of each component's weights in a single file of Stable Diffusion 1, 2 or XL."""
    starts = {".".join(key.split(".")[:2]) + "." for key in header}
    short = "vae.decoder." in starts and not any(start.startswith(_AUTOENCODERS[0]) for start in starts)
    text = f"cond_stage_model.transformer.{_TEXT}"
    if "conditioner.embedders." in starts:
        text = f"conditioner.embedders.0.transformer.{_TEXT}"
    elif f"cond_stage_model.{_OPEN_CLIP}" in starts:
        text = f"cond_stage_model.{_OPEN_CLIP}"
    return {
        "unet": _UNET,
        "vae": _AUTOENCODERS[1 if short else 0],
        "text_encoder": text,
        "text_encoder_2": f"conditioner.embedders.1.{_OPEN_CLIP}",
    }


_CONFIGURED = "name a system or a pipeline folder of the same layout, as in FOLDER:FILE"
_WHOLE = f"{AGAIN}, or {_CONFIGURED}"


def _original(weight: str, prefix: str, config: Mapping[str, Any]) -> str:
    """Return the name after the prefix, in a single file, of a weight that diffusers calls ``weight``."""
    if prefix == _UNET:
        layer, _, end = weight.rpartition(".")
        original = unet_layer(layer, config)
        return weight if original is None else f"{original}.{end}"
    if prefix in _AUTOENCODERS:
        return autoencoder_weight(weight, len(config.get("block_out_channels", ())))
    return open_clip_weight(weight) if prefix.endswith(f".{_OPEN_CLIP}") else weight


def _same_shape(key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Compare shapes. Single files store an autoencoder's attention as convolutions of one pixel."""
    if f".{_OPEN_CLIP}" in key:  # open_clip transposes and joins matrices
        return True
    return shape == wanted or (key.startswith(_AUTOENCODERS) and shape == (*wanted, 1, 1))


def _surplus(component: str, header: Iterable[str], wanted: Mapping[str, object]) -> list[str]:
    """Return weights of the U-Net or the autoencoder that the configuration lacks.

    A text encoder may have an unused last layer, so its weights are not compared.
    """
    coders = tuple(f"{prefix}{half}coder." for prefix in _AUTOENCODERS for half in ("en", "de"))
    prefixes = {"unet": (_UNET,), "vae": coders}.get(component)
    return [key for key in header if key.startswith(prefixes) and key not in wanted] if prefixes else []
