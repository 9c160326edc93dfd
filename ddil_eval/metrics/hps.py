"""HPS v2 (Wu et al., 2023): how people would rate a picture for its prompt, the cosine in an OpenCLIP ViT-H/14 tuned on ratings.

The published number is 100 × this cosine in some tables; here it is the cosine. The prompt has no prefix. The picture's longer
side is resized to 224, as in the authors' code.
"""

from __future__ import annotations

from pathlib import Path

from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Metric
from ddil_eval.metrics.towers import cosine_network
from ddil_eval.metrics.weights import WeightsFile


def convert_hps_weights(published: Path, target: Path) -> None:
    """The authors' checkpoint, a pickle {"state_dict": …}, to safetensors. Raises DdilError where it is something else."""
    from pickle import UnpicklingError

    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(published, map_location="cpu", weights_only=True)["state_dict"]
        save_file({name: value.contiguous() for name, value in state.items()}, target)
    except (UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, AttributeError) as error:
        raise DdilError(f"{published} is not the checkpoint of HPS v2; fetch it again") from error


_WEIGHTS = WeightsFile(
    file="HPS_v2_compressed.safetensors",
    url="https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt",
    convert=convert_hps_weights,
)

HPS_V2 = Metric(
    name="hps_v2",
    title="human preference score v2",
    direction="higher",
    kind="mean",
    network=cosine_network("hps_v2", "ViT-H-14", _WEIGHTS, "2 GB", resize_mode="longest"),
    bounds=(-1.0, 1.0),
)
