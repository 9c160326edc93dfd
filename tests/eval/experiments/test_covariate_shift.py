"""The covariate-shift analysis on tiny pipelines, against sampling written out here; its contrasts in closed form."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_core.data.base import Prompt
from ddil_core.data.datasets import open_data
from ddil_core.diffusion.denoiser import Condition
from ddil_core.diffusion.noise import Sample, decisions, initial_noise
from ddil_core.diffusion.rollout import STUDENT, TEACHER, Actor, all_strings, pair_actors, rollout_latents, strings_at
from ddil_core.diffusion.schedule import Schedule, timestep_grid
from ddil_core.models.generate import resolve_sampling, sample_latents
from ddil_core.models.model import load_model
from ddil_core.models.turns import take_turns
from ddil_core.support import ranks
from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.experiments import rollout_tree
from ddil_eval.experiments.covariate_shift import (
    CovariateShiftConfig,
    analyse_covariate_shift,
    figure_2,
    plan_covariate_shift,
)
from ddil_eval.experiments.measurement import Cells
from ddil_eval.experiments.rollout_tree import RolloutTree, load_pair
from ddil_eval.experiments.shift_runs import ShiftRun, effect_contrasts, mean_nfe, shift_runs, tree_cost
from ddil_eval.features.extraction import Extractors
from ddil_eval.report.records import Record, read_records
from tests.counted import Counted
from tests.pipelines import STUDENT as STUDENT_SAMPLING
from tests.pipelines import TEACHER as TEACHER_SAMPLING
from tests.pipelines import plain_picture, plain_step, save_pipeline
from tests.pixels import NAMES, brightness, mosaic

GRID = [999, 749, 500, 250]
FINE = timestep_grid(8)
CONFIG = CovariateShiftConfig(
    teacher_steps=8, num_prompts=10, reference_images=60, metrics=NAMES, batch_size=16, chunk=4, figure_prompts=0
)
CELLS = [
    {"kind": "pure", "model": "teacher"},
    {"kind": "pure", "model": "student"},
    *({"kind": "p_teacher", "p_teacher": p} for p in (0.8, 0.6, 0.4, 0.2)),
    *({"kind": "teacher_then_student", "switch_t": t} for t in (749, 500, 250)),
    *({"kind": "student_then_teacher", "switch_t": t} for t in (749, 500, 250)),
]


@pytest.fixture(scope="module", autouse=True)
def metrics(pixel_metrics: tuple[str, ...]) -> tuple[str, ...]:
    return pixel_metrics


@pytest.fixture(scope="module")
def out(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole analysis."""
    folder = tmp_path_factory.mktemp("analysis")
    analyse(teacher, student, CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> list[Record]:
    return sorted(read_records(out), key=lambda record: CELLS.index(record.cell))


def analyse(teacher: Path, student: Path, config: CovariateShiftConfig, folder: Path) -> list[Record]:
    return analyse_covariate_shift(with_models(config, teacher, student), folder)


def with_models(config: CovariateShiftConfig, teacher: Path, student: Path) -> CovariateShiftConfig:
    return config.model_copy(update={"teacher": str(teacher), "student": str(student)})


def runs(config: CovariateShiftConfig, grid: list[Any], samples: list[Sample]) -> list[ShiftRun]:
    draws = decisions(samples, len(grid), config.seed)
    return shift_runs(config.p_teacher, config.switch, config.factorial, grid, draws)


def samples_of(count: int) -> list[Sample]:
    return [Sample(prompt.id) for prompt in open_data("shapes").prompts(count)]


def values(record: Record) -> dict[str, tuple[float, float, float]]:
    return {name: (m.estimate.value, m.estimate.low, m.estimate.high) for name, m in record.metrics.items()}


def costs(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("covariate-shift/*/evaluations.json"))]
    assert found
    return found


def by_cell(folder: Path) -> dict[str, dict[str, Any]]:
    return {json.dumps(record.cell): record.numbers() for record in read_records(folder)}


# What is measured


def test_every_run_has_its_record(records: list[Record]) -> None:
    assert [record.cell for record in records] == CELLS
    for record in records:
        assert (record.n_asked, record.n_done, record.grid, record.solver) == (10, 10, GRID, "ddim")
        assert (record.guidance_scale, record.reflection, record.seeds) == (3.0, "none", [0])
        assert set(record.systems) == {"teacher", "student"} and set(record.metrics) == set(NAMES)
    assert len({record.systems["student"].weights_sha256 for record in records}) == 1
    assert records[0].systems["student"].weights_sha256 != records[0].systems["teacher"].weights_sha256


def test_records_count_network_evaluations(records: list[Record]) -> None:
    """Two guided teacher steps for each of the student's: 4 evaluations against 1."""
    draws = decisions(samples_of(10), 4, 0)
    mixed = [4 + 3 * np.mean([s.count(TEACHER) for s in strings_at(p, draws)]) for p in CONFIG.p_teacher]
    assert [record.nfe for record in records] == [16, 4, *map(pytest.approx, mixed), 7, 10, 13, 13, 10, 7]
    assert mixed == sorted(mixed, reverse=True)


def test_intervals_contain_their_points(records: list[Record]) -> None:
    for record in records:
        for value, low, high in values(record).values():
            assert low <= value <= high and low < high
        assert values(record)["fd_mosaic"][1] >= 0


def plain_leaf(teacher: Any, student: Any, prompt: Prompt, string: str) -> Tensor:
    """Return the image at the end of a string, one row at a time, without the rollout engine."""
    z = initial_noise([Sample(prompt.id)], (8, 8, 8), CONFIG.seed)
    ends = [*GRID[1:], None]
    for actor, t, s in zip(string, GRID, ends, strict=True):
        if actor == STUDENT:
            z = plain_step(student, z, prompt.text, t, s, 1.0)
            continue
        inner = [u for u in FINE if u <= t and (s is None or u > s)]
        for u, v in zip(inner, [*inner[1:], s], strict=True):
            z = plain_step(teacher, z, prompt.text, u, v, 3.0)
    return plain_picture(teacher, z)


def test_the_pure_runs_are_those_of_each_model_alone(records: list[Record], teacher: Path, student: Path) -> None:
    pipelines = [load_model(str(folder)).pipeline for folder in (teacher, student)]
    prompts = open_data("shapes").prompts(CONFIG.num_prompts)
    for record, string in zip(records, (TEACHER * 4, STUDENT * 4), strict=False):
        expected = np.mean([plain_leaf(*pipelines, prompt, string).mean().item() for prompt in prompts])
        assert record.metrics["brightness"].estimate.value == pytest.approx(expected, abs=2e-5)
    assert abs(values(records[0])["brightness"][0] - values(records[1])["brightness"][0]) > 1e-3


def grow(
    teacher: Path, student: Path, config: CovariateShiftConfig, work: Path
) -> tuple[dict[tuple[int, str], dict[str, np.ndarray]], dict[str, int]]:
    """Return the features of every (prompt, string) of a configuration, and the network evaluations."""
    pair = load_pair(str(teacher), str(student), teacher_steps=config.teacher_steps)
    prompts = open_data("shapes").prompts(config.num_prompts)
    wanted = runs(config, pair.grid, [Sample(prompt.id) for prompt in prompts])
    extractors = Extractors(config.metrics, "cpu")
    tree = RolloutTree(pair, extractors, work, prompts, wanted, config.seed, config.chunk, config.batch_size)
    tree.grow()
    features, place, evaluations = tree.gather()
    rows = {key: {name: values[row] for name, values in features.items()} for key, row in place.items()}
    return rows, evaluations


def test_every_string_has_the_features_of_that_string_alone(teacher: Path, student: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_prompts": 4, "factorial": True})
    rows, _ = grow(teacher, student, config, tmp_path)
    pipelines = [load_model(str(folder)).pipeline for folder in (teacher, student)]
    prompt = open_data("shapes").prompts(3)[2]
    assert {string for index, string in rows if index == 2} == set(all_strings(4))
    found = {string: rows[2, string]["fd_mosaic"] for string in all_strings(4)}
    apart = min(np.abs(found[a] - found[b]).max() for a, b in combinations(found, 2))
    for string in ("TTTT", "SSSS", "TSST", "STTS", "TTSS", "SSST"):
        picture = plain_leaf(*pipelines, prompt, string)[0].permute(1, 2, 0).numpy()
        expected = mosaic((255 * picture)[None])[0]
        assert np.abs(found[string] - expected).max() < min(5e-4, apart / 2), string


LEVEL = {"brightness": 1 / 255 / (64 * 64 * 3), "fd_mosaic": 1 / 255 / (16 * 16)}
"""How much a feature changes if one pixel changes by one level."""


@pytest.fixture(scope="module")
def grown(
    teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[tuple[int, str], dict[str, np.ndarray]], dict[str, int]]:
    return grow(teacher, student, CONFIG, tmp_path_factory.mktemp("grown"))


@pytest.mark.parametrize(("chunk", "batch_size"), [(10, 16), (3, 5)])
def test_results_do_not_depend_on_chunks_and_batches(
    chunk: int,
    batch_size: int,
    grown: tuple[dict[tuple[int, str], dict[str, np.ndarray]], dict[str, int]],
    teacher: Path,
    student: Path,
    tmp_path: Path,
) -> None:
    """Features agree up to a few pixels that round to the next level: 1e-5 of a latent is 1e-3 of a level."""
    kept, evaluations = grown
    other = CONFIG.model_copy(update={"chunk": chunk, "batch_size": batch_size})
    again, evaluations_again = grow(teacher, student, other, tmp_path / "again")
    assert evaluations == evaluations_again
    assert kept.keys() == again.keys()
    for key, features in kept.items():
        for name, expected in features.items():
            np.testing.assert_allclose(again[key][name], expected, rtol=0, atol=4 * LEVEL[name], err_msg=f"{key}")


def test_the_values_do_not_depend_on_chunks_and_batches(
    records: list[Record], teacher: Path, student: Path, tmp_path: Path
) -> None:
    other = CONFIG.model_copy(update={"chunk": 7, "batch_size": 6})
    for record, again in zip(records, analyse(teacher, student, other, tmp_path), strict=True):
        assert record.cell == again.cell
        for name, expected in values(record).items():
            assert values(again)[name] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rates_of_one_and_zero_are_the_pure_runs(
    records: list[Record], teacher: Path, student: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"p_teacher": (1.0, 0.0), "switch": ()})
    found = analyse(teacher, student, config, tmp_path)
    assert [record.cell["kind"] for record in found] == ["pure", "pure", "p_teacher", "p_teacher"]
    for pure, mixed in ((0, 2), (1, 3)):
        assert found[mixed].numbers() == found[pure].numbers()
        for name, expected in values(records[pure]).items():
            assert values(found[pure])[name] == pytest.approx(expected, rel=1e-5)


def test_figure_2_shows_the_strings_that_it_names(teacher: Path, student: Path) -> None:
    config = with_models(CONFIG, teacher, student).model_copy(update={"figure_prompts": 2})
    pictures, prompts, columns = figure_2(plan_covariate_shift(config))
    assert columns == [
        "student alone",
        *(f"teacher until {t}, then student" for t in (749, 500, 250)),
        "teacher alone",
    ]
    assert (pictures.shape, pictures.dtype) == ((2, 5, 64, 64, 3), np.uint8)
    wanted = open_data("shapes").prompts(2)
    assert prompts == wanted
    pipelines = [load_model(str(folder)).pipeline for folder in (teacher, student)]
    for column, string in enumerate(("SSSS", "TSSS", "TTSS", "TTTS", "TTTT")):
        expected = plain_leaf(*pipelines, wanted[1], string)[0].permute(1, 2, 0).numpy() * 255
        np.testing.assert_allclose(pictures[1, column], expected, atol=0.51)


def test_figure_2_is_drawn_in_full_precision(teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 on a GPU, as for the images that are measured."""
    convolution, seen = torch.backends.cudnn.conv, list[str]()
    before = convolution.fp32_precision

    def watched(*args: Any, **settings: Any) -> Any:
        seen.append(convolution.fp32_precision)
        return rollout_latents(*args, **settings)

    monkeypatch.setattr(rollout_tree, "rollout_latents", watched)
    figure_2(plan_covariate_shift(with_models(CONFIG, teacher, student).model_copy(update={"figure_prompts": 1})))
    assert seen == ["ieee"] and convolution.fp32_precision == before != "ieee"


# Going on


def test_an_interrupted_analysis_continues_at_the_next_chunk(
    out: Path, teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_tree, "rollout_latents", Counted(allowed=1))
    with pytest.raises(KeyboardInterrupt):
        analyse(teacher, student, CONFIG, tmp_path)
    assert read_records(tmp_path) == [] and len(list(tmp_path.rglob("*.npz"))) == 1
    rest = Counted()
    monkeypatch.setattr(rollout_tree, "rollout_latents", rest)
    analyse(teacher, student, CONFIG, tmp_path)
    assert rest.chunks == 2  # ten prompts are three chunks, of which one was done
    assert by_cell(tmp_path) == by_cell(out)
    assert costs(tmp_path) == costs(out)
    assert not (out / "partial").exists() and not (tmp_path / "partial").exists()
    assert list(tmp_path.rglob("*.npz")) == []


def test_two_processes_share_the_chunks_and_the_first_measures(
    out: Path, teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one process runs after the other, the second first; ``tests/cli/test_processes.py`` runs two at once."""
    for wait in ("meet", "barrier"):
        monkeypatch.setattr(ranks, wait, lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        counted = Counted()
        monkeypatch.setattr(rollout_tree, "rollout_latents", counted)
        records = analyse(teacher, student, CONFIG, tmp_path)
        shares.append((counted.chunks, len(records)))
    assert shares == [(1, 0), (2, len(read_records(out)))]  # ten prompts are three chunks
    assert by_cell(tmp_path) == by_cell(out)
    assert costs(tmp_path) == costs(out)
    assert {record.device for record in read_records(tmp_path)} == {"2 × cpu"}


def test_another_configuration_ignores_finished_chunks(
    teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_tree, "rollout_latents", Counted(allowed=1))
    with pytest.raises(KeyboardInterrupt):
        analyse(teacher, student, CONFIG, tmp_path)
    counted = Counted()
    monkeypatch.setattr(rollout_tree, "rollout_latents", counted)
    analyse(teacher, student, CONFIG.model_copy(update={"seed": 1}), tmp_path)
    assert counted.chunks == 3


def test_a_finished_analysis_adds_nothing_when_repeated(out: Path, teacher: Path, student: Path) -> None:
    before = sorted((out / "records").iterdir())
    analyse(teacher, student, CONFIG, out)
    assert sorted((out / "records").iterdir()) == before


def test_a_damaged_chunk_is_reported_in_one_sentence(
    teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_tree, "rollout_latents", Counted(allowed=1))
    with pytest.raises(KeyboardInterrupt):
        analyse(teacher, student, CONFIG, tmp_path)
    (chunk,) = tmp_path.rglob("*.npz")
    whole = chunk.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a chunk"):
        chunk.write_bytes(damage)
        with pytest.raises(DdilError) as error:
            analyse(teacher, student, CONFIG, tmp_path)
        assert str(error.value) == (
            f"the finished chunk {chunk} does not match its checksum {chunk.name}.sha256, so one of the two was damaged "
            "or changed after it was written; delete the file to make the chunk again"
        )


# Cost


class Nothing:
    """A denoiser that always gives x̂ = 0: the engine without a network."""

    def __init__(self, nfe: int) -> None:
        self.schedule, self.nfe = Schedule.stable_diffusion(), nfe

    def __call__(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(z)


def paper_actors() -> dict[str, Actor]:
    """A guided 32-step teacher and a 4-step student."""
    return pair_actors(Nothing(2), Nothing(1), timestep_grid(32), timestep_grid(4))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_runs_need_less_than_half_in_one_tree(seed: int) -> None:
    """Twelve runs of 240 prompts: counted by the engine, by prefixes, and as each run alone."""
    actors, samples = paper_actors(), samples_of(240)
    wanted = runs(CovariateShiftConfig(seed=seed), GRID, samples)
    strings = [{run.strings[index] for run in wanted} for index in range(len(samples))]
    condition = Condition({"encoder_hidden_states": torch.zeros(len(samples), 1, 1)})
    leaves = rollout_latents(actors, torch.zeros(len(samples), 1, 1, 1), condition, strings, batch_size=64)
    prefixes = {(i, s[:k]) for i, some in enumerate(strings) for s in some for k in range(1, 5)}
    counted = sum(actors[prefix[-1]].nfe[len(prefix) - 1] for _, prefix in prefixes)
    assert sum(leaves.evaluations.values()) == counted
    shared = tree_cost(leaves.evaluations, {run.key: mean_nfe(run, actors) for run in wanted}, len(samples))
    assert shared["share"] <= 0.5
    assert shared["shared"] == pytest.approx(counted / 240)
    alone = sum(actors[a].nfe[k] for run in wanted for string in run.strings for k, a in enumerate(string))
    assert shared["alone"] == pytest.approx(alone / 240)
    # The rates add up to 2, and teacher and student share the switched and the pure runs evenly: 24 segments of each.
    assert shared["alone"] == pytest.approx(24 * 16 + 24 * 1, rel=0.02)


def test_all_strings_need_fifteen_segments_of_each() -> None:
    actors, samples = paper_actors(), samples_of(4)
    wanted = runs(CovariateShiftConfig(p_teacher=(), switch=(), factorial=True), GRID, samples)
    condition = Condition({"encoder_hidden_states": torch.zeros(4, 1, 1)})
    strings = [all_strings(4)] * 4
    leaves = rollout_latents(actors, torch.zeros(4, 1, 1, 1), condition, strings, batch_size=64)
    assert leaves.evaluations == {TEACHER: 4 * 15 * 16, STUDENT: 4 * 15}
    assert [mean_nfe(run, actors) for run in wanted[:2]] == [64.0, 4.0]


def test_the_analysis_writes_its_cost(out: Path, records: list[Record], teacher: Path, student: Path) -> None:
    (written,) = costs(out)
    strings = [run.strings for run in runs(CONFIG, GRID, samples_of(10))]
    prefixes = {(i, s[i][:k]) for s in strings for i in range(10) for k in range(1, 5)}
    assert written["shared"] * 10 == pytest.approx(sum(4 if prefix[-1] == TEACHER else 1 for _, prefix in prefixes))
    assert written["alone"] == pytest.approx(sum(record.nfe or 0 for record in records))
    assert written["share"] == pytest.approx(written["shared"] / written["alone"])


# Who acts


def test_a_higher_rate_only_adds_the_teachers_turns() -> None:
    samples = samples_of(300)
    wanted = {run.cell.get("p_teacher"): run for run in runs(CONFIG, GRID, samples)}
    for more, less in pairwise(CONFIG.p_teacher):
        for a, b in zip(wanted[more].strings, wanted[less].strings, strict=True):
            assert all(x == TEACHER or y == STUDENT for x, y in zip(a, b, strict=True))
    for rate in CONFIG.p_teacher:
        share = np.mean([string.count(TEACHER) / 4 for string in wanted[rate].strings])
        assert share == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 1200))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_every_multiple_of_the_students_steps_nests(steps: int) -> None:
    for multiple in range(2, 900 // steps):
        actors = pair_actors(Nothing(2), Nothing(1), timestep_grid(multiple * steps), timestep_grid(steps))
        assert actors[TEACHER].nfe == [2 * multiple] * steps


def test_a_switch_hands_over_at_its_time() -> None:
    named = {json.dumps(run.cell): set(run.strings) for run in runs(CONFIG, GRID, samples_of(4))}
    for kind, strings in {
        "teacher_then_student": ("TSSS", "TTSS", "TTTS"),
        "student_then_teacher": ("STTT", "SSTT", "SSST"),
    }.items():
        for switch, string in zip((749, 500, 250), strings, strict=True):
            assert named[json.dumps({"kind": kind, "switch_t": switch})] == {string}


def test_a_rate_given_twice_is_one_run() -> None:
    twice = CONFIG.model_copy(update={"p_teacher": (0.5, 0.5), "switch": (500, 500)})
    assert len(runs(twice, GRID, samples_of(4))) == 2 + 1 + 2


def test_a_switch_off_the_grid_is_refused() -> None:
    for switch in (999, 600, 0):
        with pytest.raises(WrongCommand) as error:
            runs(CONFIG.model_copy(update={"switch": (749, switch)}), GRID, samples_of(4))
        assert str(error.value) == (
            f"the switch time {switch} is not on the student's grid, where one model can hand over to the other: "
            "it may be 749, 500, 250"
        )


def test_models_of_other_encoders_cannot_take_turns(teacher: Path, tmp_path: Path) -> None:
    stranger = save_pipeline(tmp_path, STUDENT_SAMPLING, seed=2, frame_seed=3)
    with pytest.raises(WrongCommand) as error:
        analyse(teacher, stranger, CONFIG, tmp_path / "out")
    assert str(error.value) == (
        f"'{stranger}' has another text encoder and another autoencoder than '{teacher}', so that the two cannot take "
        "turns; take a student that was distilled from this teacher"
    )


def test_a_solver_that_carries_state_is_refused(teacher: Path, student: Path, tmp_path: Path) -> None:
    for solver in ("dpmpp_2m", "lcm"):
        with pytest.raises(WrongCommand, match=f"the solver '{solver}' carries state or noise from step to step"):
            analyse(teacher, student, CONFIG.model_copy(update={"solver": solver}), tmp_path)


# The factorial


def factorial_runs() -> list[ShiftRun]:
    return runs(CovariateShiftConfig(factorial=True), GRID, samples_of(4))


def signs(string: str) -> list[int]:
    return [1 if actor == STUDENT else -1 for actor in string]


def test_an_additive_response_has_its_main_effects_and_no_interaction() -> None:
    wanted, weights = factorial_runs(), (0.5, -1.25, 0.0, 3.0)
    strings = [run.cell.get("string") for run in wanted]
    response = np.array([99.0 if s is None else 7 + np.dot(weights, signs(s)) for s in strings])
    effects = {key: contrast @ response for key, contrast in effect_contrasts(wanted, 4).items()}
    assert set(effects) == {"[0]", "[1]", "[2]", "[3]", "[0, 1]", "[0, 2]", "[0, 3]", "[1, 2]", "[1, 3]", "[2, 3]"}
    for key, effect in effects.items():
        transitions = json.loads(key)
        assert effect == pytest.approx(2 * weights[transitions[0]] if len(transitions) == 1 else 0.0, abs=1e-12)


def test_an_interaction_is_found_where_it_is() -> None:
    wanted = factorial_runs()
    strings = [run.cell.get("string") for run in wanted]
    response = np.array([0.0 if s is None else 0.75 * signs(s)[1] * signs(s)[3] for s in strings])
    effects = {key: contrast @ response for key, contrast in effect_contrasts(wanted, 4).items()}
    assert effects.pop("[1, 3]") == pytest.approx(1.5)
    assert all(effect == pytest.approx(0, abs=1e-12) for effect in effects.values())


def test_effects_of_noisy_prompts_keep_their_intervals() -> None:
    """Scores of prompts add up over transitions: the interval of a main effect holds its value and the true value."""
    wanted, weights, count = factorial_runs(), (0.4, 0.1, 0.0, -0.2), 300
    cells = [run for run in wanted if "string" in run.cell]
    rng = np.random.default_rng(0)
    hard = rng.normal(size=count)
    scores = np.concatenate(
        [hard + np.dot(weights, signs(run.cell["string"])) + 0.3 * rng.normal(size=count) for run in cells]
    )
    rows = {run.key: np.arange(count) + index * count for index, run in enumerate(cells)}
    found = Cells({"brightness": scores[:, None]}, rows, {}).estimates(effect_contrasts(cells, 4))
    for key, estimates in found.items():
        transitions, estimate = json.loads(key), estimates["brightness"]
        true = 2 * weights[transitions[0]] if len(transitions) == 1 else 0.0
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.value == pytest.approx(true, abs=0.03)
        # Paired by prompt: what makes prompts hard, an order of magnitude more, is not in the interval.
        assert estimate.high - estimate.low < 0.05


def test_the_factorial_of_an_analysis_agrees_with_its_strings(teacher: Path, student: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"factorial": True, "p_teacher": (), "switch": ()})
    found = analyse(teacher, student, config, tmp_path)
    strings = {str(record.cell["string"]): record for record in found if record.kind == "string"}
    effects = {json.dumps(record.cell["transitions"]): record for record in found if record.kind == "effect"}
    assert list(strings) == all_strings(4) and len(effects) == 10
    assert strings["TTTT"].numbers() == next(r for r in found if r.cell.get("model") == "teacher").numbers()
    for key, record in effects.items():
        assert record.nfe is None
        for name in NAMES:
            same = {True: [], False: []}  # type: ignore[var-annotated]
            for string, one in strings.items():
                same[bool(np.prod([signs(string)[k] for k in json.loads(key)]) == 1)].append(values(one)[name][0])
            expected = np.mean(same[True]) - np.mean(same[False])
            assert values(record)[name][0] == pytest.approx(expected, abs=1e-9)


def test_brightness_is_the_mean_of_the_pixels() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1] = 255
    assert brightness(images).ravel().tolist() == [0.0, 1.0]


# Other layouts


@pytest.mark.parametrize("layout", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "PixArtSigmaPipeline"])
def test_other_layouts_take_turns(layout: str, tmp_path: Path) -> None:
    """The pure strings are each model's own sampling; the teacher in bfloat16 is near the one in float32."""
    told = {"solver": "flow_euler"} if layout == "StableDiffusion3Pipeline" else {}
    folders = [
        save_pipeline(tmp_path / str(seed), sampling | told, seed=seed, layout=layout)
        for seed, sampling in ((1, TEACHER_SAMPLING), (2, STUDENT_SAMPLING))
    ]
    models = [load_model(str(folder)) for folder in folders]
    actors, student_grid = take_turns(models[0], models[1], CONFIG.teacher_steps, CONFIG.guidance_scale)
    assert student_grid == ([1000, 900, 750, 500] if layout == "StableDiffusion3Pipeline" else GRID)
    config = CONFIG.model_copy(update={"switch": (student_grid[2],), "num_prompts": 4, "factorial": True})
    prompts = open_data("shapes").prompts(3)
    samples, texts = [Sample(p.id) for p in prompts], [p.text for p in prompts]
    z = initial_noise(samples, models[0].latent_shape, config.seed)
    leaves = rollout_latents(actors, z, models[0].encode(texts), [set(all_strings(4))] * 3, batch_size=8)
    found = {key: leaves.latents[i] for i, key in enumerate(zip(leaves.sample, leaves.string, strict=True))}
    for model, string, steps in zip(models, ("TTTT", "SSSS"), (config.teacher_steps, 4), strict=True):
        own = sample_latents(model, samples, texts, resolve_sampling(model, steps=steps), config.seed)
        for row in range(3):
            assert relative(found[row, string], own[row]) < 1e-5
    records = analyse(folders[0], folders[1], config, tmp_path / "float32")
    half = config.model_copy(update={"teacher_dtype": "bfloat16", "student_dtype": "bfloat16"})
    for record, low in zip(records, analyse(folders[0], folders[1], half, tmp_path / "half"), strict=True):
        assert record.cell == low.cell and record.grid == student_grid
        a, b = (r.metrics["brightness"].estimate.value for r in (record, low))
        assert abs(a - b) < 0.02 and (record.cell["kind"] != "pure" or a != b)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_flow_and_a_diffusion_cannot_take_turns(teacher: Path, tmp_path: Path) -> None:
    flow = save_pipeline(tmp_path, STUDENT_SAMPLING, seed=2, layout="StableDiffusion3Pipeline")
    with pytest.raises(WrongCommand, match="has another layout than"):
        analyse(teacher, flow, CONFIG, tmp_path / "out")


def test_the_flow_teacher_alone_is_diffusers_own_pipeline(tmp_path: Path) -> None:
    """SD3's pipeline on the same times, which its scheduler shifts itself."""
    from diffusers import StableDiffusion3Pipeline

    folder = save_pipeline(tmp_path, TEACHER_SAMPLING, seed=1, layout="StableDiffusion3Pipeline")
    model = load_model(str(folder))
    actors, _ = take_turns(model, model, CONFIG.teacher_steps, CONFIG.guidance_scale)
    prompts = open_data("shapes").prompts(2)
    samples, texts = [Sample(p.id) for p in prompts], [p.text for p in prompts]
    z = initial_noise(samples, model.latent_shape, CONFIG.seed)
    leaves = rollout_latents(actors, z, model.encode(texts), [{"TTTT"}] * 2, batch_size=2)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    sigmas = [i / CONFIG.teacher_steps for i in range(CONFIG.teacher_steps, 0, -1)]
    done = pipeline(texts, latents=z, sigmas=sigmas, guidance_scale=3.0, output_type="latent")
    assert relative(leaves.latents, done.images) < 1e-5


def test_prompts_that_are_cut_are_counted(
    teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [Prompt(f"p{i}", "red " * (60 if i < 3 else 2) + str(i)) for i in range(4)]
    monkeypatch.setattr("ddil_core.data.shapes.ShapesData.prompts", lambda self, count: long[:count])
    monkeypatch.setattr(rollout_tree, "rollout_latents", Counted(allowed=0))
    with pytest.raises(KeyboardInterrupt):
        analyse(teacher, student, CONFIG.model_copy(update={"num_prompts": 4}), tmp_path)
    said = "warning: 3 of 4 prompts are longer than the text encoder takes; the rest of each is not read\n"
    assert said in capsys.readouterr().err
