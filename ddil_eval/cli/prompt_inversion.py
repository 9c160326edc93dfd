"""``ddil eval prompt-inversion``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_core.support import ranks
from ddil_eval.cli import choices, options


@click.command("prompt-inversion")
@click.option("--teacher", default=None, help=options.MODEL_HELP + " It inverts the images to prompts.")
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
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, help="The results folder.")
@options.protocol_options
@options.download_option
@options.device_option
@options.json_option
def prompt_inversion(
    models: tuple[str, ...], protocol: Path | None, settings: tuple[str, ...], out: Path, download: bool,
    device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Invert images to prompts with the teacher, and generate images from these prompts with every system: Table 5.

    The command measures the diversity of each prompt's images, and how similar they are to the inverted image. After an
    interruption, the same command continues at the next image. If models, data or metrics are missing, the command names
    them and measures the rest.
    """
    from ddil_core.support.protocol import override, read_yaml
    from ddil_core.support.resources import protocols
    from ddil_eval.experiments.coco import rows

    path = protocol or protocols() / "shapes" / "table5.yaml"
    content = override(read_yaml(path), settings)
    if models:
        content |= {"systems": rows(models), "differences": []}
    if given["inverter"] is not None:
        inverters = content.get("inverters", {})
        if isinstance(inverters, dict):  # validation refuses anything else
            content["inverters"] = {given["inverter"]: {}} | inverters
    invert_and_measure(content, given, str(path), out, download, device, as_json)


def invert_and_measure(
    content: dict[str, Any], given: dict[str, Any], source: str, out: Path, download: bool, device: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Run the experiment and print its tables.

    Args:
        content: The protocol.
        given: Values of options, which replace keys of the protocol; None leaves a key as it is.
        source: The name of the protocol, for messages.
        out: The results folder.
        download: Whether missing models may be downloaded.
        device: The device, or None for the best one.
        as_json: Whether to print the records as JSON in place of tables.
    """
    ranks.require_one("prompt inversion")
    options.quiet_libraries()
    from ddil_core.support.lock import held
    from ddil_core.support.protocol import validate
    from ddil_eval.cli.output import show
    from ddil_eval.experiments.prompt_inversion import InversionConfig, measure_inversion, plan_inversion

    given = {key: value for key, value in given.items() if value is not None}
    config = validate(InversionConfig, content | given, source, options=given)
    options.fetch_missing([config.teacher, *(system.model for system in config.systems)], download)
    plan = plan_inversion(config)
    for name, error in plan.absent.items():
        click.echo(f"not here: {name}: {error}", err=True)
    with held(out):
        records = measure_inversion(plan, out, options.choose_device(device))
        show(records, out, as_json, "Records, prompts and images are in")
