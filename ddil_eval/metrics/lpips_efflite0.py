"""``lpips_efflite0``: LPIPS' distance on EfficientNet-Lite0's layers, for where AlexNet's are not.

The outputs of its five stages, unit vectors over channels, all weights 1 (the package's "baseline" form, without heads).
Its numbers are not LPIPS'.
"""

from __future__ import annotations

from math import inf

import numpy as np

from ddil_core.support.environment import full_precision
from ddil_eval.metrics.efflite0 import EFFLITE0, load_efflite0, prepare_efflite0, weights_file
from ddil_eval.metrics.lpips_diversity import mean_distance
from ddil_eval.metrics.metric import Extractor, Metric, Network


def open_diversity(device: str) -> Extractor:
    """All pictures of one prompt, uint8 [n, H, W, 3], to their mean distance [1, 1]."""
    import torch

    model = load_efflite0(weights_file(), device)

    @torch.inference_mode()
    def extract(images: np.ndarray, captions: list[str]) -> np.ndarray:
        with full_precision():
            layers = model.forward_intermediates(prepare_efflite0(images).to(device), intermediates_only=True)
            ones = [torch.ones(layer.shape[1], device=layer.device) for layer in layers]
            return np.array([[mean_distance(layers, ones)]])

    return extract


LPIPS_EFFLITE0 = Metric(
    name="lpips_efflite0",
    title="mean distance on EfficientNet-Lite0's layers between a prompt's pictures",
    direction="higher",
    kind="group",
    network=Network(
        name="lpips_efflite0",
        needs=EFFLITE0.needs,
        open_on=open_diversity,
        weights=EFFLITE0.weights,
        lacks=EFFLITE0.lacks,
    ),
    bounds=(0.0, inf),
)
