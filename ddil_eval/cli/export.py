"""``ddil export``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddil_eval.cli import choices, options

if TYPE_CHECKING:
    from ddil_core.export.card import Measured
    from ddil_core.export.finished import FinishedRun


@click.command()
@click.argument("run", type=options.INPUT)
@click.option("--to", required=True, type=choices.FORMAT, help="The format.")
@click.option("--out", type=options.OUTPUT, default=None, metavar="DIR",
              help="The folder to write. It must not exist.  [default: RUN/export/FORMAT]")  # fmt: skip
@click.option("--name", default=None, help="The name of the student, which its files get.  [default: RUN's name]")
@click.option("--results", type=options.INPUT, default=None, metavar="DIR",
              help="Records whose measurements of this student and its teacher go into the card.")  # fmt: skip
@click.option("--checkpoint", default=None, metavar="FILE",
              help="The name of the base's checkpoint in ComfyUI, for the workflow of a LoRA.")  # fmt: skip
@options.quiet_option
@options.json_option
def export(
    run: Path, to: str, out: Path | None, name: str | None, results: Path | None, checkpoint: str | None, as_json: bool
) -> None:
    """Write the student of a finished run in the format of another program, with a model card.

    diffusers: a pipeline folder. single-file: one checkpoint in the original key layout of Stable Diffusion 1, 2 or XL.
    lora: the adapters of a LoRA, in diffusers' and in kohya's key layouts. comfyui: a workflow and its weights.

    Each format says how the student is sampled. The command refuses a student that the other program would sample in
    another way. The model card is README.md; it takes measurements from the records of --results, by the hash of the
    weights.
    """
    options.quiet_libraries()
    from ddil_core.export.card import CARD
    from ddil_core.export.export import export as write
    from ddil_core.export.export import prepare

    out = out or run / "export" / to
    finished, chosen = prepare(run, to, out, name, checkpoint)
    done = write(finished, chosen, to, out, None if results is None else _measured(finished, results))
    if as_json:
        return options.emit({"run": str(run), "to": to} | asdict(done) | {"folder": str(done.folder)})
    for file in done.files:
        options.say(f"wrote {out / file}", err=True)
    options.say(f"The student is in {out}; {CARD} says how to sample it.")


def _measured(finished: FinishedRun, results: Path) -> Measured:
    """Return what the records of a folder say about the student. Warn where they say nothing.

    Raises:
        DdilError: A record is damaged.
    """
    from ddil_core.support.progress import warn
    from ddil_eval.report.model_card import measured_of
    from ddil_eval.report.records import read_records

    teacher = finished.content.get("teacher_sha256")
    found = measured_of(read_records(results), finished.model.weights_sha256(), teacher)
    if not found.tables:
        warn(
            f"no record in {results} measured this student's weights, so its card has no table; measure it with: "
            f"ddil eval systems --model {finished.folder} --data REF --out {results}"
        )
    return found
