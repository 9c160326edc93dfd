"""CLIP's two towers from open_clip, with weights from a local file. CLIP scores, HPS v2 and CMMD use them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddil_core.shapes.scorer import cosine
from ddil_core.support.environment import require_torchvision
from ddil_core.support.errors import DdilError
from ddil_eval.metrics.metric import Extractor, Network, missing_package
from ddil_eval.metrics.weights_file import WeightsFile

if TYPE_CHECKING:
    from open_clip import CLIP
    from torch import Tensor

CLIP_TENSORS = ("visual.proj", "token_embedding.weight", "logit_scale")
"""Names of tensors that every CLIP in open_clip's layout holds."""
missing_open_clip = partial(missing_package, "open_clip", "open_clip_torch")


def load_clip_towers(
    architecture: str, path: Path, device: str, resize_mode: str = "shortest"
) -> tuple[CLIP, Callable[[np.ndarray], Tensor], Callable[[list[str]], Tensor]]:
    """Load a model of open_clip in eval mode, float32, without gradients.

    Return the model, open_clip's preparation (images uint8 [B, H, W, 3] → tensor on the model's device) and
    open_clip's tokenizer (captions → tensor on the model's device). ``resize_mode`` is open_clip's word for the side
    that is fitted.

    Raises:
        DdilError: the file is damaged or holds another network, or torchvision does not fit torch.
    """
    require_torchvision()
    import open_clip
    import torch
    from PIL import Image
    from safetensors import SafetensorError

    model, _, transform = open_clip.create_model_and_transforms(
        architecture, precision="fp32", device=device, image_resize_mode=resize_mode
    )
    try:
        open_clip.load_checkpoint(model, str(path), strict=True)
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        raise DdilError(f"{path} does not hold the weights of {architecture}; delete it and get it again") from error
    model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(architecture)

    def preprocess(images: np.ndarray) -> Tensor:
        return torch.stack([transform(Image.fromarray(image)) for image in images]).to(device)

    return model, preprocess, lambda captions: tokenizer(captions).to(device)


def open_cosine(architecture: str, weights: WeightsFile, resize_mode: str = "shortest") -> Callable[[str], Extractor]:
    """Return a function that loads the extractor of cosines between images and captions, float32 [B, 1] in [-1, 1]."""

    def open_on(device: str) -> Extractor:
        model, preprocess, tokenize = load_clip_towers(architecture, weights.checked(), device, resize_mode)
        return lambda images, captions: cosine(model, preprocess(images), tokenize(captions))

    return open_on


def cosine_network(
    name: str,
    architecture: str,
    weights: WeightsFile,
    size: str,
    *,
    prefixed: bool = False,
    resize_mode: str = "shortest",
) -> Network:
    """Return the network of a cosine score.

    Args:
        name: The network's name.
        architecture: open_clip's name of the model.
        weights: The model's file.
        size: The size of the file, in words.
        prefixed: Captions get the recipe's prefix.
        resize_mode: open_clip's word for the side that is fitted: "shortest" or "longest".
    """
    return Network(
        name=name,
        needs=f"open_clip's {architecture} ({size}), open_clip and torchvision",
        open_on=open_cosine(architecture, weights, resize_mode),
        weights=(weights,),
        lacks=missing_open_clip,
        prefixed=prefixed,
        reads_captions=True,
    )
