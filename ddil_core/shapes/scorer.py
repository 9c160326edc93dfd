"""The shapes world's two-tower scorer in open_clip's layout: images and captions become unit vectors of 64 numbers.

A folder holds ``open_clip_config.json``, ``open_clip_model.safetensors`` and a Hugging Face tokenizer.
``open_clip.create_model("local-dir:FOLDER")`` and ``open_clip.get_tokenizer("local-dir:FOLDER")`` load the folder
without this project and without a network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddil_core.support.checksums import require_checksum, with_checksum
from ddil_core.support.environment import full_precision, require_torchvision
from ddil_core.support.errors import DdilError
from ddil_core.support.files import write_tensors, write_text

if TYPE_CHECKING:
    from open_clip import CLIP
    from torch import Tensor
    from transformers import CLIPTokenizer

WEIGHTS = Path(__file__).parent / "weights" / "scorer"
FILES = ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer_config.json")


def scorer_config() -> dict[str, Any]:
    """Return the content of ``open_clip_config.json``. Each tower has half of the 1.5 M parameters."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
            "text_cfg": {
                "context_length": 20,
                "vocab_size": 158,
                "width": 128,
                "heads": 4,
                "layers": 3,
                # open_clip ignores this name where it loads a folder, and reads the folder's tokenizer.
                "hf_tokenizer_name": "local",
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }


def build_scorer() -> CLIP:
    """Return an untrained scorer in float32 and training mode. Seed torch first for repeatable weights."""
    require_torchvision()
    from open_clip import CLIP

    return CLIP(**scorer_config()["model_cfg"])


def save_scorer(model: CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a scorer and its tokenizer as a folder that open_clip loads. An old folder is replaced at the end."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with with_checksum(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        write_text(temporary / FILES[0], json.dumps(scorer_config(), indent=2) + "\n")
        write_tensors(temporary / FILES[1], state)
        shutil.rmtree(folder, ignore_errors=True)


def missing(folder: Path) -> str | None:
    """Return what the folder lacks, or that open_clip is missing, with what to do; None where all is here."""
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        names = ", ".join(absent)
        return f"the shapes world's scorer lacks {names} in {folder}; install ddil again, or train the shapes world"
    if find_spec("open_clip") is None:
        return "open_clip is not installed; install it with: pip install open_clip_torch"
    return None


def load_scorer(
    folder: Path, device: str = "cpu"
) -> tuple[CLIP, Callable[[np.ndarray], Tensor], Callable[[list[str]], Tensor]]:
    """Load the scorer (eval mode, float32, no gradients) with two functions that prepare its input on its device.

    The first function turns images uint8 [B, 64, 64, 3] into float32 [B, 3, 64, 64] in [-1, 1]. The second function
    turns B captions into token ids [B, 20].

    Raises:
        DdilError: files are missing or damaged, or open_clip or torchvision is missing or does not fit.
    """
    problem = missing(folder)
    if problem is not None:
        raise DdilError(problem)
    require_torchvision()
    require_checksum(folder, "the scorer", "install ddil again")
    import open_clip
    from safetensors import SafetensorError

    from ddil_core.shapes.batches import to_pixels

    name = f"local-dir:{folder}"
    try:
        model = open_clip.create_model(name, precision="fp32", device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise DdilError(f"the scorer in {folder} is damaged ({_first_line(error)}); install ddil again") from error
    model.eval().requires_grad_(False)
    return model, lambda images: to_pixels(images).to(device), lambda captions: tokenizer(captions).to(device)


def cosine(model: CLIP, pixels: Tensor, tokens: Tensor) -> np.ndarray:
    """Return the cosine of each image [B, 3, 64, 64] and its caption [B, 20], float32 [B, 1] in [-1, 1]."""
    import torch

    with torch.inference_mode(), full_precision():
        towers = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        return (towers[0] * towers[1]).sum(-1, keepdim=True).clamp(-1.0, 1.0).cpu().numpy()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
