"""``ddil eval prompt-inversion``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_eval.cli import options
from ddil_eval.cli.experiment import run_experiment, starting_protocol


@click.command("prompt-inversion")
@click.option("--teacher", default=None, help=options.MODEL_HELP + " Prompts are inverted on it.")
@click.option("--model", "models", multiple=True,
              help=options.MODEL_HELP + " Each is a row, in place of the protocol's.")  # fmt: skip
@click.option("--data", default=None, help=options.DATA_HELP + " Captions are not needed.")
@click.option("--inverter", default=None, help="Whose prompts the systems draw from: ph2p, pez or random.")
@click.option("--towers", default=None, metavar="DIR",
              help="A folder with the CLIP that chooses prompts by their pictures; the shapes world has its own.")  # fmt: skip
@click.option("--num-images", type=options.NUMBER, default=None, help="How many pictures are inverted.")
@click.option("--seed", type=options.SEED, default=None, help="The seed of all noise, in place of the protocol's.")
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, help="The results folder.")
@options.protocol_options
@options.download_option
@options.device_option
@options.json_option
def prompt_inversion(
    models: tuple[str, ...], protocol: Path | None, settings: tuple[str, ...], out: Path, download: bool,
    device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Invert pictures to prompts on the teacher, and let every system draw from them: Table 5.

    Measured are the diversity of each prompt's pictures, and how near they are to the picture that was inverted. A stopped
    inversion goes on at the next picture with the same command. What is not here is named, and the rest is measured.
    """
    from ddil_eval.experiments.experiments import EXPERIMENTS
    from ddil_eval.experiments.system_configs import system_rows

    content, source = starting_protocol(EXPERIMENTS["prompt-inversion"], protocol, settings)
    if models:
        content |= {"systems": system_rows(models), "differences": []}
    if given["inverter"] is not None:
        inverters = content.get("inverters", {})
        content["inverters"] = {given["inverter"]: {}} | inverters if isinstance(inverters, dict) else inverters
    run_experiment(EXPERIMENTS["prompt-inversion"], content, given, source, out, download, device, as_json)
