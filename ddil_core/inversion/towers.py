"""CLIP's two towers: those of the shapes world, or those of a folder.

The image tower chooses among candidate prompts by their generated images. PEZ optimises the cosine of both towers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_core.inversion.words import Vocabulary, Words, gather_words, require_exact
from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import all_finite, not_finite
from ddil_core.support.paths import user_path

SHAPES = "shapes"


@dataclass(frozen=True, eq=False)
class Towers:
    """CLIP's image and text towers, which map into one space.

    Attributes:
        reference: "shapes" or the folder.
        encode_images: Takes images uint8 [B, H, W, 3]. Returns unit vectors float32 [B, D].
        encode_texts: Takes B prompts. Returns unit vectors float32 [B, D].
        parts: The text tower's tokenizer and embedding layer.
        identity: The name and the hashes of the weights, for records.
    """

    reference: str
    encode_images: Callable[[np.ndarray], Tensor]
    encode_texts: Callable[[list[str]], Tensor]
    parts: tuple[Any, torch.nn.Module]
    identity: dict[str, Any]

    def words(self, vocabulary: Vocabulary | tuple[str, ...]) -> Words:
        """Return the words that the text tower's prompts may hold."""
        device: torch.device = self.parts[1].weight.device  # type: ignore[assignment]
        words = gather_words([self.parts], vocabulary, f"the CLIP {self.reference!r}", device)
        require_exact(words, lambda prompts: [self.encode_texts(prompts)])
        return words

    @torch.no_grad()
    @full_precision()
    def similarity(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the cosine of each image with its partner in ``others``, float64 [B].

        Raises:
            DdilError: a cosine is not finite.
        """
        cosines = (self.encode_images(images) * self.encode_images(others)).sum(-1).double()
        if not all_finite([cosines]):
            raise not_finite("the similarities", "after its image tower", f"the CLIP {self.reference!r}", [])
        return cosines.cpu().numpy()


def missing_towers(reference: str | None) -> str | None:
    """Return one sentence on what is missing and what to do, or None where these towers are here."""
    from ddil_core.shapes import scorer

    if reference == SHAPES:
        return scorer.missing(scorer.WEIGHTS)
    if reference is None:
        return (
            "CLIP's image tower for this text encoder is missing; put CLIP (openai/clip-vit-large-patch14 for "
            "Stable Diffusion 1.5) into a folder and name this folder with --towers"
        )
    folder = user_path(reference, "--towers")
    absent = [
        name
        for name in ("config.json", "model.safetensors", "preprocessor_config.json")
        if not (folder / name).is_file()
    ]
    if absent:
        return f"the folder {folder} holds no CLIP: it lacks {', '.join(absent)}; name a folder in transformers' layout"
    return None


def load_inversion_towers(reference: str | None, device: torch.device | str = "cpu") -> Towers:
    """Load the towers of the shapes world ("shapes") or of a folder with transformers' ``CLIPModel``, in float32.

    Raises:
        DdilError: the towers are missing or damaged.
    """
    problem = missing_towers(reference)
    if problem is not None or reference is None:
        raise DdilError(problem or "no CLIP is named")
    return _shapes(str(device)) if reference == SHAPES else _folder(reference, device)


def _shapes(device: str) -> Towers:
    from transformers import CLIPTokenizer

    from ddil_core.shapes import scorer

    model, preprocess, tokenize = scorer.load_scorer(scorer.WEIGHTS, device)
    tokenizer = CLIPTokenizer.from_pretrained(scorer.WEIGHTS)
    tokenizer.model_max_length = model.context_length
    return Towers(
        SHAPES,
        lambda images: model.encode_image(preprocess(images), normalize=True),
        lambda texts: model.encode_text(tokenize(texts), normalize=True),
        (tokenizer, model.token_embedding),
        {"name": "clip_image_shapes", "weights": _sha256(scorer.WEIGHTS)},
    )


def _folder(reference: str, device: torch.device | str) -> Towers:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    folder = user_path(reference, "--towers")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)  # CLIP's own, or another
    except Exception as error:  # transformers and safetensors raise exceptions of their own
        raise DdilError(
            f"the CLIP in {folder} cannot be loaded ({' '.join(str(error).split())[:200]}); download it again"
        ) from error
    model = model.float().to(device).eval().requires_grad_(False)
    limit = model.config.text_config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # the files may give no length

    def encode_images(images: np.ndarray) -> Tensor:
        pixels = processor(list(images), return_tensors="pt").pixel_values.to(device)
        return _unit(model.get_image_features(pixel_values=pixels))

    def encode_texts(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return _unit(model.get_text_features(input_ids=ids.to(device)))

    layer = model.text_model.get_input_embeddings()
    return Towers(
        reference, encode_images, encode_texts, (tokenizer, layer), {"name": "clip_image", "weights": _sha256(folder)}
    )


def _unit(features: Any) -> Tensor:
    """Normalise features. transformers 5 returns an output object that holds them in ``pooler_output``."""
    return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=-1)


def _sha256(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as content:
            hashes[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes
