"""DINOv2 ViT-L/14's class token, 1,024 numbers: the network of FD-DINOv2 (Stein et al., 2023).

PIL's bicubic resizes images to 224 × 224 and rounds to uint8; then ImageNet's mean and deviation normalise them, as in
the authors' dgm-eval. Architecture and weights come from timm. The position embeddings fit 37 × 37 patches. They are
interpolated to 16 × 16 as in DINOv2's own code: bicubic, by a factor of 16.1 / 37, without antialiasing. (timm
antialiases.)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddil_core.support.environment import full_precision, require_torchvision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Extractor, Network, missing_package
from ddil_eval.metrics.resizing import resized
from ddil_eval.metrics.weights_file import WeightsFile, read_weights

if TYPE_CHECKING:
    from timm.models import VisionTransformer
    from torch import Tensor

ARCHITECTURE = "vit_large_patch14_dinov2"
INPUT_SIZE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = WeightsFile(
    file="vit_large_patch14_dinov2.lvd142m.safetensors",
    url="https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
    tensors=("cls_token", "pos_embed"),
)


def interpolate(embeddings: Tensor, side: int) -> Tensor:
    """Interpolate position embeddings [1, 1 + S², D], class token first, to [1, 1 + side², D]."""
    import torch

    class_token, patches = embeddings[:, :1], embeddings[:, 1:]
    old_side, width = round(patches.shape[1] ** 0.5), patches.shape[2]
    if old_side == side:
        return embeddings
    square = patches.reshape(1, old_side, old_side, width).permute(0, 3, 1, 2)
    factor = (side + 0.1) / old_side  # DINOv2's guard against rounding down
    resized = torch.nn.functional.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([class_token, resized.permute(0, 2, 3, 1).reshape(1, side * side, width)], dim=1)


def load_vit(path: Path, device: str, architecture: str) -> VisionTransformer:
    """Load a DINOv2 transformer of timm for images of 224 × 224, in eval mode, float32, without gradients.

    Raises:
        DdilError: the file is damaged or holds another network, or torchvision does not fit torch.
    """
    require_torchvision()
    from safetensors import SafetensorError
    from timm import create_model

    model: VisionTransformer = create_model(architecture, pretrained=False, num_classes=0, img_size=INPUT_SIZE)
    try:
        state = read_weights(path)
        state["pos_embed"] = interpolate(state["pos_embed"].float(), INPUT_SIZE // PATCH)
        model.load_state_dict(state, strict=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise DdilError(f"{path} does not hold the weights of {architecture}; delete it and get it again") from error
    return model.float().eval().requires_grad_(False).to(device)


def prepare_dinov2(images: np.ndarray) -> Tensor:
    """Resize and normalise uint8 [B, H, W, 3] to float32 [B, 3, 224, 224]."""
    import torch

    small = resized(images, INPUT_SIZE)
    pixels = torch.from_numpy(small).float().div_(255)
    return pixels.sub_(torch.tensor(MEAN)).div_(torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def open_dinov2(device: str) -> Extractor:
    """Load DINOv2. Its features are the class token after the last norm, float32 [B, 1024]; captions are ignored."""
    import torch

    model = load_vit(WEIGHTS.checked(), device, ARCHITECTURE)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            features: np.ndarray = model.forward_features(prepare_dinov2(images).to(device))[:, 0].cpu().numpy()
        return features

    return extract


DINOV2 = Network(
    name="dinov2",
    needs="DINOv2 ViT-L/14 in timm's layout (1.2 GB), timm and torchvision",
    open_on=open_dinov2,
    weights=(WEIGHTS,),
    lacks=partial(missing_package, "timm", "timm"),
)
