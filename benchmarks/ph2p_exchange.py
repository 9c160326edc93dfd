"""How much of a caption does PH2P find with the exchange of words, and what does the exchange cost?

    python -m benchmarks.ph2p_exchange [--num-images 16] [--first 64] [--searches 2] [--rounds 24] [--sweeps 2] [--csv FILE]

PH2P runs with the settings of the shapes world's Table 5, in its two parts: the gradient rounds, of which the best prompt
by the loss on common noise is taken, and the exchange of its words. The images are held out, and by default none of them
is in Table 5. ``held_out_loss`` is the loss on noise that is used for nothing else. ``cpu_s`` is the processor time of
each part, for an image.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks.ph2p_winners import subjects
from benchmarks.printing import show
from ddil_core.inversion.exchange import ExchangeSettings
from ddil_core.inversion.ph2p import PH2PSettings, exchanged, judging_losses, judging_noise, search, winner
from ddil_core.inversion.problem import InversionProblem
from ddil_core.inversion.words import model_words
from ddil_core.models.model import load_model
from ddil_core.shapes.training.architecture import caption_words
from ddil_core.support.protocol import read_yaml
from ddil_core.support.resources import protocols
from ddil_eval.cli.options import quiet_libraries
from ddil_eval.experiments.caption_recall import caption_recall


@click.command(help=__doc__)
@click.option("--num-images", default=16, show_default=True)
@click.option("--first", default=64, show_default=True, help="The first image; Table 5 has the images before 64.")
@click.option("--searches", default=2, show_default=True)
@click.option("--rounds", default=24, show_default=True, help="Gradient rounds of each search.")
@click.option("--sweeps", default=2, show_default=True, help="Sweeps of the exchange.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), default=None)
def main(num_images: int, first: int, searches: int, rounds: int, sweeps: int, csv: Path | None) -> None:
    quiet_libraries()
    teacher = load_model("shapes", "cpu")
    ids, captions, images = subjects(first, num_images)
    problem = InversionProblem(teacher, model_words(teacher, tuple(caption_words())), images, ids, 0)
    told = dict(read_yaml(protocols() / "shapes" / "table5.yaml")["inverters"]["ph2p"])
    exchange = ExchangeSettings(**told.pop("exchange") | {"sweeps": sweeps})
    chosen = PH2PSettings(**told | {"searches": searches, "rounds": rounds, "candidates": 1, "exchange": exchange})
    denoiser, x0, generators = teacher.guided(1.0), problem.latents(), problem.generators("ph2p")
    held_out = judging_noise(x0, problem, chosen.model_copy(update={"judging": 16}), "held out")

    def measured(part: str, index: Tensor, seconds: float) -> dict[str, object]:
        shares = [caption_recall(*pair)["all"] for pair in zip(captions, problem.words.texts(index), strict=True)]
        return {
            "after": part,
            "recovered": np.mean(shares),
            "se": np.std(shares, ddof=1) / np.sqrt(num_images),
            "held_out_loss": float(judging_losses(problem, denoiser, index, held_out).mean()),
            "cpu_s": seconds / num_images,
        }

    begun = time.process_time()
    prompts = [
        one.index for _ in range(searches) for one in search(problem, denoiser, chosen, x0, generators, _nothing)
    ]
    best = winner(problem, denoiser, prompts, judging_noise(x0, problem, chosen))
    searched = time.process_time()
    index = exchanged(problem, denoiser, chosen, x0, best, _nothing)
    ended = time.process_time()
    rows = [measured("the rounds", best, searched - begun), measured("the exchange", index, ended - searched)]
    show(pd.DataFrame(rows), csv, ".3g", title=f"PH2P with the exchange of words, {num_images} images")


def _nothing() -> None:
    """No progress to be shown."""


if __name__ == "__main__":
    main()
