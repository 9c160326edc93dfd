"""The covariate-shift grid with shared rollouts, against every setting alone: network evaluations and seconds.

    python -m benchmarks.grid [--prompts 16] [--teacher-steps 16] [--device cpu] [--csv FILE]

The settings are the shipped ones: four rates of Table 2, three switch times of Tables 3 and 4 each way, and the two pure
runs, twelve in all. The factorial has all 16 strings, and so holds all of these. Teacher and student have the weights of
the shapes teacher, because a time does not depend on them. First the latents are compared bit for bit: a setting alone,
at the same device batch, has those of the shared rollouts.
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd
import torch

from benchmarks.alternation import CLOCKS, Clock, synchronise
from benchmarks.claims import Claim
from benchmarks.printing import show
from ddil_core.diffusion.noise import Sample, decisions, initial_noise
from ddil_core.diffusion.rollout import Actor, RolloutResult, rollout_latents
from ddil_core.models.model import load_model
from ddil_core.models.turns import take_turns
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.shift_runs import shift_runs

RATES, SWITCHES = (0.8, 0.6, 0.4, 0.2), (749, 500, 250)
SEED = 0
BARS = {"shared": 0.5, "factorial": 0.65}
"""The largest share of the seconds of all settings, each alone."""


class Rollouts:
    """Rolls strings out for a fixed list of prompts, and counts.

    Attributes:
        evaluations: Evaluations of the networks for a row, of all calls of ``run``.
        seconds: The seconds of all calls of ``run``.
    """

    def __init__(self, prompts: int, teacher_steps: int, device: str) -> None:
        teacher, student = load_model("shapes", device), load_model("shapes", device)
        actors, self.grid = take_turns(teacher, student, teacher_steps)
        self.actors: dict[str, Actor] = actors
        texts = [f"a small red circle left of a large blue star, number {row}" for row in range(prompts)]
        self.samples = [Sample(text) for text in texts]
        self.noise = initial_noise(self.samples, teacher.latent_shape, SEED).to(device)
        self.condition, self.batch = teacher.encode(texts), prompts
        self.clock: Clock = "wall" if device == "cuda" else "cpu"
        self.evaluations, self.seconds = 0, 0.0

    def run(self, strings: list[set[str]]) -> RolloutResult:
        """Roll out each prompt's strings, at one device batch."""
        synchronise()
        started = CLOCKS[self.clock]()
        result = rollout_latents(self.actors, self.noise, self.condition, strings, batch_size=self.batch)
        synchronise()
        self.seconds += CLOCKS[self.clock]() - started
        self.evaluations += sum(result.evaluations.values())
        return result


def latents(result: RolloutResult) -> dict[tuple[int, str], torch.Tensor]:
    """Return the latents by the row of the prompt and the string."""
    return {key: result.latents[row] for row, key in enumerate(zip(result.sample, result.string, strict=True))}


def measure(prompts: int, teacher_steps: int, device: str) -> pd.DataFrame:
    """Roll out the settings each alone, together, and as part of the factorial."""
    shared, alone, factorial = (Rollouts(prompts, teacher_steps, device) for _ in range(3))
    draws = decisions(shared.samples, len(shared.grid), SEED)
    runs = shift_runs(RATES, SWITCHES, False, shared.grid, draws)
    every = shift_runs(RATES, SWITCHES, True, shared.grid, draws)
    alone.run([{run} for run in runs[0].strings])  # a warm-up
    alone.evaluations, alone.seconds = 0, 0.0
    together = latents(shared.run([{run.strings[row] for run in runs} for row in range(prompts)]))
    whole = latents(factorial.run([{run.strings[row] for run in every} for row in range(prompts)]))
    equal = True
    for run in runs:
        own = latents(alone.run([{string} for string in run.strings]))
        equal &= all(torch.equal(z, together[key]) and torch.equal(z, whole[key]) for key, z in own.items())
    if not equal:
        raise click.ClickException("the latents of a setting alone are not those of the shared rollouts")
    rows = []
    for name, part in {f"{len(runs)} settings, each alone": alone, "shared": shared, "factorial": factorial}.items():
        share = {
            "evaluations_share": part.evaluations / alone.evaluations,
            "seconds_share": part.seconds / alone.seconds,
        }
        rows.append({"rollouts": name, "evaluations": part.evaluations, "seconds": part.seconds, **share})
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> list[Claim]:
    """Return the share of the seconds that shared rollouts and the factorial take."""
    seconds = dict(zip(frame["rollouts"], frame["seconds"], strict=True))
    (alone,) = (value for name, value in seconds.items() if name not in BARS)
    return [Claim(f"covariate-shift grid, {name}, seconds", seconds[name], alone, bar) for name, bar in BARS.items()]


@click.command()
@click.option("--prompts", default=16, show_default=True, help="Prompts, and rows of every batch.")
@click.option("--teacher-steps", default=16, show_default=True)
@click.option("--device", default=None, help="cpu or cuda. The default is cuda if the machine has a GPU.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(prompts: int, teacher_steps: int, device: str | None, csv_path: Path | None) -> None:
    """Compare shared rollouts with every setting alone."""
    quiet_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    show(measure(prompts, teacher_steps, device), csv_path, ".3g", "grid")


if __name__ == "__main__":
    main()
