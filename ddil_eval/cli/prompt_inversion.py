"""``ddil eval prompt-inversion``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_eval.cli import choices, options
from ddil_eval.cli.experiment import run_experiment, starting_protocol


@click.command("prompt-inversion")
@click.option("--teacher", default=None, help=options.MODEL_HELP + " It inverts the images to prompts.")
@options.teacher_guidance_option
@click.option("--model", "models", multiple=True,
              help=options.MODEL_HELP + " Each model is a row, in place of the protocol's rows.")  # fmt: skip
@click.option("--data", type=choices.EVALUATION_DATA, default=None, help=options.DATA_HELP + " It needs no captions.")
@click.option(
    "--inverter",
    type=choices.INVERTER,
    default=None,
    help="The inverter that makes the prompts. The default is the protocol's.",
)
@click.option("--towers", default=None, metavar="DIR",
              help="A folder with the CLIP model that selects prompts. The shapes world brings its own.")  # fmt: skip
@click.option("--num-images", type=options.NUMBER, default=None, help="The number of images to invert.")
@click.option("--seed", type=options.SEED, default=None, help="The seed of all noise, in place of the protocol's.")
@click.option(
    "--out", type=options.OUTPUT_FOLDER, required=True, cls=options.RequiredUnlessPrinted, help="The results folder."
)
@options.size_options
@options.compute_options()
@options.deterministic_option
@options.protocol_options
@options.download_option
@options.device_option
@options.show_option
@options.quiet_option
@options.json_option
def prompt_inversion(
    models: tuple[str, ...], protocol: Path | None, settings: tuple[str, ...], out: Path, download: bool,
    device: str | None, show: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Invert images to prompts with the teacher, and generate images from these prompts with every system: Table 5.

    The command measures the diversity of each prompt's images, and how similar they are to the inverted image. After an
    interruption, the same command continues at the next image. If models, data or metrics are missing, the command
    names them and measures the rest.
    """
    from ddil_eval.experiments.experiments import EXPERIMENTS
    from ddil_eval.experiments.system_configs import system_rows

    content, source = starting_protocol(EXPERIMENTS["prompt-inversion"], protocol, settings)
    if models:
        content |= {"systems": system_rows(models), "differences": []}
    if given["inverter"] is not None:
        inverters = content.get("inverters", {})
        if isinstance(inverters, dict):  # validation refuses anything else
            content["inverters"] = {given["inverter"]: {}} | inverters
    run_experiment(
        EXPERIMENTS["prompt-inversion"], content, given, source, out, download, device, as_json, show_pictures=show
    )
