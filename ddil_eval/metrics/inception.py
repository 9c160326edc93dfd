"""Inception v3's 2,048 pooled features, as clean-fid reads them: the network that FID is defined on.

The network is NVIDIA's TorchScript port of the 2015 TensorFlow graph. Preparation is clean-fid's "clean": each channel
resized to 299 × 299 by PIL's antialiased bicubic in float32, without rounding; then (x − 128) / 128. Resizer and loader are
clean-fid's own; the file's place, its check and all statistics are ours (clean-fid fetches into a shared temporary folder,
unchecked, and takes matrix square roots).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Extractor, Network
from ddil_eval.metrics.weights import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = WeightsFile(
    file="inception-2015-12-05.pt",  # the name that clean-fid looks for
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)


def lacks_cleanfid() -> str | None:
    """None where clean-fid is installed, else the cure."""
    if find_spec("cleanfid") is None:
        return "clean-fid, which has the resizer of FID, is not installed; install it with: pip install clean-fid"
    return None


@cache
def _resizer() -> Any:
    from cleanfid.resize import build_resizer

    return build_resizer("clean")


def prepare_inception(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, 299, 299] in about [0, 255], as clean-fid's "clean" resizer gives it."""
    import torch

    resized = np.stack([_resizer()(image) for image in images])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous()


def open_inception(device: str) -> Extractor:
    """Pictures to Inception's pooled features, float32 [B, 2048]; captions are not looked at.

    Raises:
        DdilError: clean-fid or the weights are not here, or the file is not the TorchScript that it should be.
    """
    problem = lacks_cleanfid()
    if problem is not None:
        raise DdilError(problem)
    path = WEIGHTS.checked()
    import torch
    from cleanfid.inception_torchscript import InceptionV3W

    try:
        model = InceptionV3W(str(path.parent), download=False).to(device)
    except (RuntimeError, AttributeError) as error:
        raise DdilError(
            f"{path} is not the TorchScript of Inception; get it again with: ddil metrics --get fid"
        ) from error
    model.eval().requires_grad_(False)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            features: np.ndarray = model(prepare_inception(images).to(device)).float().cpu().numpy()
        return features

    return extract


INCEPTION = Network(
    name="inception",
    needs="NVIDIA's TorchScript of Inception v3 (96 MB) and clean-fid",
    open_on=open_inception,
    weights=(WEIGHTS,),
    lacks=lacks_cleanfid,
)
