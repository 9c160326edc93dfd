"""CLIP's two towers, the shapes world's own or a folder's: what chooses among prompts by pictures, and what PEZ optimises."""

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

from ddil_core.inversion.words import Vocabulary, Words, gather
from ddil_core.support.environment import full_precision
from ddil_core.support.errors import DdilError
from ddil_core.support.finite import all_finite, not_finite
from ddil_core.support.paths import user_path

SHAPES = "shapes"


@dataclass(frozen=True, eq=False)
class Towers:
    """``images`` takes pictures uint8 [B, H, W, 3], ``texts`` prompts [B]; both give unit vectors float32 [B, D].

    ``parts`` are the text tower's tokenizer and embedding layer; ``identity`` what a record says of the weights.
    """

    reference: str
    images: Callable[[np.ndarray], Tensor]
    texts: Callable[[list[str]], Tensor]
    parts: tuple[Any, torch.nn.Module]
    identity: dict[str, Any]

    def words(self, vocabulary: Vocabulary | tuple[str, ...]) -> Words:
        """What the text tower's prompts may hold."""
        layer = self.parts[1]
        return gather([self.parts], vocabulary, f"the CLIP {self.reference!r}", layer.weight.device)  # type: ignore[arg-type]

    @torch.no_grad()
    @full_precision()
    def similarity(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The cosine of each picture with its other, float64 [B].

        Raises:
            DdilError: they are not finite.
        """
        cosines = (self.images(images) * self.images(others)).sum(-1).double()
        if not all_finite([cosines]):
            raise not_finite("the similarities", "after its image tower", f"the CLIP {self.reference!r}", [])
        return cosines.cpu().numpy()


def missing_towers(reference: str | None) -> str | None:
    """None where these towers are here, else one sentence with the cure."""
    from ddil_core.shapes import scorer

    if reference == SHAPES:
        return scorer.missing(scorer.WEIGHTS)
    if reference is None:
        return (
            "the image tower that belongs to the text encoder is not here; put CLIP (openai/clip-vit-large-patch14 for "
            "Stable Diffusion 1.5) into a folder and name it with --towers"
        )
    folder = user_path(reference, "--towers")
    absent = [
        name
        for name in ("config.json", "model.safetensors", "preprocessor_config.json")
        if not (folder / name).is_file()
    ]
    if absent:
        return f"the folder {folder} holds no CLIP, as it lacks {', '.join(absent)}; name one of transformers' layout"
    return None


def load_inversion_towers(reference: str | None, device: torch.device | str = "cpu") -> Towers:
    """The shapes world's towers (``shapes``), or a folder with a ``CLIPModel`` of transformers; float32, without gradients.

    Raises:
        DdilError: they are not here, or are damaged.
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
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = user_path(reference, "--towers")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise kinds of their own
        raise DdilError(
            f"the CLIP in {folder} cannot be loaded ({' '.join(str(error).split())[:200]}); fetch it again"
        ) from error
    model = model.float().to(device).eval().requires_grad_(False)
    limit = model.config.text_config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # its files may name no length

    def images(pictures: np.ndarray) -> Tensor:
        pixels = processor(list(pictures), return_tensors="pt").pixel_values.to(device)
        return _unit(model.get_image_features(pixel_values=pixels))

    def texts(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        return _unit(model.get_text_features(input_ids=ids.to(device)))

    layer = model.text_model.get_input_embeddings()
    return Towers(reference, images, texts, (tokenizer, layer), {"name": "clip_image", "weights": _sha256(folder)})


def _unit(features: Any) -> Tensor:
    """Features, which transformers 5 wraps into an output with the projection in ``pooler_output``, as unit vectors."""
    return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=-1)


def _sha256(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as content:
            found[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found
