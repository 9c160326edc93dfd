"""The experiments as functions with plain arguments: ``compare``, ``covariate_shift`` and ``score`` of ``ddil_eval``.

Each function starts from a configuration, which may be left out. Arguments that are not None replace its settings.
Records are returned, and saved below ``out`` for ``ddil report``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ddil_core.support.errors import WrongCommand
from ddil_core.support.paths import output_folder
from ddil_core.support.protocol import Strict, validate
from ddil_eval.experiments.covariate_shift import CovariateShiftConfig, analyse_covariate_shift
from ddil_eval.experiments.engine import differences_from_first
from ddil_eval.experiments.score import ScoreConfig, score_folders
from ddil_eval.experiments.system_configs import system_rows
from ddil_eval.experiments.systems import SystemsConfig, compare_systems
from ddil_eval.report.records import Record

Config = TypeVar("Config", bound=Strict)


def compare(
    models: Sequence[str] | None = None,
    data: str | None = None,
    *,
    out: Path | str,
    config: SystemsConfig | None = None,
    recipe: str | None = None,
    prompts: str | Path | None = None,
    num_prompts: int | None = None,
    num_reference_images: int | None = None,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    metrics: Sequence[str] | None = None,
    seed: int | None = None,
    device: str = "cpu",
    save_images: bool = False,
) -> list[Record]:
    """Measure systems side by side on the same prompts and seeds, as ``ddil eval systems`` does.

    Args:
        models: References of models, each one a row. Later rows are compared with the first. Without them the systems
            of ``config`` are measured.
        data: The reference of the data set. Defaults to "shapes".
        out: The results folder. The same call with the same folder goes on where a stopped call was.
        config: The whole comparison.
        recipe: The name of the recipe. Defaults to the recipe of the data set.
        prompts: The path of a list of prompts, in place of the data set's own.
        num_prompts: The number of prompts. Defaults to the recipe's.
        num_reference_images: The number of images of the data set to compare with. Defaults to the recipe's.
        steps: The number of solver steps of each model. Defaults to what each model was made for.
        solver: The solver of each model. Defaults to what each model was made for.
        guidance_scale: The guidance scale of each model. Defaults to what each model was made for.
        metrics: The names of the metrics. Defaults to the recipe's.
        seed: The seed of the noise. Defaults to 0.
        device: The device, such as "cuda".
        save_images: Keep the images in ``out/images``.

    Returns:
        A record for each system and for each difference.

    Raises:
        WrongCommand: a setting is wrong, or a name is unknown.
        DdilError: a model, the data set or the weights of a metric are missing.
    """
    settings: dict[str, object] = {
        "data": data,
        "recipe": recipe, "prompts": None if prompts is None else str(prompts), "num_prompts": num_prompts,
        "reference_images": num_reference_images, "metrics": metrics, "seed": seed,
    }  # fmt: skip
    if models is not None:
        settings["systems"] = system_rows(models, steps=steps, solver=solver, guidance_scale=guidance_scale)
        settings["differences"] = differences_from_first(models)
    elif (steps, solver, guidance_scale) != (None, None, None):
        raise WrongCommand("steps, solver and guidance_scale need models; each system of a configuration has its own")
    complete = _configuration(SystemsConfig, config, settings)
    return compare_systems(complete, output_folder(out, "out"), device, save_images=save_images)


def covariate_shift(
    teacher: str,
    student: str,
    data: str | None = None,
    *,
    out: Path | str,
    config: CovariateShiftConfig | None = None,
    recipe: str | None = None,
    p_teacher: Sequence[float] | None = None,
    switch: Sequence[int | float] | None = None,
    factorial: bool | None = None,
    num_prompts: int | None = None,
    num_reference_images: int | None = None,
    teacher_steps: int | None = None,
    guidance_scale: float | None = None,
    metrics: Sequence[str] | None = None,
    seed: int | None = None,
    device: str = "cpu",
) -> list[Record]:
    """Let teacher and student take turns, and measure the images, as ``ddil eval covariate-shift`` does.

    Args:
        teacher: The teacher's reference.
        student: The student's reference; it was distilled from this teacher.
        data: The reference of the data set. Defaults to "shapes".
        out: The results folder. The same call with the same folder goes on where a stopped call was.
        config: The whole analysis.
        recipe: The name of the recipe. Defaults to the recipe of the data set.
        p_teacher: Rates in [0, 1] at which the teacher acts (Table 2).
        switch: Times at which one model hands over to the other (Tables 3 and 4).
        factorial: Add all teacher/student strings, with main effects and interactions.
        num_prompts: The number of prompts. Defaults to the recipe's.
        num_reference_images: The number of images of the data set to compare with. Defaults to the recipe's.
        teacher_steps: The number of the teacher's steps. Defaults to 32.
        guidance_scale: The teacher's guidance scale. Defaults to its own.
        metrics: The names of the metrics. Defaults to the recipe's.
        seed: The seed of noise and decisions. Defaults to 0.
        device: The device, such as "cuda".

    Returns:
        A record for each run and, in a factorial, for each effect.

    Raises:
        WrongCommand: a setting is wrong, or the two models cannot take turns.
        DdilError: a model, the data set or the weights of a metric are missing.
    """
    settings: dict[str, object] = {
        "teacher": teacher, "student": student, "data": data, "recipe": recipe, "p_teacher": p_teacher,
        "switch": switch, "factorial": factorial, "num_prompts": num_prompts,
        "reference_images": num_reference_images, "teacher_steps": teacher_steps, "guidance_scale": guidance_scale,
        "metrics": metrics, "seed": seed,
    }  # fmt: skip
    complete = _configuration(CovariateShiftConfig, config, settings)
    return analyse_covariate_shift(complete, output_folder(out, "out"), device)


def score(
    folders: Sequence[str | Path] | None = None,
    reference: str | Path | None = None,
    *,
    out: Path | str,
    config: ScoreConfig | None = None,
    recipe: str | None = None,
    num_images: int | None = None,
    num_reference_images: int | None = None,
    images_per_prompt: int | None = None,
    metrics: Sequence[str] | None = None,
    seed: int | None = None,
    device: str = "cpu",
) -> list[Record]:
    """Measure folders of images against one reference, as ``ddil eval score`` does. No model is needed.

    Args:
        folders: Folders of images, made by any program.
        reference: A folder of images, or the reference of a data set.
        out: The results folder. The same call with the same folder goes on where a stopped call was.
        config: The whole measurement; it gives ``folders`` and ``reference`` where these are left out.
        recipe: The name of the recipe. Defaults to the recipe of the reference.
        num_images: The number of images of each folder. Defaults to all images.
        num_reference_images: The number of images of the reference. Defaults to all images of a folder, or the
            recipe's.
        images_per_prompt: The number of images that each prompt has; they follow one another. Defaults to 1.
        metrics: The names of the metrics. Defaults to the recipe's.
        seed: The seed of the jackknife's groups. Defaults to the seed of the images, where their folder says it.
        device: The device, such as "cuda".

    Returns:
        A record for each folder and, for folders of images with the same ids, for each difference from the first.

    Raises:
        WrongCommand: a folder or the reference does not fit.
        DdilError: an image is damaged, or the weights of a metric are missing.
    """
    settings: dict[str, object] = {
        "folders": None if folders is None else [str(folder) for folder in folders],
        "reference": None if reference is None else str(reference),
        "recipe": recipe,
        "num_images": num_images,
        "reference_images": num_reference_images,
        "images_per_prompt": images_per_prompt,
        "metrics": metrics,
        "seed": seed,
    }
    return score_folders(_configuration(ScoreConfig, config, settings), output_folder(out, "out"), device)


def _configuration(kind: type[Config], config: Config | None, settings: dict[str, object]) -> Config:
    """Put the settings that are not None over a configuration."""
    given = {key: value for key, value in settings.items() if value is not None}
    return validate(kind, ({} if config is None else dict(config)) | given, "the call")
