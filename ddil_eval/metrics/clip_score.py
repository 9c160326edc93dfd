"""CLIP scores: the cosine between a picture and its caption, unscaled, in [-1, 1], float32, by OpenCLIP's ViT-g/14.

Which of its two checkpoints, and what prefix stands before a caption, is a recipe's matter: GigaGAN, DMD and DMD2 use
``laion2b_s12b_b42k`` with "A photo depicts "; BK-SDM uses ``laion2b_s34b_b88k`` with none.
"""

from __future__ import annotations

from ddil_eval.metrics.metric import Metric
from ddil_eval.metrics.towers import cosine_network
from ddil_eval.metrics.weights import WeightsFile

_S12B = WeightsFile(
    file="CLIP-ViT-g-14-laion2B-s12B-b42K.safetensors",
    url="https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/open_clip_model.safetensors",
)
_S34B = WeightsFile(
    file="CLIP-ViT-g-14-laion2B-s34B-b88K.safetensors",
    url="https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s34B-b88K/resolve/main/open_clip_model.safetensors",
)

CLIP_SCORE = Metric(
    name="clip_score",
    title="CLIP score, ViT-g/14 s12b_b42k",
    direction="higher",
    kind="mean",
    network=cosine_network("clip_vitg14_s12b", "ViT-g-14", _S12B, "5.5 GB", prefixed=True),
    bounds=(-1.0, 1.0),
)
CLIP_SCORE_S34B = Metric(
    name="clip_score_s34b",
    title="CLIP score, ViT-g/14 s34b_b88k",
    direction="higher",
    kind="mean",
    network=cosine_network("clip_vitg14_s34b", "ViT-g-14", _S34B, "5.5 GB", prefixed=True),
    bounds=(-1.0, 1.0),
)
