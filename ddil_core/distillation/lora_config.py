"""The configuration of a LoRA, which any method can train in place of a whole student."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ddil_core.support.protocol import Strict


class LoraConfig(Strict):
    """Low-rank adapters, which are trained in place of a whole student.

    Attributes:
        rank: The rank of the adapters.
        alpha: The adapters' output is scaled by alpha/rank.
        targets: The ends of the names of the layers that are adapted, such as to_q; None for the layers of attention,
            feed-forward nets and convolutions.
    """

    rank: int = Field(default=64, ge=1)
    alpha: int = Field(default=64, ge=1)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``targets`` out where it is null, so that the hashes of earlier configurations stay."""
        return {key: value for key, value in handler(self).items() if key != "targets" or value is not None}
