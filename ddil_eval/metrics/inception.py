"""Inception v3's 2,048 pooled features, prepared as clean-fid does: the network that defines FID.

The network is NVIDIA's TorchScript port of the TensorFlow graph of 2015. The preparation is clean-fid's mode "clean":
PIL's antialiased bicubic resizes each channel to 299 × 299 in float32, without rounding; then (x − 128) / 128.
Resizer and loader come from clean-fid. This package chooses the place of the file, checks the file and computes all
statistics, because clean-fid downloads into a shared temporary folder without a check and takes matrix square roots.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from ddil_core.support.side_by_side import side_by_side
from ddil_eval.metrics.metric import Extractor, Network, missing_package
from ddil_eval.metrics.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = WeightsFile(
    file="inception-2015-12-05.pt",  # the name that clean-fid looks for
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)
missing_cleanfid = partial(missing_package, "cleanfid", "clean-fid")


@cache
def _resizer() -> Any:
    from cleanfid.resize import build_resizer

    return build_resizer("clean")


def prepare_inception(images: np.ndarray) -> Tensor:
    """Resize uint8 [B, H, W, 3] with clean-fid's "clean" resizer to float32 [B, 3, 299, 299], in about [0, 255]."""
    import torch

    resized = np.stack(side_by_side(_resizer(), images))
    return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous()


def open_inception(device: str) -> Extractor:
    """Load Inception. Its pooled features are float32 [B, 2048]; captions are ignored.

    Raises:
        DdilError: clean-fid or the weights are missing, or the file is not Inception's TorchScript.
    """
    problem = missing_cleanfid()
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
    lacks=missing_cleanfid,
)
"""The network of FID."""
INCEPTION_PATCH = replace(INCEPTION, name="inception_patch")
"""The same network on patches of 299 px, which the recipe cuts, as DMD2 does for SDXL. Patches are not resized."""
