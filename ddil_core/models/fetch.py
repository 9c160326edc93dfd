"""Fetch the files of a model from the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ddil_core.models.hub import ProgressBar, download_files
from ddil_core.models.references import advise_conversion, has_own_weights, hub_parts, is_here, resolve
from ddil_core.models.weights import PICKLES
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_core.support.progress import note, transfer


def fetch_model(
    reference: str,
    variant: str | None = None,
    say: Callable[[str], None] = note,
    bar: ProgressBar = transfer,
    *,
    weights: bool = True,
) -> None:
    """Fetch the files that a reference needs from the hub and that are not here.

    Args:
        reference: A reference to a model on the hub, or to a named system with files on the hub.
        variant: The preferred set of weights, such as ``fp16``.
        say: Receives one line for each repository with the size of the download, before the download starts.
        bar: Shows the progress of the download.
        weights: False to fetch only the configuration, which is enough for NAME:FILE with a single-file checkpoint.

    Raises:
        WrongCommand: the reference needs nothing from the hub.
        DdilError: see :func:`ddil_core.models.hub.plan_download` and :func:`ddil_core.models.hub.download_files`.
    """
    parts = hub_parts(reference)
    if not parts:
        resolve(reference)  # raises an error if the reference names no files at all
        raise WrongCommand(f"the model {reference!r} is not on a hub, so there is nothing to fetch")
    weights = weights and not has_own_weights(reference)
    pickles = [part for part in parts if part.file and part.file.endswith(PICKLES)]
    plans = [(part, part.plan(variant, weights)) for part in parts if part not in pickles]
    for _, plan in plans:
        say(str(plan))
    for part, plan in plans:
        if plan.missing or part.path() is None:  # the files may be here under the name of another revision
            download_files(plan, bar)
    if pickles:
        raise DdilError(advise_conversion(reference, pickles[0]))


def fetch_missing(references: Iterable[str], variant: str | None = None) -> None:
    """Fetch the models that are not here. Of several processes only the main one fetches.

    Raises:
        WrongCommand: see :func:`fetch_model`.
        DdilError: see :func:`fetch_model`.
    """
    with ranks.main_first():
        for reference in references:
            if hub_parts(reference) and not is_here(reference, variant):
                fetch_model(reference, variant)
