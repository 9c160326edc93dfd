"""From a model's files to diffusers' pipeline in memory: whole, of one model, offline, without pickles or remote code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddil_core.models.checkpoint import check_checkpoint
from ddil_core.models.fit import check_pipeline, check_weights
from ddil_core.models.lora import keep_lora, merge_lora, read_lora
from ddil_core.models.references import check_files
from ddil_core.models.systems import Files
from ddil_core.models.weights import UNUSED, components, read_index
from ddil_core.support.errors import DdilError

if TYPE_CHECKING:
    import torch


def load_pipeline(
    files: Files, reference: str, kind: str, dtype: torch.dtype, variant: str | None = None, *, fuse_lora: bool = True
) -> Any:
    """The pipeline of diffusers' class ``kind`` from local files, on the CPU, its weights in ``dtype``.

    A LoRA is merged into the weights, or kept beside them as adapters (``fuse_lora`` False). What can be told from headers and
    configurations (files cut short, weights of another model) is told before a weight is read.

    Raises:
        WrongCommand: no component has the variant.
        DdilError: files are missing or damaged, or do not fit one another.
    """
    import diffusers

    found = check_files(files, reference, variant)
    if files.checkpoint is None:
        check_pipeline(found, reference)
    else:
        check_checkpoint(files.checkpoint, files.folder)
    if files.unet is not None:
        network = components(read_index(files.folder))["unet"]
        check_weights(files.folder / "unet", network, [files.unet], f"the U-Net {files.unet} for {reference!r}")
    pipeline_class = getattr(diffusers, kind, None)
    if pipeline_class is None:
        raise DdilError(
            f"the model {reference!r} has the layout {kind}, and diffusers {diffusers.__version__} has no such pipeline class; "
            "install a version of diffusers that has it"
        )
    unused: dict[str, Any] = {name: None for name in UNUSED if name in pipeline_class._optional_components}
    # What a pipeline was saved without, such as SD3's T5, diffusers wants to be told again.
    unused |= {name: None for name, kind in read_index(files.folder).items() if kind == [None, None]}
    if "requires_safety_checker" in pipeline_class._get_signature_keys(pipeline_class)[1]:
        unused["requires_safety_checker"] = False
    try:
        if files.checkpoint is None:
            pipeline = pipeline_class.from_pretrained(
                files.folder, dtype=dtype, variant=found.variant, use_safetensors=True, local_files_only=True, **unused
            )
        else:  # a configuration by folder: by a hub id diffusers would fetch it, whatever it was told
            pipeline = pipeline_class.from_single_file(
                str(files.checkpoint), config=str(files.folder), dtype=dtype, local_files_only=True, **unused
            )
            if files.prediction is not None:  # the file knows it better than the configuration that it is given
                pipeline.scheduler.register_to_config(prediction_type=files.prediction)
        if files.unet is not None:
            from safetensors.torch import load_file

            pipeline.unet.load_state_dict(load_file(files.unet))
        if files.lora is not None:
            put = merge_lora if fuse_lora else keep_lora
            put(pipeline, read_lora(pipeline, files.lora, reference), files.lora)
    except DdilError:
        raise
    except Exception as error:  # every library below raises its own kind for a damaged file
        raise DdilError(
            f"the model {reference!r} cannot be loaded from {files.checkpoint or files.folder}: "
            f"{' '.join(str(error).split())[:200]}; its files are damaged or incomplete, so fetch or make it again"
        ) from error
    return pipeline
