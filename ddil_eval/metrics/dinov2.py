"""DINOv2 ViT-L/14's class token, 1,024 numbers: the network of FD-DINOv2 (Stein et al., 2023).

Pictures are resized to 224 × 224 by PIL's bicubic, rounded to uint8, and normalised with ImageNet's mean and deviation, as
in the authors' dgm-eval. Architecture and weights are timm's; its position embeddings, made for 37 × 37 patches, are
interpolated to 16 × 16 as DINOv2's own code does it (bicubic, by a factor of 16.1 / 37, without antialiasing), where timm
would antialias.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddil_core.support.environment import full_precision, require_torchvision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Extractor, Network
from ddil_eval.metrics.weights import WeightsFile

if TYPE_CHECKING:
    from timm.models import VisionTransformer
    from torch import Tensor

ARCHITECTURE = "vit_large_patch14_dinov2"
INPUT_SIZE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = WeightsFile(
    file="vit_large_patch14_dinov2.lvd142m.safetensors",
    url="https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
)


def lacks_timm() -> str | None:
    """None where timm is installed, else the cure."""
    if find_spec("timm") is None:
        return "timm, which has DINOv2's architecture, is not installed; install it with: pip install timm"
    return None


def interpolate(embeddings: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + S², D], the class token's first, to side × side patches: [1, 1 + side², D]."""
    import torch

    first, patches = embeddings[:, :1], embeddings[:, 1:]
    given, width = round(patches.shape[1] ** 0.5), patches.shape[2]
    if given == side:
        return embeddings
    square = patches.reshape(1, given, given, width).permute(0, 3, 1, 2)
    factor = (side + 0.1) / given  # DINOv2's guard against rounding down
    resized = torch.nn.functional.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([first, resized.permute(0, 2, 3, 1).reshape(1, side * side, width)], dim=1)


def load_vit(path: Path, device: str, architecture: str) -> VisionTransformer:
    """A DINOv2 transformer of timm for pictures of 224 × 224, in eval mode, float32, without gradients.

    Raises:
        DdilError: the file is damaged or holds another network, or torchvision does not fit.
    """
    require_torchvision()
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from timm import create_model

    model: VisionTransformer = create_model(architecture, pretrained=False, num_classes=0, img_size=INPUT_SIZE)
    try:
        state = load_file(path)
        state["pos_embed"] = interpolate(state["pos_embed"].float(), INPUT_SIZE // PATCH)
        model.load_state_dict(state, strict=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise DdilError(f"{path} does not hold the weights of {architecture}; delete it and get it again") from error
    return model.float().eval().requires_grad_(False).to(device)


def prepare_dinov2(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, 224, 224], normalised."""
    import torch
    from PIL import Image

    size = (INPUT_SIZE, INPUT_SIZE)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])
    pixels = torch.from_numpy(resized).float().div_(255)
    return pixels.sub_(torch.tensor(MEAN)).div_(torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def open_dinov2(device: str) -> Extractor:
    """Pictures to the class token after the last norm, float32 [B, 1024]; captions are not looked at."""
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
    lacks=lacks_timm,
)
