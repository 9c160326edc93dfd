"""CLIP ViT-L/14's unit image embeddings at 336 pixels: the network of CMMD (Jayasumana et al., 2024).

A bicubic filter with a = −1/2 resizes images to 336 × 336 in float, with antialiasing where they shrink, as in the
authors' JAX code. The port cmmd-pytorch uses a = −3/4 without antialiasing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddil_core.support.environment import full_precision
from ddil_eval.metrics.clip_towers import CLIP_TENSORS, load_clip_towers, missing_open_clip
from ddil_eval.metrics.metric import Extractor, Network
from ddil_eval.metrics.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "ViT-L-14-336-quickgelu"
INPUT_SIZE = 336
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = WeightsFile(
    file="CLIP-ViT-L-14-336-openai.safetensors",
    url="https://huggingface.co/timm/vit_large_patch14_clip_336.openai/resolve/main/open_clip_model.safetensors",
    tensors=CLIP_TENSORS,
)


def prepare_cmmd(images: np.ndarray, size: int = INPUT_SIZE) -> Tensor:
    """Resize and normalise uint8 [B, H, W, 3] to float32 [B, 3, size, size]."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    resized = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std


def open_embeddings(device: str) -> Extractor:
    """Load CLIP. Its features are unit embeddings of images, float32 [B, 768]; captions are ignored."""
    import torch

    model, _, _ = load_clip_towers(ARCHITECTURE, WEIGHTS.checked(), device)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            features: np.ndarray = model.encode_image(prepare_cmmd(images).to(device), normalize=True).cpu().numpy()
        return features

    return extract


CLIP_EMBEDDING = Network(
    name="clip_vitl14_336",
    needs="OpenAI's CLIP ViT-L/14 at 336 px in open_clip's layout (1.7 GB), open_clip and torchvision",
    open_on=open_embeddings,
    weights=(WEIGHTS,),
    lacks=missing_open_clip,
)
