"""The table of metrics: one file and one row each."""

from __future__ import annotations

from ddil_eval.metrics.clip_score import CLIP_SCORE, CLIP_SCORE_S34B
from ddil_eval.metrics.clip_score_shapes import CLIP_SCORE_SHAPES
from ddil_eval.metrics.cmmd import CMMD
from ddil_eval.metrics.drawn_right import DRAWN_RIGHT
from ddil_eval.metrics.fd_dinov2 import FD_DINOV2
from ddil_eval.metrics.fd_efflite0 import FD_EFFLITE0
from ddil_eval.metrics.fid import FID
from ddil_eval.metrics.fid_infinity import FID_INFINITY
from ddil_eval.metrics.fid_pytorch import FID_PYTORCH
from ddil_eval.metrics.hps import HPS_V2
from ddil_eval.metrics.kid import KID
from ddil_eval.metrics.lpips_diversity import LPIPS_DIVERSITY
from ddil_eval.metrics.lpips_efflite0 import LPIPS_EFFLITE0
from ddil_eval.metrics.metric import Extractor, Metric, Network
from ddil_eval.metrics.patch_fid import PATCH_FID
from ddil_eval.metrics.prdc import PRDC
from ddil_eval.metrics.vendi import VENDI, VENDI_EFFLITE0
from ddil_eval.metrics.weights import WeightsFile

_ROWS = (
    FID,
    FID_PYTORCH,
    PATCH_FID,
    FID_INFINITY,
    KID,
    *PRDC,
    FD_DINOV2,
    CMMD,
    CLIP_SCORE,
    CLIP_SCORE_S34B,
    HPS_V2,
    LPIPS_DIVERSITY,
    LPIPS_EFFLITE0,
    VENDI,
    VENDI_EFFLITE0,
    FD_EFFLITE0,
    CLIP_SCORE_SHAPES,
    DRAWN_RIGHT,
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ROWS}

__all__ = ["METRICS", "Extractor", "Metric", "Network", "WeightsFile"]
