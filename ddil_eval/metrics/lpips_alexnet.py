"""LPIPS on AlexNet: the mean distance over all pairs of one prompt's images.

LPIPS v0.1 (Zhang et al., 2018) on AlexNet's five layers with the linear heads of the package ``lpips``; images in [-1,
1] at their own size. LPIPS_Div in the paper's Table 5 takes 10 images for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddil_core.support.environment import full_precision, require_torchvision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Extractor, Network, missing_package
from ddil_eval.metrics.weights_file import NOT_A_PICKLE, WeightsFile, read_weights

if TYPE_CHECKING:
    from torch import Tensor

_SLICES = {"0": "slice1", "3": "slice2", "6": "slice3", "8": "slice4", "10": "slice5"}


def convert_lpips_weights(published: Path, target: Path) -> None:
    """Convert torchvision's AlexNet, a pickle, to its five convolutions in the layout of
    ``lpips.LPIPS(net="alex").net``.

    Raises:
        DdilError: the file holds something else.
    """
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(published, map_location="cpu", weights_only=True)
        layers = {
            f"{part}.{index}.{leaf}": state[f"features.{index}.{leaf}"].contiguous()
            for index, part in _SLICES.items()
            for leaf in ("weight", "bias")
        }
    except NOT_A_PICKLE as error:
        raise DdilError(f"{published} is not torchvision's AlexNet; fetch it again") from error
    save_file(layers, target)


WEIGHTS = WeightsFile(
    file="lpips_alexnet_features.safetensors",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be79",  # the first eight characters, from the name of torchvision's file
    convert=convert_lpips_weights,
    tensors=("slice1.0.bias",),
)
missing_lpips = partial(missing_package, "lpips", "lpips")


def load_lpips(path: Path, device: str = "cpu") -> Any:
    """Load ``lpips.LPIPS`` v0.1 with AlexNet's layers from a file, in eval mode, without gradients.

    Raises:
        DdilError: the package lpips is not installed, or the file is damaged or holds another network.
    """
    problem = missing_lpips()
    if problem is not None:
        raise DdilError(problem)
    require_torchvision()
    import lpips
    from safetensors import SafetensorError

    model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    try:
        model.net.load_state_dict(read_weights(path), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DdilError(f"{path} does not hold AlexNet's layers for LPIPS; delete it and get it again") from error
    return model.eval().requires_grad_(False).to(device)


def mean_distance(layers: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Return the mean over all pairs of n images of Σ_layers mean_positions Σ_channels w (f̂ − f̂')².

    ``layers`` are [n, C, H, W]. This function divides them by their norm over channels. ``weights`` are [C], one vector
    for each layer.

    Raises:
        DdilError: fewer than two images.
    """
    n = len(layers[0])
    if n < 2:
        raise DdilError(
            "the diversity of a prompt's images needs at least two images; ask for more images for each prompt"
        )
    total = 0.0
    for layer, weight in zip(layers, weights, strict=True):
        units = layer / (layer.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
        for first in range(n - 1):
            squares = (units[first] - units[first + 1 :]).square()
            total += float((squares * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2)).double().sum())
    return total / (n * (n - 1) / 2)


def open_lpips_alexnet(device: str) -> Extractor:
    """Load LPIPS. The extractor returns the mean distance [1, 1] between the images of one prompt."""
    import torch

    model = load_lpips(WEIGHTS.checked(), device)
    weights = [head.model[-1].weight.flatten() for head in model.lins]

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
        with full_precision():
            layers = model.net(model.scaling_layer(pixels))
            return np.array([[mean_distance(list(layers), weights)]])

    return extract


LPIPS_ALEXNET = Network(
    name="lpips_alexnet",
    needs="AlexNet's five convolutions (10 MB), the package lpips and torchvision",
    open_on=open_lpips_alexnet,
    weights=(WEIGHTS,),
    lacks=missing_lpips,
)
