"""The size of the images that a command's models draw. It is a setting of every command that runs a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import Field

from ddil_core.support.protocol import Strict


class WantedSize(TypedDict):
    """The height and the width of images in pixels, as arguments of ``load_model``. None is the model's own."""

    height: int | None
    width: int | None


OWN_SIZE = WantedSize(height=None, width=None)


class SizeKeys(Strict):
    """The keys of a protocol with the size of the images.

    Attributes:
        height: The height of the images in pixels. Defaults to each model's own.
        width: The width of the images in pixels. Defaults to each model's own.
    """

    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)

    @property
    def size(self) -> WantedSize:
        """The two keys."""
        return WantedSize(height=self.height, width=self.width)


def without_own_size(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol without keys of a size that is each model's own. Its hash is that of older protocols."""
    return {key: value for key, value in protocol.items() if key not in SizeKeys.model_fields or value is not None}


def pixels(size: tuple[int, int]) -> str:
    """Return a size (height, width) in words: width × height."""
    return f"{size[1]} × {size[0]} px"
