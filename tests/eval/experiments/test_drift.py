"""The drift experiment on tiny pipelines, against rollouts and losses written out one row at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from ddil_core.data.datasets import open_data
from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.rollout import STUDENT as STUDENT_ACTOR
from ddil_core.diffusion.rollout import TEACHER
from ddil_core.diffusion.schedule import rows_at, timestep_grid
from ddil_core.distillation.losses import pd_target
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import load_model
from ddil_core.support.errors import WrongCommand
from ddil_eval.experiments import drift as experiment
from ddil_eval.experiments.covariate_shift import (
    CovariateShiftConfig,
    analyse_covariate_shift,
    plan_covariate_shift,
)
from ddil_eval.experiments.drift import measure_drift
from ddil_eval.experiments.drift_config import DriftConfig
from ddil_eval.experiments.drift_states import KINDS, Drifting, measure_states, network_evaluations, pair_models
from ddil_eval.features.storage import Arrays
from ddil_eval.report import tables
from ddil_eval.report.paper_figures import draw_all
from ddil_eval.report.records import Record, read_records
from tests.pipelines import STUDENT, plain_step, save_pipeline

GRID, FINE = [999, 749, 500, 250], timestep_grid(8)
COUNT = 6
PROMPTS = open_data("shapes").prompts(COUNT)
IMAGES = np.concatenate(list(open_data("shapes").images(COUNT)))
CONFIG = DriftConfig(teacher_steps=8, num_prompts=COUNT, batch_size=4)


def pair_of(teacher: Path, student: Path, steps: int = 8, guidance: float | None = None) -> Drifting:
    return pair_models(load_model(str(teacher)), load_model(str(student)), steps, guidance, 20)


def errors(arrays: Arrays, kind: str) -> np.ndarray:
    return arrays[f"disagreement {kind}"]


@pytest.fixture(scope="module")
def arrays(teacher: Path, student: Path) -> Arrays:
    return measure_states(pair_of(teacher, student), PROMPTS, IMAGES, 0)


@pytest.fixture(scope="module")
def out(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    measure_drift(CONFIG.model_copy(update={"teacher": str(teacher), "students": (str(student),)}), folder)
    return folder


def plain_path(pipeline: Any, text: str, grid: list[int], guidance: float) -> list[torch.Tensor]:
    """Return the states of one rollout at the times of a grid, and its end."""
    z = initial_noise([Sample(PROMPTS[0].id)], (8, 8, 8), 0)
    path = [z]
    for t, s in zip(grid, [*grid[1:], None], strict=True):
        path.append(plain_step(pipeline, path[-1], text, t, s, guidance))
    return path


def test_states_are_those_of_rollouts(arrays: Arrays, teacher: Path, student: Path) -> None:
    text = PROMPTS[0].text
    fine = plain_path(load_model(str(teacher)).pipeline, text, FINE, 3.0)
    own = plain_path(load_model(str(student)).pipeline, text, GRID, 1.0)
    for place in range(4):
        assert np.allclose(arrays["states teacher"][0, place], fine[2 * place][0], atol=1e-4)
        assert np.allclose(arrays["states student"][0, place], own[place][0], atol=1e-4)
    assert np.allclose(arrays["end teacher"][0], fine[-1][0], atol=1e-4)
    distance = (own[1] - fine[2]).norm() / fine[2].norm()
    assert arrays["distance"][0, 0] == pytest.approx(float(distance), rel=1e-3)


def test_states_of_data_are_diffused_forward(arrays: Arrays, teacher: Path) -> None:
    model = load_model(str(teacher))
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    x0 = model.encode_images(pixels)[0]
    eps = initial_noise([Sample(prompt.id) for prompt in PROMPTS], (8, 8, 8), 0)
    for place, t in enumerate(GRID):
        z = model.denoiser.schedule.add_noise(x0, eps, torch.full((COUNT,), t))
        assert np.allclose(arrays["states data"][:, place], z, atol=1e-4)


def test_the_disagreement_is_the_loss_of_progressive_distillation(arrays: Arrays, teacher: Path, student: Path) -> None:
    """One DDIM step of x̃ ends where the teacher's two steps end: its distance from the student's step gives ‖x̂ − x̃‖."""
    models = load_model(str(teacher)), load_model(str(student))
    schedule = models[0].denoiser.schedule
    z = torch.from_numpy(arrays["states student"][:1, 1])
    end = z
    for t, s in pairwise(FINE[2:5]):
        end = plain_step(models[0].pipeline, end, PROMPTS[0].text, t, s, 3.0)
    step = plain_step(models[1].pipeline, z, PROMPTS[0].text, 749, 500, 1.0)
    alpha, sigma = (level[torch.tensor([749, 500])] for level in (schedule.alphas, schedule.sigmas))
    factor = alpha[1] - sigma[1] / sigma[0] * alpha[0]
    expected = float(((step - end) / factor).square().mean() * max(1.0, float((alpha[0] / sigma[0]) ** 2)))
    assert arrays["disagreement student"][0, 1] == pytest.approx(expected, rel=1e-3)


def test_the_first_states_of_both_rollouts_are_the_noise(arrays: Arrays) -> None:
    assert np.array_equal(arrays["states teacher"][:, 0], arrays["states student"][:, 0])
    assert np.array_equal(errors(arrays, "teacher")[:, 0], errors(arrays, "student")[:, 0])


def test_a_student_that_equals_its_teacher_does_not_drift(teacher: Path, tmp_path: Path) -> None:
    pair = pair_of(teacher, teacher, steps=4, guidance=1.0)
    found = measure_states(pair, PROMPTS, IMAGES, 0)
    for kind in KINDS:
        assert errors(found, kind).max() < 1e-8
    assert found["distance"].max() < 1e-5
    config = CONFIG.model_copy(
        update={"teacher": str(teacher), "students": (str(teacher),), "teacher_steps": 4, "guidance_scale": 1.0}
    )
    records = measure_drift(config, tmp_path)
    assert not [record for record in records if record.kind == "drift-ratios"]
    assert not any(name.endswith("ratio") for record in records for name in record.metrics)


def test_disagreement_and_distance_grow_with_noise_in_the_weights(teacher: Path) -> None:
    """A student whose weights are those of its teacher and noise disagrees more, the more noise there is."""
    found = []
    for amplitude in (0.0, 0.05, 0.2):
        pair = pair_of(teacher, teacher, steps=4, guidance=1.0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in pair.student.denoiser.net.parameters():
                weight += amplitude * weight.std() * torch.randn(weight.shape, generator=generator)
        arrays = measure_states(pair, PROMPTS, IMAGES, 0)
        found.append([errors(arrays, "student").mean(), arrays["distance"][:, -1].mean()])
    assert (np.diff(found, axis=0) > 0).all()


def test_a_batch_changes_nothing(arrays: Arrays, teacher: Path, student: Path) -> None:
    alone = measure_states(pair_of(teacher, student), PROMPTS[2:3], IMAGES[2:3], 0)
    for name, values in alone.items():
        assert np.allclose(values[0], arrays[name][2], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("own", [{"solver": "lcm"}, {"solver": "tcd", "gamma": 0.5, "ends_clean": False}])
def test_a_stochastic_student_visits_the_states_that_it_samples(
    teacher: Path, own: dict[str, object], tmp_path: Path
) -> None:
    sampling = own | {"steps": 4, "guidance_scale": 1.0, "spacing": "lcm"}
    folder = save_pipeline(tmp_path, sampling, seed=2)
    pair = pair_of(teacher, folder)
    found = measure_states(pair, PROMPTS, IMAGES, 0)
    samples = [Sample(prompt.id) for prompt in PROMPTS]
    texts = [prompt.text for prompt in PROMPTS]
    drawn = sample_latents(pair.student, samples, texts, resolve_sampling(pair.student), 0)
    assert pair.grid == [999, 759, 499, 259] and np.allclose(found["end student"], drawn, atol=1e-4)
    assert {"end_disagreement data", "end_disagreement student"} <= found.keys()


def test_every_transition_has_its_records(out: Path) -> None:
    records = read_records(out)
    times = [*GRID, "all"]
    for kind, expected in (("drift", times), ("drift-ratios", times), ("drift-states", GRID), ("drift-paths", GRID)):
        assert {record.cell["t"] for record in records if record.kind == kind} == set(expected), kind
    (drawn,) = (out / "drift").rglob("*.png")
    assert len(records) == 18 and drawn.stem == Path(records[0].systems["student"].reference).name
    assert not (out / "partial").exists()


def test_the_ratio_is_that_of_the_disagreements(out: Path, arrays: Arrays) -> None:
    for record in read_records(out):
        if record.kind == "drift":
            place = slice(None) if record.cell["t"] == "all" else GRID.index(int(str(record.cell["t"])))
            means = {kind: errors(arrays, kind)[:, place].mean() for kind in KINDS}
            assert record.metrics["disagreement_data"].estimate.value == pytest.approx(means["data"], rel=1e-3)
            ratio = means["student"] / means["data"]
            assert record.metrics["shift_ratio"].estimate.value == pytest.approx(ratio, rel=1e-3)


def test_tables_show_all_transitions(out: Path) -> None:
    found = {table.name: table for table in tables.build(read_records(out))}
    assert [row[0] for row in found["drift"].rows] == [999, 749, 500, 250, "all"]
    assert set(found) == {"drift", "drift-ratios", "drift-states", "drift-paths"}
    assert all(not table.missing for table in found.values())


def test_the_figure_is_redrawn_from_records(out: Path, tmp_path: Path) -> None:
    """Whatever the order of the records, the figure is the one of the command."""
    files = draw_all(tables.groups(read_records(out)[::-1]), [], tmp_path)
    (drawn,) = out.glob("drift/*/*.png")
    assert [path.name for path in files] == ["drift.pdf", "drift.png"] and files[1].read_bytes() == drawn.read_bytes()


def test_two_students_are_compared(teacher: Path, student: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"teacher": str(teacher), "students": (str(student), str(teacher))})
    records = [record for record in measure_drift(config, tmp_path) if record.kind == "drift-difference"]
    (table,) = (table for table in tables.build(records) if table.name == "drift-difference")
    assert f"Teacher {teacher}, first {student}, second {teacher}, data shapes" in table.caption
    alone = {key: by_time(tmp_path, str(model)) for key, model in (("first", student), ("second", teacher))}
    assert [record.cell["t"] for record in records] == [*GRID, "all"]
    for record in records:
        first, second = (alone[key][record.cell["t"]].metrics for key in ("first", "second"))
        for name in ("disagreement_data", "disagreement_student"):
            difference = first[name].estimate.value - second[name].estimate.value
            assert record.metrics[name].estimate.value == pytest.approx(difference, rel=1e-6, abs=1e-9)
            assert record.metrics[name].estimate.p_value is not None


def test_students_of_one_name_have_a_figure_each(teacher: Path, student: Path, tmp_path: Path) -> None:
    students = []
    for number in (1, 2):
        students.append(tmp_path / f"run{number}" / "student")
        students[-1].parent.mkdir()
        students[-1].symlink_to(student, target_is_directory=True)
    config = CONFIG.model_copy(update={"teacher": str(teacher), "students": tuple(map(str, students))})
    measure_drift(config, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("drift/*/*.png"))
    assert [(name[:2], name[-16:]) for name in names] == [("1-", "run1-student.png"), ("2-", "run2-student.png")]


def test_the_dtype_of_the_models_is_an_option(
    cli: Callable[..., Result], teacher: Path, student: Path, out: Path, tmp_path: Path
) -> None:
    small = ("--set", "teacher_steps=8", "--num-prompts", COUNT, "--device", "cpu", "--dtype", "bf16")
    result = cli("eval", "drift", "--teacher", teacher, "--student", student, *small, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    exact = by_time(out, str(student))
    for t, record in by_time(tmp_path, str(student)).items():
        assert record.compute is not None and record.compute.dtype == "bf16"
        value, expected = (one.metrics["disagreement_student"].estimate.value for one in (record, exact[t]))
        assert value == pytest.approx(expected, rel=0.2) and value != expected


def test_every_model_says_how_it_is_sampled(
    cli: Callable[..., Result], teacher: Path, student: Path, tmp_path: Path
) -> None:
    small = ("--set", "teacher_steps=8", "--num-prompts", 5, "--device", "cpu")
    result = cli(
        "eval", "drift", "--teacher", teacher, "--student", student, *small, "--guidance", 2, "--out", tmp_path
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert f"{teacher}: 8 steps of ddim, guidance 2" in lines
    assert f"{student}: 4 steps of ddim, guidance 1" in lines
    (sampling,) = {str(record.protocol["sampling"]) for record in read_records(tmp_path)}
    teachers = {"steps": 8, "solver": "ddim", "guidance_scale": 2.0}
    students = {str(student): {"steps": 4, "solver": "ddim", "guidance_scale": 1.0}}
    assert sampling == str({"teacher": teachers, "students": students})


def test_a_group_says_once_how_its_students_are_sampled(
    cli: Callable[..., Result], teacher: Path, student: Path, tmp_path: Path
) -> None:
    second, third, guided = (
        save_pipeline(tmp_path / str(seed), STUDENT | {"guidance_scale": scale}, seed=seed)
        for seed, scale in ((6, 1.0), (7, 1.0), (8, 2.0))
    )
    groups = ("--group", f"PD={student},{second}", "--group", f"PD + DDIL={third},{guided}")
    small = ("--set", "teacher_steps=8", "--num-prompts", 5, "--device", "cpu")
    result = cli("eval", "drift", "--teacher", teacher, *groups, *small, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == [
        f"{teacher}: 8 steps of ddim, guidance 3",
        "PD: 4 steps of ddim, guidance 1",
        f"{third}: 4 steps of ddim, guidance 1",
        f"{guided}: 4 steps of ddim, guidance 2",
    ]


def by_time(folder: Path, student: str) -> dict[Any, Record]:
    return {
        record.cell["t"]: record
        for record in read_records(folder)
        if record.kind == "drift" and record.systems["student"].reference == student
    }


def test_a_stopped_run_goes_on(
    out: Path, teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"teacher": str(teacher), "students": (str(student),)})
    calls: list[int] = []

    def stopping(*args: Any) -> Arrays:
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_states(*args)

    monkeypatch.setattr(experiment, "measure_states", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_drift(config, tmp_path)
    measure_drift(config, tmp_path)
    assert calls == [4, 2, 2]  # the first batch is not measured again
    numbers = [[(r.cell, r.metrics) for r in read_records(folder)] for folder in (out, tmp_path)]
    assert numbers[0] == numbers[1]


def test_the_command_needs_a_student(cli: Callable[..., Result], tmp_path: Path) -> None:
    assert cli("eval", "drift", "--out", tmp_path).exit_code == 2


def test_a_student_that_stands_twice_is_refused(teacher: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"teacher": str(teacher), "students": (str(teacher), str(teacher))})
    with pytest.raises(WrongCommand, match="a student stands twice; name each student once"):
        measure_drift(config, tmp_path)


# Groups of students


def test_groups_are_compared_seed_by_seed(teacher: Path, student: Path, tmp_path: Path) -> None:
    """Each group is the mean of its students, and the difference is that of the students of one place."""
    others = [save_pipeline(tmp_path / f"seed{seed}", STUDENT, seed=seed) for seed in (5, 6)]
    groups = {"PD": (str(student), str(others[0])), "PD + DDIL": (str(others[1]), str(teacher))}
    config = DriftConfig.model_validate(CONFIG.model_dump() | {"teacher": str(teacher), "groups": groups})
    records = measure_drift(config, tmp_path / "out")
    assert not [record for record in records if record.kind == "drift-difference"]  # groups stand for their students
    (drawn,) = (tmp_path / "out").glob("drift/*/PD-PD-DDIL-4-steps.png")
    assert Image.open(drawn).size[0] > 500
    single = {
        (record.systems["student"].reference, record.cell["t"]): record.metrics
        for record in records
        if record.kind == "drift"
    }
    for record in records:
        t = record.cell["t"]
        if record.kind == "drift-group":
            name = str(record.cell["name"])
            means = [single[one, t]["disagreement_student"].estimate.value for one in groups[name]]
            assert record.metrics["disagreement_student"].estimate.value == pytest.approx(np.mean(means), rel=1e-5)
            ratios = [single[one, t]["shift_ratio"].estimate.value for one in groups[name]]
            expected = np.exp(np.mean(np.log(ratios)))
            assert record.metrics["shift_ratio"].estimate.value == pytest.approx(expected, rel=1e-4)
            assert all(metric.estimate.degrees is not None for metric in record.metrics.values())
        if record.kind == "drift-group-difference":
            assert record.cell["name"] == "PD + DDIL − PD" and record.cell["training_seeds"] == 2
            logs = [
                [np.log(single[one, t]["shift_ratio"].estimate.value) for one in groups[name]]
                for name in ("PD + DDIL", "PD")
            ]
            assert record.metrics["log_shift_ratio"].estimate.value == pytest.approx(
                np.mean(np.subtract(*logs)), rel=1e-4, abs=1e-6
            )
            assert record.metrics["disagreement_student"].estimate.p_value is not None
    found = {table.name: table for table in tables.build(records)}
    assert [row[:3] for row in found["drift-group"].rows[:2]] == [("PD", 2, 999), ("PD", 2, 749)]
    assert len(found["drift-group-difference"].rows) == len(found["drift-group-difference-spread"].rows) == 5


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"A": ("a",)}, "the group 'A' needs at least 2 students, each from another seed of training"),
        ({"A": ("a", "b"), "B": ("c", "d", "e")}, "the group 'B' has 3 students and 'A' has 2"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(groups: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftConfig(groups=groups)


# On the rollouts of the covariate-shift analysis


def test_on_shared_rollouts_the_numbers_are_those_of_the_command(
    teacher: Path, student: Path, out: Path, pixel_metrics: tuple[str, ...], tmp_path: Path
) -> None:
    config = CovariateShiftConfig(
        teacher=str(teacher), student=str(student), teacher_steps=8, num_prompts=COUNT, reference_images=8,
        metrics=pixel_metrics, batch_size=4, chunk=4, figure_prompts=0, drift=True,
    )  # fmt: skip
    records = analyse_covariate_shift(config, tmp_path / "both")
    shared = {json.dumps([r.kind, r.cell["t"]]): r for r in records if r.experiment == "drift"}
    alone = {json.dumps([r.kind, r.cell["t"]]): r for r in read_records(out)}
    assert shared.keys() == alone.keys()
    for key, record in shared.items():
        assert record.identity() == alone[key].identity()  # the same measurement
        for name, metric in record.metrics.items():
            expected = alone[key].metrics[name].estimate
            assert metric.estimate.value == pytest.approx(expected.value, rel=1e-4, abs=1e-6), name
    without = analyse_covariate_shift(config.model_copy(update={"drift": False}), tmp_path / "tree")
    assert [r.numbers() for r in without] == [r.numbers() for r in records if r.experiment != "drift"]
    cost = json.loads(next((tmp_path / "both").rglob("evaluations.json")).read_text())["drift"]
    # rollouts 16 + 4; labels of data 16 and of the student's states 16; x̂ of the student 4 · 4 and of the teacher 4 · 2
    assert cost["alone"] == 16 + 4 + 16 + 12 + 16 + 8 and cost["shared"] == 16 + 16 + 8


def test_four_prompts_are_enough_for_the_tables_and_too_few_for_drift(
    teacher: Path, student: Path, pixel_metrics: tuple[str, ...]
) -> None:
    config = CovariateShiftConfig(
        teacher=str(teacher), student=str(student), num_prompts=4, reference_images=8, metrics=pixel_metrics, drift=True
    )
    with pytest.raises(WrongCommand, match="4 prompts are too few to measure drift; measure at least 5, or leave"):
        plan_covariate_shift(config)


def test_the_evaluations_are_those_of_the_networks(teacher: Path, student: Path) -> None:
    pair = pair_of(teacher, student)
    rows = [0]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        rows[0] += len(args[0] if args else kwargs["sample"])

    hooks = [
        model.denoiser.net.register_forward_pre_hook(count, with_kwargs=True) for model in (pair.teacher, pair.student)
    ]
    measure_states(pair, PROMPTS, IMAGES, 0)
    for hook in hooks:
        hook.remove()
    assert rows[0] == COUNT * network_evaluations(pair)


# A trained student


@pytest.mark.weights
def test_the_drift_of_a_trained_student_grows_with_noise_in_its_weights() -> None:
    """A 4-step student of the 8-step teacher, after a few updates of progressive distillation.

    Its disagreement on its own states grows. The ratio need not: noise raises the disagreement on data as well.
    """
    pair = pair_models(load_model("shapes"), load_model("shapes"), 8, 1.0, 20)
    train(pair, updates=12)
    net = pair.student.denoiser.net
    trained = [weight.detach().clone() for weight in net.parameters()]
    found = []
    for amplitude in (0.0, 0.03, 0.1):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight, own in zip(net.parameters(), trained, strict=True):
                weight.copy_(own + amplitude * own.std(correction=0) * torch.randn(own.shape, generator=generator))
        found.append(errors(measure_states(pair, PROMPTS, IMAGES, 0), "student")[:, 1:].mean())
    assert found[0] < found[1] < found[2], found


def train(pair: Drifting, updates: int) -> None:
    """Take steps of progressive distillation (``losses.pd_target``) on forward-diffused data, at random transitions."""
    schedule, teacher = pair.schedule, pair.actors[TEACHER]
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    x0, condition = pair.teacher.encode_images(pixels)[0], pair.teacher.encode([prompt.text for prompt in PROMPTS])
    pair.student.denoiser.net.requires_grad_(True)
    optimiser = torch.optim.Adam(pair.student.denoiser.net.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    for update in range(updates):
        k = update % len(pair.grid)
        t, s = rows_at(pair.grid[k], x0), rows_at(pair.ends[k], x0)
        z = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        with torch.no_grad():
            target = pd_target(schedule, z, teacher.act(k, z, condition), t, s)
        with torch.enable_grad():
            weight = schedule.snr(t).to(z.dtype).clamp(min=1.0)
            loss = (
                weight * (pair.actors[STUDENT_ACTOR].denoiser(z, t, condition) - target).square().flatten(1).mean(1)
            ).mean()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
