"""Find the configuration for a single-file checkpoint, which holds only weights."""

from __future__ import annotations

from pathlib import Path

from ddil_core.models.checkpoint import recorded_prediction
from ddil_core.models.hub import HubPart, Repository
from ddil_core.models.system_specs import Files, SystemSpec, load_systems
from ddil_core.models.weights import PICKLES, read_header
from ddil_core.support.errors import WrongCommand

_SYSTEMS = {
    "conditioner.embedders.1.model.": "sdxl",
    "cond_stage_model.model.": "sd21",
    "cond_stage_model.transformer.": "sd15",
}
"""First words of a text encoder's weights in a single file, and the system with the configuration that fits.

Models with the prefix of Stable Diffusion 2 predict v or ε. Few files say which (``recorded_prediction``). A user must
name the system if the file does not say that its model predicts v.
"""


def resolve_single_file(path: Path, config: Path | None, reference: str, row: SystemSpec | None = None) -> Files:
    """Return the files of a checkpoint that holds all weights of a pipeline.

    Args:
        path: The checkpoint.
        config: A folder in diffusers' pipeline layout with the configuration. None chooses a system's by the names of
            the weights.
        reference: The name of the model in messages.
        row: The system that the user names. None: no system.

    Raises:
        WrongCommand: the file holds no whole pipeline, or its configuration is unclear or not here.
    """
    header = read_header(require_safetensors(path))
    system = next((name for prefix, name in _SYSTEMS.items() if any(key.startswith(prefix) for key in header)), None)
    if system is None:
        raise WrongCommand(
            f"the file {path} holds no text encoder as Stable Diffusion's single files do, so it is no whole model; "
            "a U-Net or a LoRA goes onto a system, as in dmd2:FILE or lcm-lora:FILE"
        )
    prediction = recorded_prediction(path)
    if row is not None and prediction is not None and row.prediction in ("flow", "rectified_flow"):
        raise WrongCommand(
            f"the model {reference!r} is sampled as a flow, and the file {path} says that it predicts {prediction}; "
            "name another system"
        )
    if config is None and row is None and system == "sd21" and prediction != "v_prediction":
        if prediction is not None:
            raise WrongCommand(
                f"the file {path} is one of Stable Diffusion 2 and says that it predicts {prediction}, and no system "
                f"has such settings; name a pipeline folder of that model, as in FOLDER:{path}"
            )
        raise WrongCommand(
            f"the file {path} is one of Stable Diffusion 2, and does not say whether it predicts v or ε; name the "
            f"system with the same settings, as in sd21:{path} for v at 768 pixels, or a pipeline folder, as in "
            f"FOLDER:{path}"
        )
    if config is None:
        row = row or load_systems()[system]
        config = HubPart(Repository(str(row.source), row.revision)).path()
    if config is None:
        raise WrongCommand(
            f"the file {path} holds only weights, and the configuration of {system} that it needs is not here; get it "
            f"with: ddil models download {system} --config-only, or name a pipeline of the same layout, as in "
            f"FOLDER:{path}"
        )
    return Files(config, system=row, checkpoint=path, prediction=prediction)


def require_safetensors(path: Path) -> Path:
    """Return ``path``.

    Raises:
        WrongCommand: the file is a pickle or no file of weights.
    """
    if path.suffix in PICKLES:
        out = path.with_suffix(".safetensors")
        raise WrongCommand(
            f"{path} is a pickle, which can run code; turn it into safetensors with: ddil models convert {path} {out}"
        )
    if path.suffix != ".safetensors":
        raise WrongCommand(f"{path} is no file of weights; name one that ends in .safetensors")
    return path
