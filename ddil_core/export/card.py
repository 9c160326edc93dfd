"""The model card: README.md in the hub's format, written from a run and from what was measured. Nothing is invented."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from ddil_core.export.base import base_of, last_part
from ddil_core.export.finished import FinishedRun
from ddil_core.export.options import Options
from ddil_core.models.catalogue import UNVERIFIED
from ddil_core.support.files import write_text
from ddil_core.support.text import printable

CARD = "README.md"
_TEMPLATE = "card.md.j2"


@dataclass(frozen=True)
class Measured:
    """What was measured of a student and its teacher.

    Attributes:
        tables: Tables in Markdown.
        others: The number of the student's records that no table shows.
    """

    tables: tuple[str, ...] = ()
    others: int = 0


def write_card(run: FinishedRun, folder: Path, kind: str, options: Options, use: str, measured: Measured) -> None:
    """Write the model card of an export.

    Args:
        run: The run.
        folder: The folder of the export.
        kind: The name of the format.
        options: The name of the student, and what else the user chose.
        use: How to sample the student in this format, in Markdown.
        measured: What was measured.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    source = (files("ddil_core.export") / _TEMPLATE).read_text(encoding="utf-8")
    facts = _facts(run) | {"kind": kind, "name": options.name, "use": use.strip(), "measured": measured}
    facts["header"] = yaml.safe_dump(_header(run, kind), sort_keys=False, allow_unicode=True).strip()
    write_text(folder / CARD, environment.from_string(source).render(facts))


def _header(run: FinishedRun, kind: str) -> dict[str, Any]:
    """Return the keys that the hub reads. A licence that nobody read is "unknown", the hub's word for it."""
    base, lora = base_of(run.content["teacher"]), run.lora is not None
    adapts = lora and kind == "lora"
    header: dict[str, Any] = {"license": base.licence or "unknown"}
    if base.hub is not None:
        header |= {"base_model": base.hub, "base_model_relation": "adapter" if adapts else "finetune"}
    tags = ["diffusers", "safetensors", "distillation", "few-step", f"ddil-{run.method.name}"]
    tags += ["lora"] * adapts + ["comfyui"] * (kind == "comfyui")
    return header | {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}


def _facts(run: FinishedRun) -> dict[str, Any]:
    """Return what the run says about itself."""
    content, model = run.content, run.model
    base, config = base_of(content["teacher"]), content["config"]
    head, colon, tail = str(content["data"]).partition(":")
    used = run.settings.get("teacher") or {}
    return {
        "run": run,
        "base": base,
        "licence": base.licence or UNVERIFIED,
        "data": f"{head}:{last_part(tail)}" if colon else head,
        "ddil": config.get("ddil") is not None,
        "lora": run.lora is not None,
        "teacher_use": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in used.items()),
        "size": "{1} × {0}".format(*model.image_size),
        "weights": model.weights_sha256(),
        "versions": content.get("versions") or {},
        "settings": yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
    }


def _cell(value: object) -> str:
    """Return text for a cell of a Markdown table, on one line, in which no character has a meaning of its own."""
    text = printable(str(value)).replace("\n", " ")
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
