"""Inception as the package pytorch-fid has it, for BK-SDM's recipe: another port, and torch's bilinear resize.

The resize to 299 px is not antialiased, so the values differ from clean-fid's. This Inception differs from
torchvision's in some blocks, which come from clean-fid's copy. The weights are pytorch-fid's state dict, read with
``weights_only``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddil_core.support.environment import full_precision, require_torchvision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.inception import missing_cleanfid
from ddil_eval.metrics.metric import Extractor, Network
from ddil_eval.metrics.on_cpu import fold_batch_norms
from ddil_eval.metrics.weights_file import NOT_A_PICKLE, WeightsFile, read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn


def convert_fid_weights(published: Path, target: Path) -> None:
    """Convert pytorch-fid's state dict, a pickle, to safetensors.

    Raises:
        DdilError: the file holds something else.
    """
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(published, map_location="cpu", weights_only=True)
        save_file({name: value.contiguous() for name, value in state.items()}, target)
    except NOT_A_PICKLE as error:
        raise DdilError(f"{published} does not hold the weights of pytorch-fid; fetch it again") from error


WEIGHTS = WeightsFile(
    file="pt_inception-2015-12-05.safetensors",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",  # the first characters, from the name of the published file
    convert=convert_fid_weights,
    tensors=("Conv2d_1a_3x3.conv.weight",),
)


def architecture() -> nn.Module:
    """Return TensorFlow's Inception v3 of 2015 in torchvision's layout, with random weights and output [B, 2048]."""
    require_torchvision()
    from cleanfid import inception_pytorch as blocks
    from torch import nn
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    model.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    model.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    model.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    model.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    model.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    model.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    model.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    model.Mixed_7b = blocks.FIDInceptionE_1(1280)
    model.Mixed_7c = blocks.FIDInceptionE_2(2048)
    model.fc = nn.Identity()
    return model.eval().requires_grad_(False)


def prepare_pytorch_fid(images: np.ndarray) -> Tensor:
    """Resize uint8 [B, H, W, 3] to float32 [B, 3, 299, 299] in [-1, 1], bilinear without antialiasing."""
    import torch

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return 2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False) - 1


def open_pytorch_inception(device: str) -> Extractor:
    """Load pytorch-fid's Inception. Its pooled features are float32 [B, 2048]; captions are ignored.

    Raises:
        DdilError: clean-fid or the weights are missing, or the file holds something else.
    """
    problem = missing_cleanfid()
    if problem is not None:
        raise DdilError(problem)
    path = WEIGHTS.checked()
    import torch
    from safetensors import SafetensorError

    model = architecture()
    try:
        state = read_weights(path)
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DdilError(f"{path} does not hold pytorch-fid's Inception; delete it and get it again") from error
    model.to(device)
    if device == "cpu":
        fold_batch_norms(model)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            features: np.ndarray = model(prepare_pytorch_fid(images).to(device)).cpu().numpy()
        return features

    return extract


INCEPTION_PYTORCH = Network(
    name="inception_pytorch",
    needs="pytorch-fid's Inception v3 (95 MB), clean-fid and torchvision",
    open_on=open_pytorch_inception,
    weights=(WEIGHTS,),
    lacks=missing_cleanfid,
)
