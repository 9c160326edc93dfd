"""Which round of PH2P should give a candidate: the one with the lowest loss on its own noise, or on common noise?

    python -m benchmarks.ph2p_winners [--num-images 16] [--first 64] [--judging 8] [--csv FILE]

PH2P runs once with the settings of the shapes world's Table 5. The best round of each stretch is then chosen in each
way. The images are held out, and by default none of them is in Table 5. ``held_out_loss`` is the loss of the chosen
prompts on noise that is used for nothing else. ``recovered`` is the caption recall of the prompts that are finally
chosen by their images.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.printing import show
from ddil_core.data.datasets import open_data
from ddil_core.inversion.invert import SelectionSettings, choose
from ddil_core.inversion.ph2p import PH2PSettings, judging_losses, judging_noise, search
from ddil_core.inversion.problem import InversionProblem, transposed
from ddil_core.inversion.towers import load_inversion_towers
from ddil_core.inversion.words import model_words
from ddil_core.models.generate import resolve_sampling as sampled
from ddil_core.models.model import load_model
from ddil_core.shapes.training.architecture import caption_words
from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.caption_recall import caption_recall


def subjects(first: int, count: int) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Return ids, captions and images of the held-out images ``first`` … ``first + count - 1``."""
    data, last = open_data("shapes"), first + count
    prompts = data.prompts(last)[first:]
    images = np.concatenate(list(data.images(last)))[first:]
    return tuple(prompt.id for prompt in prompts), [prompt.text for prompt in prompts], images


@click.command(help=__doc__)
@click.option("--num-images", default=16, show_default=True)
@click.option("--first", default=64, show_default=True, help="The first image; Table 5 has the images before 64.")
@click.option("--judging", default=(8,), show_default=True, multiple=True, help="Draws of the common noise.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), default=None)
def main(num_images: int, first: int, judging: tuple[int, ...], csv: Path | None) -> None:
    quiet_libraries()
    teacher, towers = load_model("shapes", "cpu"), load_inversion_towers("shapes")
    ids, captions, images = subjects(first, num_images)
    problem = InversionProblem(teacher, model_words(teacher, tuple(caption_words())), images, ids, 0, towers)
    protocol = read_yaml(protocols() / "shapes" / "table5.yaml")
    chosen = PH2PSettings(**protocol["inverters"]["ph2p"])
    choosing = SelectionSettings(sampled(teacher, protocol["choosing_steps"]), protocol["choosing_images"])
    denoiser, x0, generators = teacher.guided(1.0), problem.latents(), problem.generators("ph2p")

    searches = [search(problem, denoiser, chosen, x0, generators, lambda: None) for _ in range(chosen.searches)]
    stretches = [list(islice(rounds, size)) for rounds in searches for size in chosen.stretches]
    mean_t = torch.stack([one.t.double().mean(1) for rounds in stretches for one in rounds])

    def losses(purpose: str, count: int) -> Tensor:
        """Return the loss [rounds, B] of every round's prompt on ``count`` draws that all rounds share."""
        noise = judging_noise(x0, problem, chosen.model_copy(update={"judging": count}), purpose)
        rounds = [result for stretch in stretches for result in stretch]
        return torch.stack([judging_losses(problem, denoiser, result.index, noise) for result in rounds])

    own = torch.stack([one.losses for rounds in stretches for one in rounds])
    ways = {"own noise": own} | {f"common noise, {count}": losses("ph2p judging", count) for count in judging}
    held_out = losses("held out", 32)

    def measured(loss: Tensor) -> dict[str, Any]:
        sizes = [len(rounds) for rounds in stretches]
        parts = [tensor.split(sizes) for tensor in (loss, mean_t, held_out)]
        won = [part.argmin(0) for part in parts[0]]
        latest = [place == t.argmax(0) for place, t in zip(won, parts[1], strict=True)]
        lost = [part.gather(0, place[None])[0] for place, part in zip(won, parts[2], strict=True)]
        found = []
        for place, rounds in zip(won, stretches, strict=True):
            index = torch.stack([one.index for one in rounds])[place, torch.arange(num_images)]
            found.append(problem.words.texts(index))
        prompts, _ = choose(problem, transposed(found), choosing)
        shares = [caption_recall(*pair)["all"] for pair in zip(captions, prompts, strict=True)]
        return {
            "correlation_with_t": float(np.corrcoef(loss.flatten(), mean_t.flatten())[0, 1]),
            "won_by_the_largest_t": float(torch.cat(latest).double().mean()),
            "chance": float(np.mean([1 / size for size in sizes])),
            "held_out_loss": float(torch.cat(lost).mean()),
            "recovered": float(np.mean(shares)),
        }

    frame = pd.DataFrame([{"winner by": name} | measured(loss) for name, loss in ways.items()])
    show(frame, csv, ".3f", title=f"PH2P's winners of {len(stretches)} stretches of {num_images} images")


if __name__ == "__main__":
    main()
