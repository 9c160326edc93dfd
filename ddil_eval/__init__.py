"""Measure text-to-image diffusion models, and report what distillation did to them.

The public functions are imported when they are first used, so that ``import ddil_eval`` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddil_eval import metrics as metrics
    from ddil_eval.experiments.api import compare, covariate_shift, score
    from ddil_eval.report.frames import load_records

__version__: str
__all__ = ["__version__", "compare", "covariate_shift", "load_records", "metrics", "score"]

_SOURCES = {
    "compare": "ddil_eval.experiments.api",
    "covariate_shift": "ddil_eval.experiments.api",
    "load_records": "ddil_eval.report.frames",
    "score": "ddil_eval.experiments.api",
}


def __getattr__(name: str) -> Any:
    """Import a public function from its module, the package of metrics, or look the version up."""
    if name == "__version__":
        from importlib.metadata import version  # as slow as the rest of this import

        return version("ddil")
    if name == "metrics":
        return import_module("ddil_eval.metrics")
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_SOURCES[name]), name)


def __dir__() -> list[str]:
    """List the public functions too before they are imported, so that a shell completes their names."""
    return sorted({*globals(), *__all__})
