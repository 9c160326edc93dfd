"""``lpips_efflite0``: the distance of LPIPS on EfficientNet-Lite0's layers, for use where AlexNet's weights are
missing.

The layers are the outputs of the network's five stages, as unit vectors over channels. All weights are 1: the
"baseline" form of the package lpips, without heads. The numbers do not compare with LPIPS.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ddil_core.support.environment import full_precision
from ddil_eval.metrics.efflite0 import EFFLITE0, installed_weights, load_efflite0, prepare_efflite0
from ddil_eval.metrics.lpips_alexnet import mean_distance
from ddil_eval.metrics.metric import Extractor


def open_lpips_efflite0(device: str) -> Extractor:
    """Load the network. The extractor returns the mean distance [1, 1] between the images of one prompt."""
    import torch

    model = load_efflite0(installed_weights(), device)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            layers = model.forward_intermediates(prepare_efflite0(images).to(device), intermediates_only=True)
            ones = [torch.ones(layer.shape[1], device=layer.device) for layer in layers]
            return np.array([[mean_distance(layers, ones)]])

    return extract


LPIPS_EFFLITE0 = replace(EFFLITE0, name="lpips_efflite0", open_on=open_lpips_efflite0)
