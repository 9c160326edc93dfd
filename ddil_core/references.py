"""Models by reference: ``shapes``, a folder in diffusers' pipeline layout, a run folder of ``ddil distill``, or a cached hub id."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ddil_core.errors import WrongCommand

SHIPPED = {"shapes": Path(__file__).parent / "shapes" / "weights" / "teacher"}


def resolve(reference: str) -> Path:
    """The pipeline folder that a reference names."""
    if reference in SHIPPED:
        return _require_pipeline(SHIPPED[reference], reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        if (path / "run.yaml").is_file():
            return _require_pipeline(path / "student", reference)
        return _require_pipeline(path, reference)
    cached = _cached(reference)
    if cached is not None:
        return _require_pipeline(cached, reference)
    nearest = difflib.get_close_matches(reference, SHIPPED, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    raise WrongCommand(
        f"the model {reference!r} is not known: it may be {', '.join(SHIPPED)}, a folder in diffusers' pipeline layout, "
        f"a run folder of 'ddil distill', or the id of a hub model whose files are cached here{hint}"
    )


def _cached(reference: str) -> Path | None:
    """The snapshot of a hub id in the local cache; nothing is ever downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(reference, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _require_pipeline(folder: Path, reference: str) -> Path:
    if (folder / "model_index.json").is_file():
        return folder
    if reference in SHIPPED:
        what = "is not in this checkout; train it with: python -m ddil_core.shapes.train"
    elif folder.name == "student" and (folder.parent / "run.yaml").is_file():
        what = "is a run that has no student yet; finish it with 'ddil distill … --resume'"
    else:
        what = "is a folder but no pipeline, as it has no model_index.json; name one in diffusers' pipeline layout"
    raise WrongCommand(f"the model {reference!r} {what}")


def listing() -> list[dict[str, Any]]:
    """The models that have a name, for ``ddil models``."""
    rows = []
    for name, folder in SHIPPED.items():
        here = (folder / "model_index.json").is_file()
        rows.append(
            {
                "name": name,
                "description": "the shipped teacher of the shapes world: 64 px, v-prediction, guided",
                "source": "shipped with the package",
                "here": here,
                "needs": "" if here else "train it: python -m ddil_core.shapes.train",
            }
        )
    return rows
