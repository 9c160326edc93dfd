"""What the files of a model say: its layout, its noise process, what it predicts, and how it is sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from ddil_core.diffusion.denoiser import NetworkDenoiser
from ddil_core.diffusion.parameterization import FLOWS, Prediction
from ddil_core.diffusion.schedule import FlowSchedule, Schedule
from ddil_core.diffusion.scheduler_config import FLOW_PREDICTION, is_flow
from ddil_core.models.layouts import LAYOUTS, Layout
from ddil_core.models.memory import latent_channels
from ddil_core.models.sampling import SYSTEM_FILE, Sampling
from ddil_core.models.system_specs import Files
from ddil_core.models.weights import read_index
from ddil_core.support.errors import DdilError


def layout_of(files: Files, reference: str) -> Layout:
    name = read_index(files.folder).get("_class_name")
    if files.system is not None:  # the repository may name a class of its own, as InstaFlow's does
        name = files.system.layout
    if not isinstance(name, str) or name not in LAYOUTS:  # a list names a class of the repository
        raise DdilError(f"the model {reference!r} has the layout {name}; known here are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def process_of(
    files: Files, own_sampling: dict[str, Any], config: dict[str, Any], reference: str, tokens: int
) -> tuple[Schedule, Prediction]:
    """Return the noise schedule and what the network predicts.

    The first of these that names a prediction decides: the single file, the row or ``ddil.json``, the scheduler's
    ``config``. ``tokens`` is the number of tokens of an image.

    Raises:
        WrongCommand: the scheduler's process is not supported.
        DdilError: ``ddil.json`` and the scheduler name different predictions, or the prediction is not supported.
    """
    flow = "flow" if is_flow(config) else "epsilon"  # diffusers' default
    scheduled: Any = config.get("prediction_type") or flow
    if flow == "flow" and scheduled == FLOW_PREDICTION:
        scheduled = flow
    named: Any = files.system.prediction if files.system is not None else own_sampling.get("prediction")
    prediction: Prediction = files.prediction or named or scheduled
    if files.system is None and files.prediction is None and named not in (None, "rectified_flow", scheduled):
        raise DdilError(
            f"the model {reference!r} was trained to predict {named}, and its scheduler/scheduler_config.json says "
            f"{scheduled}; set its prediction_type to {named}"
        )
    if prediction not in get_args(Prediction):
        raise DdilError(
            f"the model {reference!r} predicts {prediction}, which is not supported; the prediction may be "
            f"{', '.join(get_args(Prediction))}"
        )
    if config.get("variance_type") in ("learned", "learned_range"):
        raise DdilError(f"the model {reference!r} also predicts a variance, which is not supported; take another model")
    if prediction not in FLOWS:
        return Schedule.from_config(config), prediction
    if prediction == "rectified_flow":
        return FlowSchedule.straight(), prediction
    if "shift" in own_sampling:  # a student's scheduler has the shift and the end of the student's own grid
        config = config | {"shift": own_sampling["shift"], "shift_terminal": None, "use_dynamic_shifting": False}
    return FlowSchedule.from_config(config, tokens), prediction


def sampling_of(
    files: Files,
    own_sampling: dict[str, Any],
    config: dict[str, Any],
    layout: Layout,
    denoiser: NetworkDenoiser,
    reference: str,
) -> tuple[Sampling, bool]:
    """Return how a model is meant to be sampled, and whether its guidance scale is an assumption.

    Raises:
        DdilError: the settings belong to another model.
    """
    told = denoiser.reads_guidance
    guidance_scale = layout.guidance_scale if told or denoiser.guided_outside else 1.0
    if files.system is not None:
        _require_embedding(denoiser.guidance_width, files.system.w_embedding, reference)
        return Sampling.from_system(files.system, guidance_scale), False
    if not own_sampling:
        sampling = Sampling.from_scheduler(config, guidance_scale)
        if layout.spacing is not None and sampling.solver == "flow_euler":
            sampling = replace(sampling, spacing=layout.spacing)
        return sampling, not told and denoiser.guided_outside
    sampling = Sampling.from_file(own_sampling, f"the file {files.folder / SYSTEM_FILE}")
    channels = latent_channels(denoiser.config)
    if sampling.bounds is not None and len(sampling.bounds.bound) != channels:
        raise DdilError(
            f"the file {files.folder / SYSTEM_FILE} has bounds for {len(sampling.bounds.bound)} channels, and the "
            f"model's latents have {channels}; take the file of this model"
        )
    return sampling, False


def _require_embedding(width: int | None, wanted: int | None, reference: str) -> None:
    """Refuse a network with another guidance embedding than its row in ``systems.yaml`` says.

    Raises:
        DdilError: the widths differ, so these are the files of another system.
    """
    if width != wanted:
        says = "none" if wanted is None else f"one of width {wanted}"
        has = "without a guidance embedding" if width is None else f"with a guidance embedding of width {width}"
        raise DdilError(
            f"the model {reference!r} has a U-Net {has}, and its row in systems.yaml says {says}; "
            "name the files of that system"
        )
