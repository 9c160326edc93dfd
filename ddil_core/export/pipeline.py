"""The student as a pipeline folder, which ``DiffusionPipeline.from_pretrained`` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ddil_core.distillation.student import LORA_FILE
from ddil_core.export.finished import FinishedRun
from ddil_core.export.options import Options
from ddil_core.export.stock import StockCall, require_stock, stock_call
from ddil_core.models.weights import UNUSED, read_index, read_json
from ddil_core.support.checksums import MANIFEST
from ddil_core.support.files import write_text


def require(run: FinishedRun, options: Options) -> None:
    """Refuse a student that diffusers cannot sample. See ``stock.require_stock``."""
    require_stock(run)


def write(run: FinishedRun, folder: Path, options: Options) -> str:
    """Copy the student's pipeline with a scheduler that takes the student's own grid.

    The adapters of a LoRA are merged into the pipeline, and their own file is left out: it would be added twice.
    """
    run.model  # noqa: B018  # damaged weights are found before they are copied
    call = stock_call(run)
    copy_pipeline(run, call, folder, ignored=(MANIFEST, LORA_FILE))
    # diffusers needs an explicit None for a component that was saved as absent, such as SD3's T5
    absent = [name for name, value in read_index(folder).items() if value == [None, None] and name not in UNUSED]
    options_text = "".join(f", {name}=None" for name in absent)
    return f"""\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{options.name}"{options_text})
image = pipeline("a prompt", {call.text()}).images[0]
```
"""


def copy_pipeline(run: FinishedRun, call: StockCall, folder: Path, ignored: tuple[str, ...]) -> None:
    """Copy the student's pipeline without the files of the patterns ``ignored``, with the scheduler of ``call``.

    Configurations say where diffusers loaded the teacher from (``_name_or_path``). That path is left out.
    """
    shutil.copytree(run.student, folder, ignore=shutil.ignore_patterns(*ignored), dirs_exist_ok=True)
    call.scheduler.save_pretrained(folder / "scheduler")
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        content = {key: value for key, value in read_json(path).items() if key != "_name_or_path"}
        if path.parent == folder:
            content["scheduler"] = ["diffusers", type(call.scheduler).__name__]
        write_text(path, json.dumps(content, indent=2) + "\n")
