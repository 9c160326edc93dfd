"""``ddil distill``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ddil_core.support.errors import WrongCommand
from ddil_eval.cli import choices, options

SHARDS_HELP = " With it, shards of --data on the web are downloaded too, as many as the pool needs."


@click.command()
@click.option("--teacher", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option(
    "--method",
    type=choices.METHOD,
    default=None,
    help="The distillation method. The default is the method of --protocol, or pd.",
)
@click.option("--lora", is_flag=True, help="Train a LoRA in place of a whole student (method lcm).")
@click.option(
    "--ddil/--no-ddil",
    default=True,
    show_default=True,
    help="Train on states of rollouts and on data (DDIL), or on data alone.",
)
@click.option(
    "--data", type=choices.TRAINING_DATA, default="shapes", show_default=True, help=options.TRAINING_DATA_HELP
)
@click.option(
    "--out", type=options.OUTPUT_FOLDER, required=True, cls=options.RequiredUnlessPrinted, help="The run folder."
)
@click.option("--resume", is_flag=True, help="Continue a run, and fail if the folder holds none.")
@click.option("--seed", type=options.SEED, default=None, help="The seed of the run, in place of the protocol's.")
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

    The command writes the student to OUT/student as a diffusers pipeline. After an interruption, the same command
    continues the run. On several GPUs: torchrun --nproc-per-node N -m ddil_eval.cli distill …
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
        raise WrongCommand(f"{path} has no 'ddil' section, which --ddil needs; add one, or use --no-ddil")
    options.print_if_asked(config, str(path))
    options.fetch_missing([teacher], download)
    device = options.choose_device(device)
    student = run(teacher, data, config, out, resume=resume, device=device, download=download)
    if not ranks.is_main():
        return
    if as_json:
        steps = json.loads((student / SYSTEM_FILE).read_text(encoding="utf-8"))["steps"]
        options.emit({"run": str(out), "student": str(student), "steps": steps})
    else:
        click.echo(f"The student is in {student}; sample it with: ddil sample --model {out} --prompt '…' --out images")


def configuration(
    method: str | None, lora: bool, protocol: Path | None, settings: tuple[str, ...]
) -> tuple[Path, dict[str, Any], Any]:
    """Return the path of the protocol, its content after ``--set``, and the class of its configuration.

    Raises:
        WrongCommand: The method has no LoRA or no shipped protocol, the protocol is for another method, or its method
            does not exist.
    """
    from ddil_core.distillation.methods import default_protocol, method_of
    from ddil_core.support.protocol import override, read_yaml

    path = protocol or default_protocol(method or "pd", "-lora" * lora)
    if path is None and default_protocol(method or "pd") is not None:
        raise WrongCommand(f"the method {method or 'pd'!r} trains no LoRA; leave out --lora, or use --method lcm")
    if path is None:
        raise WrongCommand(f"the method {method!r} has no shipped protocol; name one with --protocol")
    content = read_yaml(path)
    row = method_of(content, str(path))
    if lora:
        if "lora" not in row.config.model_fields:
            raise WrongCommand(f"the method {row.name!r} trains no LoRA; leave out --lora, or use --method lcm")
        content |= {"lora": content.get("lora") or {}, "w_embedding": None}
    content = override(content, settings)
    row = method_of(content, str(path))
    if method not in (None, row.name):
        raise WrongCommand(
            f"{path} is a protocol for the method {row.name!r}, not {method!r}; "
            "leave out --method, or name another protocol"
        )
    if lora and content.get("lora") is None:
        raise WrongCommand("--lora trains a LoRA, and --set takes its section away; leave out one of the two")
    return path, content, row.config
