"""HPS v2 (Wu et al., 2023): how people would rate an image for its prompt; the cosine of an OpenCLIP ViT-H/14 trained
on ratings.

The value is the cosine; some tables print 100 × the cosine. The prompt has no prefix. The longer side of the image is
resized to 224 pixels, as in the authors' code.
"""

from __future__ import annotations

from pathlib import Path

from ddil_core.support.errors import DdilError
from ddil_eval.metrics.clip_towers import cosine_network
from ddil_eval.metrics.weights_file import NOT_A_PICKLE, WeightsFile


def convert_hps_weights(published: Path, target: Path) -> None:
    """Convert the authors' checkpoint, a pickle {"state_dict": …}, to safetensors.

    Raises:
        DdilError: the file holds something else.
    """
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(published, map_location="cpu", weights_only=True)["state_dict"]
        save_file({name: value.contiguous() for name, value in state.items()}, target)
    except NOT_A_PICKLE as error:
        raise DdilError(f"{published} is not the checkpoint of HPS v2; fetch it again") from error


WEIGHTS = WeightsFile(
    file="HPS_v2_compressed.safetensors",
    url="https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt",
    convert=convert_hps_weights,
    tensors=("visual.proj",),
)
HPS = cosine_network("hps_v2", "ViT-H-14", WEIGHTS, "2 GB", resize_mode="longest")
