"""Load diffusers' pipeline from a model's local files: check the files first, and run no code of the model."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_core.models.checkpoint import check_checkpoint
from ddil_core.models.config_files import require_plain_configs
from ddil_core.models.fit import check_pipeline, check_sizes, check_weights, empty_network
from ddil_core.models.hub import require_blob
from ddil_core.models.lora import BASE_SHA256, keep_lora, merge_lora, read_lora
from ddil_core.models.references import check_files, cure, weights_sha256
from ddil_core.models.system_specs import Files
from ddil_core.models.weights import (
    UNUSED,
    PipelineFiles,
    components,
    network_folders,
    read_index,
    read_json,
    read_metadata,
)
from ddil_core.support.checksums import MANIFEST, SUFFIX, require_checksum
from ddil_core.support.errors import DdilError
from ddil_core.support.progress import warn

if TYPE_CHECKING:
    import torch


CHANGED = (
    f"copy or make the model again; if you changed the file yourself, delete {MANIFEST} in the folder of the model"
)
CHANGED_FILE = f"copy or make it again; if you changed it yourself, delete the file that ends in {SUFFIX}"


def empty_pipeline(files: Files, reference: str, kind: str, library: str = "diffusers") -> Any:
    """Return a pipeline whose networks have shapes and no weights, on torch's meta device. Tokenizers are left out.

    Only configurations are read: their components belong together, and ask for no code from elsewhere.

    Args:
        files: The files of the model.
        reference: The name of the model in messages.
        kind: The name of the pipeline class.
        library: The module of the pipeline class.

    Raises:
        DdilError: configurations are missing or damaged, or do not fit each other.
    """
    folder, index = files.folder, read_index(files.folder)
    kinds = components(index)
    with cure(reference):
        networks = network_folders(folder, reference)
    require_plain_configs(folder, reference)
    check_sizes(folder, reference)
    pipeline_class = _pipeline_class(kind, library, reference)
    parts: dict[str, Any] = {
        name: empty_network(path, *kinds[name], owner=f"the component {name} of the model {reference!r}")
        for name, path in networks.items()
    }
    parts |= {name: None for name, (_, class_name) in kinds.items() if "Tokenizer" in class_name}
    scheduler = _scheduler_class(kinds, reference)
    with _damage(files, reference):
        parts["scheduler"] = scheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        named = inspect.signature(pipeline_class.__init__).parameters
        told = {key: value for key, value in index.items() if key in named and not isinstance(value, list)}
        return pipeline_class(**(told | _absent_components(pipeline_class, folder) | parts))


def load_pipeline(
    files: Files,
    reference: str,
    kind: str,
    dtype: torch.dtype,
    variant: str | None = None,
    *,
    fuse_lora: bool = True,
    library: str = "diffusers",
    empty: Any = None,
) -> Any:
    """Load a pipeline from local files, on the CPU.

    Configurations, a LoRA, headers and checksums are checked in this order before a weight of the pipeline is read. So
    cut files, a LoRA for another base and weights of another model are refused early. Students, shipped models,
    converted models and files of the hub's cache have checksums.

    Args:
        files: The files of the model.
        reference: The name of the model in messages.
        kind: The name of the pipeline class.
        dtype: The dtype of the weights in memory.
        variant: The set of weights to read, such as ``fp16``. None: the plain files, or the only variant.
        fuse_lora: Merge a LoRA into the weights. False keeps the LoRA beside the weights as adapters.
        library: The module of the pipeline class.
        empty: What ``empty_pipeline`` returns, where it is there already.

    Raises:
        WrongCommand: no component has the variant.
        DdilError: files are missing or damaged, or do not fit each other.
    """
    empty = empty_pipeline(files, reference, kind, library) if empty is None else empty
    with cure(reference):
        changes = [] if files.lora is None else read_lora(empty, files.lora, reference)
    weights = _check_weights(files, empty, reference, variant)
    _require_checksums(files, weights, reference)
    if files.lora is not None:
        _compare_base(files, reference, variant)
    with _damage(files, reference):
        pipeline = _read_pipeline(_pipeline_class(kind, library, reference), files, weights.variant, dtype)
        if files.unet is not None:
            from safetensors.torch import load_file

            pipeline.unet.load_state_dict(load_file(files.unet))
        if files.lora is not None:
            add_lora = merge_lora if fuse_lora else keep_lora
            add_lora(pipeline, changes, files.lora)
    return pipeline


def _pipeline_class(kind: str, library: str, reference: str) -> Any:
    """Return a pipeline class. Raises DdilError: the library has no such class."""
    import diffusers

    pipeline_class = getattr(importlib.import_module(library), kind, None)
    if pipeline_class is None:
        raise DdilError(
            f"the model {reference!r} has the layout {kind}, and diffusers {diffusers.__version__} has no such "
            "pipeline class; install a version of diffusers that has it"
        )
    return pipeline_class


def _scheduler_class(kinds: Mapping[str, tuple[str, str]], reference: str) -> Any:
    """Return the class of a pipeline's scheduler, by its components' classes. Any other class could read weights.

    Raises:
        DdilError: there is no scheduler, or its class is no scheduler of diffusers.
    """
    import diffusers

    name = kinds.get("scheduler", ("", "none"))[1]
    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise DdilError(
            f"the scheduler of the model {reference!r} is {name} by its model_index.json, which is no scheduler of "
            f"diffusers {diffusers.__version__}; name the scheduler's class there"
        )
    return scheduler


@contextmanager
def _damage(files: Files, reference: str) -> Iterator[None]:
    """Say in one sentence that a model cannot be loaded. Each library raises errors of its own for a damaged file."""
    try:
        yield
    except DdilError:
        raise
    except Exception as error:
        raise DdilError(
            f"the model {reference!r} cannot be loaded from {files.checkpoint or files.folder}: "
            f"{' '.join(str(error).split())[:200]}; its files are damaged or incomplete, so fetch or make the model "
            "again"
        ) from error


def _read_pipeline(pipeline_class: Any, files: Files, variant: str | None, dtype: torch.dtype) -> Any:
    options = _absent_components(pipeline_class, files.folder) | {"dtype": dtype, "local_files_only": True}
    if files.checkpoint is None:
        return pipeline_class.from_pretrained(files.folder, variant=variant, use_safetensors=True, **options)
    # The configuration is a folder: diffusers would fetch a hub id even with local_files_only.
    pipeline = pipeline_class.from_single_file(str(files.checkpoint), config=str(files.folder), **options)
    if files.prediction is not None:  # the file's own note counts more than the system's configuration
        pipeline.scheduler.register_to_config(prediction_type=files.prediction)
    return pipeline


def _check_weights(files: Files, empty: Any, reference: str, variant: str | None) -> PipelineFiles:
    """Check by headers that all weights are here, whole and of one model."""
    weights = check_files(files, reference, variant)
    if files.checkpoint is None:
        check_pipeline(weights, empty, reference)
    else:
        check_checkpoint(files.checkpoint, files.folder)
    if files.unet is not None:
        check_weights(empty.unet, [files.unet], f"the U-Net {files.unet} for {reference!r}")
    return weights


def _require_checksums(files: Files, weights: PipelineFiles, reference: str) -> None:
    """Compare what is read with its checksums, where there are any: of the folder, of files, and of the hub's cache."""
    what = f"the model {reference!r}"
    require_checksum(files.folder, what, CHANGED)
    single = [path for path in (files.checkpoint, files.unet, files.lora) if path is not None]
    for path in single:
        require_checksum(path, f"the file of {what}", CHANGED_FILE)
    for path in (*single, *itertools.chain(*weights.components.values())):
        require_blob(path, what)


def _compare_base(files: Files, reference: str, variant: str | None) -> None:
    """Warn of a LoRA on another base than the one whose hash it names. The shapes of layers do not tell them apart.

    This is no error, because another variant or file format of the same weights has another hash too.
    """
    assert files.lora is not None
    metadata = read_metadata(files.lora)
    expected = metadata.get(BASE_SHA256)
    if expected is None:
        return
    found = weights_sha256(replace(files, lora=None), reference, variant)
    if found != expected:
        warn(
            f"the LoRA {files.lora} was trained on weights with the SHA-256 {expected[:12]}…, and those of "
            f"{reference!r} have {found[:12]}…: they are another base, or another variant or file format of the same"
        )


def _absent_components(pipeline_class: Any, folder: Path) -> dict[str, Any]:
    """Return the arguments that tell diffusers which components a pipeline does without."""
    absent: dict[str, Any] = {name: None for name in UNUSED if name in pipeline_class._optional_components}
    # diffusers also needs an explicit None for a component that was saved as absent, such as SD3's T5.
    absent |= {name: None for name, value in read_index(folder).items() if value == [None, None]}
    if "requires_safety_checker" in pipeline_class._get_signature_keys(pipeline_class)[1]:
        absent["requires_safety_checker"] = False
    return absent
