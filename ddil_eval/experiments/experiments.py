"""The table of experiments. An addition is one file with a configuration and a function, and one row of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import shown
from ddil_core.support.protocol import Strict
from ddil_core.support.registry import Registry
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig, analyse_covariate_shift
from ddil_eval.experiments.drift import measure_drift
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.inversion_config import InversionConfig
from ddil_eval.experiments.prompt_inversion import run_prompt_inversion
from ddil_eval.experiments.score import ScoreConfig, score_folders
from ddil_eval.experiments.systems import FORMER_NAMES, SystemsConfig, compare_systems
from ddil_eval.report.records import Record


def _no_pictures(config: Any, out: Path) -> Sequence[Path]:
    return ()


def _figure_2(config: CovariateShiftConfig, out: Path) -> Sequence[Path]:
    return [config.figures_folder(out) / "figure2.png"] if config.figure_prompts else []


def _inverted(config: InversionConfig, out: Path) -> Sequence[Path]:
    return sorted(config.figures_folder(out).glob("inverted/*.png"))[: config.figures]


def _no_models(config: Any) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Experiment:
    """A row of the table. ``ddil eval run`` runs the experiment that a protocol names.

    Attributes:
        name: The name in protocols, commands and records.
        title: What the experiment measures, in a few words.
        config: The class of its configuration. It has a field ``experiment``, which holds the name, and a field
            ``seed``.
        run: ``run(config, out, device)`` measures, saves the records below the folder ``out`` and returns them. With
            ``keeps_images`` it also takes the keyword ``save_images``.
        models: ``models(config)`` returns the references of the models that the experiment loads, for ``--download``.
        protocol: The shipped protocol that its command starts from, below the folder ``protocols``; None: there is
            none.
        keeps_images: Whether it can keep the images that it generates.
        pictures: ``pictures(config, out)`` returns the files that ``--show`` shows.
        contents: What lies in the results folder afterwards, for a message.
    """

    name: str
    title: str
    config: type[Strict]
    run: Callable[..., list[Record]]
    models: Callable[[Any], Sequence[str]] = _no_models
    protocol: str | None = None
    keeps_images: bool = False
    pictures: Callable[[Any, Path], Sequence[Path]] = _no_pictures
    contents: str = "Records"


EXPERIMENTS: Registry[Experiment] = Registry(
    "experiment",
    "ddil.experiments",
    Experiment,
    (
        Experiment(
            name="systems",
            title="Systems side by side on the same prompts (Table 1)",
            config=SystemsConfig,
            run=partial(compare_systems, allow_absent=True),
            models=lambda config: [model for system in config.systems for model in system.models.values()],
            protocol="shapes/table1.yaml",
            keeps_images=True,
        ),
        Experiment(
            name="covariate-shift",
            title="Teacher and student take turns (Tables 2 to 4, Figure 2)",
            config=CovariateShiftConfig,
            run=analyse_covariate_shift,
            models=lambda config: [model for model in (config.teacher, config.student) if model is not None],
            protocol="shapes/covariate-shift.yaml",
            pictures=_figure_2,
            contents="Records, figures and the cost of the rollouts",
        ),
        Experiment(
            name="drift",
            title="Covariate shift itself, transition by transition",
            config=DriftConfig,
            run=measure_drift,
            models=lambda config: [config.teacher, *config.all_students],
            protocol="shapes/drift.yaml",
            contents="Records and figures",
        ),
        Experiment(
            name="prompt-inversion",
            title="Systems draw from inverted prompts (Table 5)",
            config=InversionConfig,
            run=run_prompt_inversion,
            models=lambda config: [config.teacher, *(system.model for system in config.systems)],
            protocol="shapes/table5.yaml",
            pictures=_inverted,
            contents="Records, prompts and images",
        ),
        Experiment(
            name="score",
            title="Folders of images against one reference",
            config=ScoreConfig,
            run=score_folders,
        ),
    ),
)


def find_experiment(name: object) -> Experiment:
    """Return the experiment that a protocol names; former names still count.

    Raises:
        WrongCommand: there is no such experiment.
    """
    if not isinstance(name, str):
        raise WrongCommand(f"the experiment {shown(name)} is not a name; it may be one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS.find("systems" if name in FORMER_NAMES else name)
