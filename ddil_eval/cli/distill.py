"""``ddil distill``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_core.support.errors import WrongCommand
from ddil_eval.cli import choices, options

if TYPE_CHECKING:
    from ddil_core.distillation.shipped import ChosenProtocol

SHARDS_HELP = " With it, shards of --data on the web are downloaded too, as many as the pool needs."


@click.command()
@click.option("--teacher", default="shapes", show_default=True, help=options.MODEL_HELP)
@click.option(
    "--method",
    type=choices.METHOD,
    default=None,
    help="The distillation method. The default is the method of --protocol, or pd.",
)
@click.option("--lora", is_flag=True, help="Train a LoRA in place of a whole student.")
@click.option(
    "--ddil/--no-ddil",
    default=True,
    show_default=True,
    help="Train on states of rollouts and on data (DDIL), or on data alone.",
)
@click.option(
    "--data",
    type=choices.TRAINING_DATA,
    default=None,
    help=options.TRAINING_DATA_HELP + " The default is the data of the teacher's world: shapes, or gaussians.",
)
@click.option(
    "--out", type=options.OUTPUT_FOLDER, required=True, cls=options.RequiredUnlessPrinted, help="The run folder."
)
@click.option("--resume", is_flag=True, help="Continue a run, and fail if the folder holds none.")
@click.option("--seed", type=options.SEED, default=None, help="The seed of the run, in place of the protocol's.")
@click.option(
    "--guidance",
    "guidance_scale",
    type=options.GuidanceType(),
    default=None,
    help="The guidance scale g: of the teacher (pd, dmd2), or at which the student is sampled (lcm). The default is "
    "the protocol's, or the teacher's own.",
)
@options.size_options
@options.compute_options("fp32", "bf16")
@options.deterministic_option
@options.protocol_options
@click.option("--download", is_flag=True, help=options.DOWNLOAD_HELP + SHARDS_HELP)
@options.device_option
@options.quiet_option
@options.json_option
def distill(
    teacher: str,
    method: str | None,
    lora: bool,
    ddil: bool,
    data: str | None,
    out: Path,
    resume: bool,
    seed: int | None,
    guidance_scale: float | None,
    protocol: Path | None,
    settings: tuple[str, ...],
    download: bool,
    device: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Distil a few-step student from a teacher.

    The command writes the student to OUT/student as a diffusers pipeline. After an interruption, the same command
    continues the run. On several GPUs: torchrun --nproc-per-node N -m ddil_eval.cli distill …
    """
    options.quiet_libraries()
    from ddil_core.distillation.distill import distill as run
    from ddil_core.distillation.shipped import ChosenProtocol, announce, world
    from ddil_core.models.sampling import SYSTEM_FILE, sampling_line
    from ddil_core.models.weights import read_json
    from ddil_core.support import ranks
    from ddil_core.support.compute import require_effect
    from ddil_core.support.progress import note
    from ddil_core.support.protocol import validate

    if protocol is None:  # the files of the teacher say which protocol fits
        options.fetch_missing([teacher], download)
    chosen = ChosenProtocol(protocol) if protocol is not None else _shipped(teacher, method or "pd", lora)
    content, model = configuration(chosen.path, method, lora, settings)
    _set_options(content, model, ddil, seed, guidance_scale)
    require_effect(given["dtype"], content)
    content |= {key: value for key, value in given.items() if value is not None}
    config: Any = validate(model, content, str(chosen.path))
    if ddil and config.ddil is None:
        raise WrongCommand(f"{chosen.path} has no 'ddil' section, which --ddil needs; add one, or use --no-ddil")
    options.print_if_asked(config, str(chosen.path))
    announce(chosen, teacher)
    options.fetch_missing([teacher], download)
    device = options.choose_device(device)
    student = run(teacher, data or world(teacher), config, out, resume=resume, device=device, download=download)
    if not ranks.is_main():
        return
    made = read_json(student / SYSTEM_FILE)
    used = {key: made[key] for key in ("steps", "solver", "guidance_scale")}
    note(sampling_line(f"{out}, the student", used))
    if as_json:
        options.emit(
            {"run": str(out), "student": str(student), "steps": made["steps"], "protocol": str(chosen.path)}
            | {"sampling": used, "teacher": {"reference": teacher, **made.get("teacher", {})}}
        )
    else:
        options.say(f"The student is in {student}; sample it with: ddil sample --model {out} --prompt '…' --out images")


def _set_options(
    content: dict[str, Any], model: Any, ddil: bool, seed: int | None, guidance_scale: float | None
) -> None:
    """Put the values of the command's options into the content of a protocol. ``model`` is its configuration's class.

    Raises:
        WrongCommand: A LoRA that learns a range of guidance scales has no scale of its own.
    """
    if not ddil:
        content.pop("ddil", None)
    if seed is not None:
        content["seed"] = seed
    if guidance_scale is not None:
        if content.get("lora") is not None and "guidance_range" in model.model_fields:
            raise WrongCommand(
                "a LoRA has its guidance built in, so that --guidance has no effect; say --set 'guidance_range=[G, G]'"
            )
        content["guidance_scale"] = guidance_scale


def configuration(path: Path, method: str | None, lora: bool, settings: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """Return the content of a protocol after ``--set``, and the class of its configuration.

    Raises:
        WrongCommand: The protocol is for another method or trains no LoRA, or its method does not exist.
    """
    from ddil_core.distillation.methods import method_of
    from ddil_core.support.protocol import override, read_yaml

    content = read_yaml(path)
    row = method_of(content, str(path))
    if lora:
        if "lora" not in row.config.model_fields:
            raise WrongCommand(f"the method {row.name!r} trains no LoRA; leave out --lora, or use --method lcm")
        content |= {"lora": content.get("lora") or {}, **dict.fromkeys(row.config.WITHOUT_LORA)}
    content = override(content, settings)
    row = method_of(content, str(path))
    if method not in (None, row.name):
        raise WrongCommand(
            f"{path} is a protocol for the method {row.name!r}, not {method!r}; "
            "leave out --method, or name another protocol"
        )
    if lora and content.get("lora") is None:
        raise WrongCommand("--lora trains a LoRA, and --set takes its section away; leave out one of the two")
    return content, row.config


def _shipped(teacher: str, method: str, lora: bool) -> ChosenProtocol:
    """Return the shipped protocol of a method for a teacher.

    Raises:
        WrongCommand: The method has no LoRA or no shipped protocol.
    """
    from ddil_core.distillation.methods import METHODS
    from ddil_core.distillation.shipped import shipped_protocol

    shipped = shipped_protocol(teacher, method, "-lora" * lora)
    if shipped is not None:
        return shipped
    if lora and "lora" in METHODS[method].config.model_fields:
        raise WrongCommand(f"no shipped protocol trains a LoRA of {teacher!r}; leave out --lora, or name a protocol")
    if lora and shipped_protocol(teacher, method) is not None:
        raise WrongCommand(f"the method {method!r} trains no LoRA; leave out --lora, or use --method lcm")
    raise WrongCommand(f"the method {method!r} has no shipped protocol; name one with --protocol")
