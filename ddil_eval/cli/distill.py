"""``ddil distill``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddil_core.support.errors import WrongCommand
from ddil_eval.cli import options

SHARDS_HELP = " Shards of --data on the web are fetched too, as many as the pool needs."


@click.command()
@click.option("--teacher", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option("--method", default=None, help="The distiller: pd, lcm or dmd2; by default the protocol's, or pd.")
@click.option("--lora", is_flag=True, help="Train a LoRA in place of a whole student (lcm).")
@click.option(
    "--ddil/--no-ddil", default=True, show_default=True, help="Train on aggregated states too, or on data alone."
)
@click.option("--data", default="shapes", show_default=True, help=options.TRAINING_DATA_HELP)
@click.option("--out", type=options.OUTPUT_FOLDER, required=True, help="The run folder.")
@click.option("--resume", is_flag=True, help="Insist that the folder holds this run already.")
@click.option("--seed", type=options.SEED, default=None, help="The run's seed, in place of the protocol's.")
@options.protocol_options
@click.option("--download", is_flag=True, help=options.DOWNLOAD_HELP + SHARDS_HELP)
@options.device_option
@options.json_option
def distill(
    teacher: str,
    method: str | None,
    lora: bool,
    ddil: bool,
    data: str,
    out: Path,
    resume: bool,
    seed: int | None,
    protocol: Path | None,
    settings: tuple[str, ...],
    download: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Distil a few-step student from a teacher.

    The student is written to OUT/student as a diffusers pipeline. The same command again goes on where it was interrupted.
    On several GPUs: torchrun --nproc-per-node N -m ddil_eval.cli distill …
    """
    options.quiet_libraries()
    from ddil_core.distillation.distill import distill as run
    from ddil_core.models.sampling import SYSTEM_FILE
    from ddil_core.support import ranks
    from ddil_core.support.protocol import validate

    path, content, model = configuration(method, lora, protocol, settings)
    if not ddil:
        content.pop("ddil", None)
    if seed is not None:
        content["seed"] = seed
    config: Any = validate(model, content, str(path))
    if ddil and config.ddil is None:
        raise WrongCommand(f"{path} has no 'ddil' section, which --ddil needs; add one or say --no-ddil")
    options.fetch_missing([teacher], download)
    device = options.choose_device(device)
    student = run(teacher, data, config, out, resume=resume, device=device, download=download)
    if not ranks.is_main():
        return
    if as_json:
        steps = json.loads((student / SYSTEM_FILE).read_text(encoding="utf-8"))["steps"]
        options.emit({"run": str(out), "student": str(student), "steps": steps})
    else:
        click.echo(f"The student is in {student}; see it with: ddil sample --model {out} --prompt '…' --out pictures")


def configuration(
    method: str | None, lora: bool, protocol: Path | None, settings: tuple[str, ...]
) -> tuple[Path, dict[str, Any], Any]:
    """The protocol's path, its content with the settings over it, and the model that it must fit.

    Raises:
        WrongCommand: there is no such method, it has no LoRA, or the protocol is another method's.
    """
    from ddil_core.distillation.methods import METHODS, default_protocol, method_of
    from ddil_core.support.protocol import override, read_yaml

    if method is not None:
        METHODS.find(method)
    path = protocol or default_protocol(method or "pd", "-lora" * lora)
    if path is None and default_protocol(method or "pd") is not None:
        raise WrongCommand(f"the method {method or 'pd'!r} trains no LoRA; leave --lora out, or say --method lcm")
    if path is None:
        raise WrongCommand(f"the method {method!r} brings no protocol; name one with --protocol FILE")
    content = override(read_yaml(path), settings)
    row = method_of(content, str(path))
    if method not in (None, row.name):
        raise WrongCommand(
            f"{path} is a protocol of the method {row.name!r}, not {method!r}; leave --method out or take another"
        )
    if lora and not content.get("lora"):
        raise WrongCommand(f"{path} has no 'lora' section, which --lora needs; add one or leave --lora out")
    return path, content, row.config
