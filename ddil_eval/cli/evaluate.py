"""``ddil eval``: one sub-command for each experiment, and ``run`` for a whole protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddil_core.support.paths import output_folder
from ddil_eval.cli import options
from ddil_eval.cli.experiment import run_experiment, starting_protocol
from ddil_eval.cli.output import show
from ddil_eval.cli.prompt_inversion import prompt_inversion

RESULTS = options.OUTPUT_FOLDER
RECIPE_HELP = (
    "How pictures are prepared and with what they are compared (protocols/recipes.yaml); by default the data set's."
)
METRICS_HELP = "Metrics in place of the recipe's (see 'ddil metrics')."

save_option = click.option(
    "--save-images", is_flag=True, help="Keep the pictures in OUT/images, with an index, to be scored again."
)


class ExperimentGroup(click.Group):
    """The sub-commands of the experiments. A command's former name still works, and no help page lists it."""

    former = {"coco": "systems"}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command by its name or by a former name."""
        return super().get_command(ctx, self.former.get(cmd_name, cmd_name))


@click.group(name="eval", cls=ExperimentGroup)
def evaluate() -> None:
    """Measure models; records go to OUT/records, one JSON file for each cell."""


evaluate.add_command(prompt_inversion)


@evaluate.command("covariate-shift")
@click.option("--teacher", default=None, help=options.MODEL_HELP + " By default the protocol's, or shapes.")
@click.option("--student", required=True, help=options.MODEL_HELP)
@click.option("--data", default=None, help=options.DATA_HELP)
@click.option("--p-teacher", default=None, metavar="P,P,…", help="Rates at which the teacher acts (Table 2).")
@click.option(
    "--switch", default=None, metavar="T,T,…", help="Times at which one hands over to the other (Tables 3, 4)."
)
@click.option("--num-prompts", type=options.NUMBER, default=None, help="How many prompts of the evaluation split.")
@click.option(
    "--factorial", is_flag=True, default=None, help="All teacher/student strings, with effects and interactions."
)
@click.option(
    "--seed",
    type=options.SEED,
    default=None,
    help="The seed of noise and decisions, in place of the protocol's.",
)
@click.option("--out", type=RESULTS, required=True, help="The results folder.")
@options.protocol_options
@options.download_option
@options.device_option
@options.json_option
def covariate_shift(
    p_teacher: str | None, switch: str | None, out: Path, protocol: Path | None,
    settings: tuple[str, ...], download: bool, device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Let teacher and student take turns: Tables 2, 3, 4 and Figure 2.

    Each prompt follows strings of teacher and student; what strings share is computed once. The same command again goes on
    where it was interrupted.
    """
    from ddil_eval.experiments.experiments import EXPERIMENTS

    given["p_teacher"] = options.numbers(p_teacher, float, "--p-teacher")
    given["switch"] = options.numbers(switch, options.time, "--switch")
    content, source = starting_protocol(EXPERIMENTS["covariate-shift"], protocol, settings)
    run_experiment(EXPERIMENTS["covariate-shift"], content, given, source, out, download, device, as_json)


@evaluate.command("systems")
@click.option("--model", "models", multiple=True, required=True, help=options.MODEL_HELP + " Each is a row.")
@click.option("--data", required=True, help=options.DATA_HELP)
@click.option("--recipe", default=None, help=RECIPE_HELP)
@click.option("--prompts", default=None, metavar="FILE",
              help="A list of prompts (.txt, .jsonl, .csv) in place of the data set's own.")  # fmt: skip
@click.option("--steps", type=options.COUNT, default=None, help="Solver steps; by default the model's own.")
@click.option("--solver", default=None, help="The solver; by default the model's own.")
@options.guidance_option
@options.reflection_option
@click.option("--num-images", "num_prompts", type=options.Whole(4), default=None,
              help="How many pictures, one for each prompt; by default the recipe's.")  # fmt: skip
@click.option("--metrics", default=None, metavar="NAME,…", help=METRICS_HELP)
@click.option("--seed", type=options.SEED, default=None, help="The seed of the noise.")
@click.option("--out", type=RESULTS, required=True, help="The results folder.")
@save_option
@options.protocol_options
@options.download_option
@options.device_option
@options.json_option
def systems(
    models: tuple[str, ...], steps: int | None, solver: str | None, guidance_scale: float | None, reflection: str | None,
    metrics: str | None, out: Path, save_images: bool, protocol: Path | None, settings: tuple[str, ...], download: bool,
    device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Measure models on COCO, or on other captioned pictures, by a recipe.

    One picture for each prompt, sampled as each model was made for; every metric of the recipe in one pass; of several models
    the paired differences from the first. The same command again goes on where it was interrupted, and does not draw again what
    it has. torchrun starts it on several GPUs.
    """
    options.quiet_libraries()
    from ddil_core.support.protocol import override, read_yaml, validate
    from ddil_eval.experiments.engine import differences_from_first
    from ddil_eval.experiments.system_configs import system_rows
    from ddil_eval.experiments.systems import SystemsConfig, compare_systems

    content = override({} if protocol is None else read_yaml(protocol), settings)
    given = {key: value for key, value in given.items() if value is not None}
    given |= {} if metrics is None else {"metrics": options.words(metrics)}
    rows = system_rows(models, steps=steps, solver=solver, guidance_scale=guidance_scale, reflection=reflection)
    # the differences of a protocol name its own rows, and the models replace those
    content |= given | {"systems": rows, "differences": differences_from_first(models)}
    source = "the command" if protocol is None else str(protocol)
    config = validate(SystemsConfig, content, source, options=given)
    options.fetch_missing(models, download)
    show(compare_systems(config, out, options.choose_device(device), save_images=save_images), out, as_json)


@evaluate.command("run")
@click.argument("protocol", type=options.INPUT_FILE)
@click.option("--data", default=None, help=options.DATA_HELP + " In place of the protocol's.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
@click.option("--seed", type=options.SEED, default=None, help="The seed of the noise, in place of the protocol's.")
@click.option(
    "--out", type=RESULTS, default=None, help="The results folder.  [default: results/FOLDER-NAME of the protocol]"
)
@save_option
@options.download_option
@options.device_option
@options.json_option
def run(
    protocol: Path, data: str | None, settings: tuple[str, ...], seed: int | None, out: Path | None, save_images: bool,
    download: bool, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure a whole table, as a protocol says: each system sampled as it was made for, unless its row says otherwise.

    What is not here (weights, data, a metric's network) is named before any picture is made, with what to provide, and the
    rest is measured; exit status 1 if nothing can be. Run again with more of it here, it measures the new rows.
    """
    options.quiet_libraries()
    from ddil_core.support.protocol import override, read_yaml
    from ddil_eval.experiments.experiments import find_experiment

    protocol = _shipped(protocol)
    content = override(read_yaml(protocol), settings)
    experiment = find_experiment(content.get("experiment", "systems"))
    given = {"seed": seed, "data": data}
    out = out or _results(protocol)
    run_experiment(experiment, content, given, str(protocol), out, download, device, as_json, save_images=save_images)


@evaluate.command("score")
@click.argument("folders", nargs=-1, required=True)
@click.option("--reference", required=True, help="A folder of pictures, or a data set (see 'ddil data').")
@click.option("--recipe", default=None, help=RECIPE_HELP)
@click.option("--metrics", default=None, metavar="NAME,…", help=METRICS_HELP)
@click.option(
    "--num-images", type=options.NUMBER, default=None, help="How many pictures of each folder; by default all."
)
@click.option("--reference-pictures", type=options.NUMBER, default=None,
              help="How many pictures of the reference; by default all of a folder, or the recipe's.")  # fmt: skip
@click.option("--seed", type=options.SEED, default=None, help="The seed of the jackknife's groups, for intervals.")
@click.option("--out", type=RESULTS, required=True, help="The results folder.")
@options.protocol_options
@options.device_option
@options.json_option
def score(
    folders: tuple[str, ...], metrics: str | None, out: Path, protocol: Path | None, settings: tuple[str, ...],
    device: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Score folders of pictures against one reference; no model is needed.

    Folders kept with --save-images, or made by any other program: captions are in the folder's index.jsonl, or in a .txt
    beside each picture. Without captions, metrics that read them are refused.
    """
    options.quiet_libraries()
    from ddil_core.support.protocol import override, read_yaml
    from ddil_eval.experiments.experiments import EXPERIMENTS

    content = override({} if protocol is None else read_yaml(protocol), settings) | {"folders": list(folders)}
    given["metrics"] = options.words(metrics)
    source = "the command" if protocol is None else str(protocol)
    run_experiment(EXPERIMENTS["score"], content, given, source, out, False, device, as_json)


def _shipped(protocol: Path) -> Path:
    """The protocol, or the shipped one of that name where there is no such file, as outside of a checkout."""
    from ddil_core.support.resources import protocols

    parts = protocol.parts[1:] if protocol.parts[:1] == ("protocols",) else protocol.parts
    shipped = protocols().joinpath(*parts) if parts else protocol
    return shipped if not protocol.is_file() and shipped.is_file() else protocol


def _results(protocol: Path) -> Path:
    """Where a protocol's results go when nothing is said."""
    return output_folder(Path("results") / f"{protocol.parent.name}-{protocol.stem}", "the results folder")
