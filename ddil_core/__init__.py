"""Distil text-to-image diffusion models by imitation learning, and sample from them.

The public functions are imported when they are first used, so that ``import ddil_core`` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddil_core.distillation.distill import distill
    from ddil_core.models.generate import sample
    from ddil_core.models.model import load_model
    from ddil_core.models.turns import rollout

__version__: str
__all__ = ["__version__", "distill", "load_model", "rollout", "sample"]

_SOURCES = {
    "distill": "ddil_core.distillation.distill",
    "load_model": "ddil_core.models.model",
    "rollout": "ddil_core.models.turns",
    "sample": "ddil_core.models.generate",
}


def __getattr__(name: str) -> Any:
    """Import a public function from its module, or look the version up."""
    if name == "__version__":
        from importlib.metadata import version  # as slow as the rest of this import

        return version("ddil")
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_SOURCES[name]), name)


def __dir__() -> list[str]:
    """List the public functions too before they are imported, so that a shell completes their names."""
    return sorted({*globals(), *__all__})
