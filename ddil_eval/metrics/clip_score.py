"""CLIP scores: the cosine between an image and its caption, not scaled, in [-1, 1], float32, by OpenCLIP's ViT-g/14.

The recipe chooses the checkpoint and the prefix of captions. GigaGAN, DMD and DMD2 use ``laion2b_s12b_b42k`` with
"A photo depicts "; BK-SDM uses ``laion2b_s34b_b88k`` without a prefix.
"""

from __future__ import annotations

from ddil_eval.metrics.clip_towers import CLIP_TENSORS, cosine_network
from ddil_eval.metrics.weights_file import WeightsFile

CLIP_S12B = cosine_network(
    "clip_vitg14_s12b",
    "ViT-g-14",
    WeightsFile(
        file="CLIP-ViT-g-14-laion2B-s12B-b42K.safetensors",
        url="https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/open_clip_model.safetensors",
        tensors=CLIP_TENSORS,
    ),
    "5.5 GB",
    prefixed=True,
)
CLIP_S34B = cosine_network(
    "clip_vitg14_s34b",
    "ViT-g-14",
    WeightsFile(
        file="CLIP-ViT-g-14-laion2B-s34B-b88K.safetensors",
        url="https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s34B-b88K/resolve/main/open_clip_model.safetensors",
        tensors=CLIP_TENSORS,
    ),
    "5.5 GB",
    prefixed=True,
)
