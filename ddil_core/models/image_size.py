"""The size of the images that a model draws, by its configurations. No network is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_core.models.memory import DENOISERS, LARGEST_SIDE, latent_scale, latent_size, packed
from ddil_core.models.references import resolve
from ddil_core.models.sampling import SYSTEM_FILE
from ddil_core.models.weights import AGAIN, components, read_index, read_json
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.misfits import value_text

Size = tuple[int, int]
"""Height and width."""
MOST_PIXELS = 2**22
"""The largest side of an image."""


@dataclass(frozen=True)
class Geometry:
    """How the pixels of a model's images become latents, and latents become the tokens of its network.

    Attributes:
        own: The size (H, W) in pixels of the images that the model draws unless it is asked for another.
        scale: The side in pixels of what one latent stands for.
        patch: The side in latents of what one token of the network stands for.
        most: The most tokens of a side.
    """

    own: Size
    scale: int
    patch: int = 1
    most: int = LARGEST_SIDE

    @classmethod
    def of_files(cls, folder: Path, reference: str) -> Geometry:
        """Read it from the configurations of a pipeline.

        Args:
            folder: The pipeline's folder.
            reference: The name of the model in messages.

        Raises:
            DdilError: a configuration is missing or damaged, or does not say the size.
        """
        parts = components(read_index(folder))
        name = next((name for name in DENOISERS if name in parts), DENOISERS[0])
        network = read_json(folder / name / "config.json")
        scale = latent_scale(read_json(folder / "vae" / "config.json"), reference) if "vae" in parts else 1
        height, width = latent_size(network, reference)
        made_for = read_json(folder / SYSTEM_FILE) if (folder / SYSTEM_FILE).is_file() else {}
        own = [_count(made_for, key, side * scale, reference) for key, side in (("height", height), ("width", width))]
        patch = packed(network) * _count(network, "patch_size", 1, reference)
        most = _count(network, "pos_embed_max_size", LARGEST_SIDE, reference)
        return cls((own[0], own[1]), scale, patch, most)

    def size(self, height: int | None, width: int | None, reference: str) -> Size:
        """Return the size in pixels (H, W) of images. None takes the model's own side.

        Raises:
            WrongCommand: the autoencoder or the network's patches do not divide a side, or it is too long.
        """
        size = self.own[0] if height is None else height, self.own[1] if width is None else width
        unit = self.scale * self.patch
        longest = unit * self.most
        for name, side, asked in (("height", size[0], height), ("width", size[1], width)):
            if asked is not None and side % unit:
                below = side - side % unit
                nearest = " or ".join(str(one) for one in (below, below + unit) if 0 < one <= longest)
                parts = "its autoencoder takes"
                if self.patch > 1:
                    parts = f"its autoencoder and its network's patches of {self.patch} latents take"
                raise WrongCommand(
                    f"the model {reference!r} cannot draw images of a {name} of {side}: {parts} sides in multiples of "
                    f"{unit} pixels; say {nearest}"
                )
            if asked is not None and side > longest:
                raise WrongCommand(
                    f"the model {reference!r} cannot draw images of a {name} of {side}: its network takes sides of at "
                    f"most {longest} pixels; say {longest} or less"
                )
        return size

    def tokens(self, size: Size) -> int:
        """Return how many tokens the network makes of an image of ``size`` (H, W) in pixels."""
        unit = self.scale * self.patch
        return (size[0] // unit) * (size[1] // unit)


def _count(config: Mapping[str, Any], key: str, default: int, reference: str) -> int:
    """Return a whole number above 0 of a configuration, or the default where it is absent or null.

    Raises:
        DdilError: it is another value.
    """
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not 0 < value <= MOST_PIXELS:
        raise DdilError(f"a configuration of the model {reference!r} has the {key} {value_text(value)}; {AGAIN}")
    return value


def require_drawable(references: Iterable[str | None], height: int | None, width: int | None) -> None:
    """Refuse images of a size that a model cannot draw, before anything heavy is loaded. None is no model.

    Raises:
        WrongCommand: one cannot.
        DdilError: see :func:`image_size`.
    """
    for reference in references:
        if reference is not None and (height, width) != (None, None):
            image_size(reference, height, width)


def image_size(reference: str, height: int | None = None, width: int | None = None) -> Size:
    """Return the size (H, W) in pixels of the images that a model draws.

    Args:
        reference: The reference of a model whose files are here.
        height: The height that is asked for; None for the model's own, as for the next.
        width: The width that is asked for.

    Raises:
        WrongCommand: the model cannot draw images of this size.
        DdilError: a configuration is missing or damaged, or does not say the size.
    """
    return Geometry.of_files(resolve(reference).folder, reference).size(height, width, reference)
