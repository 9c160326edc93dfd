"""``ddil eval``: one sub-command for each experiment, and ``run`` for a whole protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_core.support.paths import output_folder
from ddil_eval.cli import choices, options
from ddil_eval.cli.experiment import run_experiment, starting_protocol
from ddil_eval.cli.output import show
from ddil_eval.cli.prompt_inversion import prompt_inversion

RESULTS = options.OUTPUT_FOLDER
RECIPE_HELP = "How to prepare images, and the reference (see protocols/recipes.yaml). The default is the data set's."
METRICS_HELP = "The metrics to measure (see 'ddil metrics'). The default is the recipe's."

recipe_option = click.option("--recipe", default=None, help=RECIPE_HELP)
metrics_option = click.option("--metrics", type=choices.METRICS, default=None, help=METRICS_HELP)
reference_images_option = click.option(
    "--reference-images", "--reference-pictures", "reference_images", type=options.NUMBER, default=None,
    help="The number of reference images. The default is the recipe's number; 'score' takes all images of a folder.",
)  # fmt: skip
save_option = click.option(
    "--save-images", is_flag=True, help="Keep the images in OUT/images with an index, so that they can be scored again."
)


class ExperimentGroup(click.Group):
    """The sub-commands of the experiments. A command's former name still works, and no help page lists it."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command by its name or by a former name."""
        return super().get_command(ctx, "systems" if cmd_name == "coco" else cmd_name)


class RunCommand(click.Command):
    """``ddil eval run``, which lists the experiments at the end of its help page."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the name and the title of each experiment."""
        from ddil_eval.experiments.experiments import EXPERIMENTS

        with formatter.section("Experiments"):
            formatter.write_dl([(name, row.title) for name, row in EXPERIMENTS.items()])


@click.group(name="eval", cls=ExperimentGroup)
def evaluate() -> None:
    """Measure models and write records to OUT/records, one JSON file for each cell."""


evaluate.add_command(prompt_inversion)


@evaluate.command("covariate-shift")
@click.option("--teacher", default=None, help=options.MODEL_HELP + " The default is the protocol's, or shapes.")
@click.option("--student", required=True, help=options.MODEL_HELP)
@click.option("--data", type=choices.EVALUATION_DATA, default=None, help=options.DATA_HELP)
@options.teacher_guidance_option
@recipe_option
@click.option(
    "--p-teacher", default=None, metavar="P,P,…", help="Probabilities that the teacher acts at a transition (Table 2)."
)
@click.option(
    "--switch", default=None, metavar="T,T,…", help="Times at which one model hands over to the other (Tables 3, 4)."
)
@click.option(
    "--num-prompts", "--num-images", "num_prompts", type=options.NUMBER, default=None,
    help="The number of prompts from the evaluation split. Each gives one image along each string.",
)  # fmt: skip
@reference_images_option
@metrics_option
@click.option(
    "--factorial",
    is_flag=True,
    default=None,
    help="Measure all strings of teacher and student, with main effects and interactions.",
)
@click.option(
    "--drift", is_flag=True, default=None,
    help="Measure drift too (see 'ddil eval drift'), on the same rollouts: both cost little more than one.",
)  # fmt: skip
@click.option(
    "--seed",
    type=options.SEED,
    default=None,
    help="The seed of the noise and of the random choices, in place of the protocol's.",
)
@click.option("--out", type=RESULTS, required=True, cls=options.RequiredUnlessPrinted, help="The results folder.")
@options.size_options
@options.compute_options()
@options.deterministic_option
@options.protocol_options
@options.download_option
@options.device_option
@options.show_option
@options.quiet_option
@options.json_option
def covariate_shift(
    p_teacher: str | None, switch: str | None, out: Path, protocol: Path | None,
    settings: tuple[str, ...], download: bool, device: str | None, show: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Let teacher and student take turns: Tables 2, 3, 4 and Figure 2.

    For each prompt the command samples along several strings of teacher and student. Strings with the same beginning
    share its computation. After an interruption, the same command continues.
    """
    from ddil_eval.experiments.experiments import EXPERIMENTS

    given["p_teacher"] = options.numbers(p_teacher, float, "--p-teacher")
    given["switch"] = options.numbers(switch, options.time, "--switch")
    experiment = EXPERIMENTS["covariate-shift"]
    content, source = starting_protocol(experiment, protocol, settings, given["teacher"])
    run_experiment(experiment, content, given, source, out, download, device, as_json, show_pictures=show)


@evaluate.command("drift")
@click.option("--teacher", default=None, help=options.MODEL_HELP + " The default is the protocol's, or shapes.")
@click.option(
    "--student",
    "students",
    multiple=True,
    help=options.MODEL_HELP + " Students on the same grid are compared with each other.",
)
@click.option(
    "--group", "groups", multiple=True, metavar="NAME=REF,REF,…",
    help="Students that differ in the seed of their training alone. Later groups are compared with the first one, with "
    "intervals over seeds and prompts. The same place in two groups is the same seed.",
)  # fmt: skip
@click.option("--data", type=choices.EVALUATION_DATA, default=None, help=options.DATA_HELP)
@click.option("--num-prompts", type=options.NUMBER, default=None, help="The number of prompts, each with its image.")
@options.teacher_guidance_option
@click.option("--seed", type=options.SEED, default=None, help="The seed of the noise, in place of the protocol's.")
@click.option("--out", type=RESULTS, required=True, cls=options.RequiredUnlessPrinted, help="The results folder.")
@options.size_options
@options.compute_options()
@options.deterministic_option
@options.protocol_options
@options.download_option
@options.device_option
@options.quiet_option
@options.json_option
def drift(
    students: tuple[str, ...], groups: tuple[str, ...], out: Path, protocol: Path | None, settings: tuple[str, ...],
    download: bool, device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Measure covariate shift itself, at every transition of a student's grid.

    The command compares the student with its teacher on forward-diffused data, on the teacher's rollouts and on the
    student's own. The covariate-shift ratio is the disagreement on its own states over that on data. After an
    interruption, the same command continues.
    """
    from ddil_eval.experiments.experiments import EXPERIMENTS

    given |= {"students": students or None, "groups": options.groups(groups) or None}
    content, source = starting_protocol(EXPERIMENTS["drift"], protocol, settings, given["teacher"])
    run_experiment(EXPERIMENTS["drift"], content, given, source, out, download, device, as_json)


@evaluate.command("systems")
@click.option("--model", "models", multiple=True, required=True, help=options.MODEL_HELP + " Each model is a row.")
@click.option("--data", type=choices.EVALUATION_DATA, required=True, help=options.DATA_HELP)
@recipe_option
@click.option("--prompts", default=None, metavar="FILE",
              help="A list of prompts (.txt, .jsonl, .csv) in place of the data set's prompts.")  # fmt: skip
@click.option(
    "--steps", type=options.COUNT, default=None, help="The number of solver steps. The default is each model's own."
)
@click.option("--solver", type=choices.SOLVER, default=None, help="The solver. The default is each model's own.")
@options.guidance_option
@options.reflection_option
@click.option("--num-images", "--num-prompts", "num_prompts", type=options.Whole(4), default=None,
              help="The number of images, one for each prompt. The default is the recipe's.")  # fmt: skip
@reference_images_option
@metrics_option
@click.option("--seed", type=options.SEED, default=None, help="The seed of the noise.")
@click.option("--out", type=RESULTS, required=True, cls=options.RequiredUnlessPrinted, help="The results folder.")
@save_option
@options.size_options
@options.compute_options()
@options.deterministic_option
@options.protocol_options
@options.download_option
@options.device_option
@options.quiet_option
@options.json_option
def systems(
    models: tuple[str, ...], steps: int | None, solver: str | None, guidance_scale: float | None,
    reflection: str | None, out: Path, save_images: bool, protocol: Path | None, settings: tuple[str, ...],
    download: bool, device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Measure models on COCO, or on other captioned images, by a recipe.

    Each model generates one image for each prompt, with its own sampling settings. The command computes all metrics of
    the recipe, and the paired differences of the other models from the first. After an interruption, the same command
    continues and keeps finished images. On several GPUs, start the command with torchrun.
    """
    options.quiet_libraries()
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_eval.experiments.engine import differences_from_first
    from ddil_eval.experiments.system_configs import system_rows
    from ddil_eval.experiments.systems import SystemsConfig, compare_systems

    content = override({} if protocol is None else read_yaml(protocol), settings)
    given = {key: value for key, value in given.items() if value is not None}
    rows = system_rows(models, steps=steps, solver=solver, guidance_scale=guidance_scale, reflection=reflection)
    # the models replace the rows of the protocol, and so its differences between rows
    content |= given | {"systems": rows, "differences": differences_from_first(models)}
    source = "the command" if protocol is None else str(protocol)
    config = validate(SystemsConfig, content, source, options=given)
    options.print_if_asked(config, source)
    options.fetch_missing(models, download)
    show(compare_systems(config, out, options.choose_device(device), save_images=save_images), out, as_json)


@evaluate.command("run", cls=RunCommand)
@click.argument("protocol", type=options.PROTOCOL)
@click.option(
    "--data", type=choices.EVALUATION_DATA, default=None, help=options.DATA_HELP + " It replaces the protocol's."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
@options.print_option
@click.option("--seed", type=options.SEED, default=None, help="The seed of the noise, in place of the protocol's.")
@click.option(
    "--out", type=RESULTS, default=None, help="The results folder.  [default: results/FOLDER-NAME of the protocol]"
)
@options.size_options
@options.compute_options()
@options.deterministic_option
@save_option
@options.download_option
@options.device_option
@options.quiet_option
@options.json_option
def run(
    protocol: Path, settings: tuple[str, ...], out: Path | None, save_images: bool, download: bool, device: str | None,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Run the experiment of a protocol, such as a comparison of systems for a whole table.

    A comparison samples each system with the system's own settings, unless its row says otherwise. If weights, data or
    networks are missing, the command first says what to provide, and then measures the rest. If nothing can be
    measured, the exit status is 1. After you provide more, the same command measures the new rows.
    """
    options.quiet_libraries()
    from ddil_core.support.errors import WrongCommand
    from ddil_core.support.protocol import override, read_yaml
    from ddil_eval.experiments.experiments import find_experiment

    content = override(read_yaml(protocol), settings)
    experiment = find_experiment(content.get("experiment", "systems"))
    given = {key: value for key, value in given.items() if value is not None}
    for key in given.keys() - experiment.config.model_fields.keys():
        raise WrongCommand(f"the experiment {experiment.name!r} has no {key}; leave out --{key}")
    out = out or _results(protocol)
    run_experiment(experiment, content, given, str(protocol), out, download, device, as_json, save_images=save_images)


@evaluate.command("score")
@click.argument("folders", nargs=-1, required=True)
@click.option("--reference", required=True, help="A folder of images, or a data set (see 'ddil data').")
@recipe_option
@metrics_option
@click.option(
    "--num-images", type=options.NUMBER, default=None, help="The number of images of each folder. The default is all."
)
@reference_images_option
@click.option("--seed", type=options.SEED, default=None, help="The seed of the jackknife's groups, for intervals.")
@click.option("--out", type=RESULTS, required=True, cls=options.RequiredUnlessPrinted, help="The results folder.")
@options.deterministic_option
@options.protocol_options
@options.device_option
@options.quiet_option
@options.json_option
def score(
    folders: tuple[str, ...], out: Path, protocol: Path | None, settings: tuple[str, ...],
    device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Score folders of images against one reference. No model is needed.

    A folder may come from --save-images or from any other program. Captions lie in the folder's index.jsonl, or in a
    .txt file beside each image. Metrics that read captions need them.
    """
    options.quiet_libraries()
    from ddil_core.support.protocol import override, read_yaml
    from ddil_eval.experiments.experiments import EXPERIMENTS

    content = override({} if protocol is None else read_yaml(protocol), settings) | {"folders": list(folders)}
    source = "the command" if protocol is None else str(protocol)
    run_experiment(EXPERIMENTS["score"], content, given, source, out, False, device, as_json)


def _results(protocol: Path) -> Path:
    """Where a protocol's results go when nothing is said."""
    return output_folder(Path("results") / f"{protocol.parent.name}-{protocol.stem}", "the results folder")
