"""``ddil eval prompt-inversion``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_core.support import ranks
from ddil_eval.cli import options


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
    from ddil_core.support.protocol import override, read_yaml
    from ddil_core.support.resources import protocols
    from ddil_eval.experiments.coco import rows

    path = protocol or protocols() / "shapes" / "table5.yaml"
    content = override(read_yaml(path), settings)
    if models:
        content |= {"systems": rows(models), "differences": []}
    if given["inverter"] is not None:
        told = content.get("inverters", {})
        content["inverters"] = {given["inverter"]: {}} | told if isinstance(told, dict) else told
    invert_and_measure(content, given, str(path), out, download, device, as_json)


def invert_and_measure(
    content: dict[str, Any], given: dict[str, Any], source: str, out: Path, download: bool, device: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Carry out a protocol with what a command's options give over it, and show the tables."""
    ranks.require_one("prompt inversion")
    options.quiet_libraries()
    from ddil_core.support.lock import held
    from ddil_core.support.protocol import validate
    from ddil_eval.cli.output import show
    from ddil_eval.experiments.prompt_inversion import InversionConfig, measure_inversion, plan_inversion

    given = {key: value for key, value in given.items() if value is not None}
    config = validate(InversionConfig, content | given, source, options=given)
    options.fetch_missing([config.teacher, *(system.model for system in config.systems)], download)
    found = plan_inversion(config)
    for name, error in found.absent.items():
        click.echo(f"not here: {name}: {error}", err=True)
    with held(out):
        show(
            measure_inversion(found, out, options.choose_device(device)),
            out,
            as_json,
            "Records, prompts and pictures are in",
        )
