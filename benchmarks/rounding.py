"""How far two runs drift apart that differ only in the order in which their gradients are added.

    python -m benchmarks.rounding [--updates 20] [--parts 4] [--csv FILE]

Progressive distillation of the shapes teacher, batch 8, at 5e-4 without warm-up: each batch in one part, and in
several (``gradient_accumulation``). "gradient" is the relative difference of the gradients' norms at an update.
"weights" is the distance of the students after it, relative to the distance that the first one has moved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.printing import show
from ddil_core.data.datasets import open_data
from ddil_core.data.pool import LatentPool, encode_pool
from ddil_core.diffusion.parameterization import calibrate_reflection
from ddil_core.distillation.config import ProgressiveConfig
from ddil_core.distillation.progressive import ProgressiveStage
from ddil_core.models.model import Model, load_model


def trained(model: Model, pool: LatentPool, updates: int, parts: int) -> tuple[list[float], list[Tensor]]:
    """Return the gradient norm at each update, and the change of the weights after it as one vector."""
    config = ProgressiveConfig.model_validate(
        {
            "stages": [{"steps": 4, "updates": updates}],
            "batch_size": 8,
            "warmup": 0,
            "learning_rate": 5e-4,
            "learning_rate_decay": False,
            "gradient_accumulation": parts,
            "optimizer": "adamw",  # with which the figures of the docs were measured
        }
    )
    teacher = model.guided(None, calibrate_reflection(pool.mean.float()))
    stage = ProgressiveStage(teacher, pool, config.stages[0], config, Accelerator(cpu=True))

    def weights() -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in stage.net.parameters()])

    start, norms, moved = weights(), list[float](), list[Tensor]()
    for step in range(updates):
        norms.append(float(stage.update(step)["gradient_norm"]))
        moved.append(weights() - start)
    return norms, moved


@click.command()
@click.option("--updates", default=20, show_default=True)
@click.option("--parts", type=click.Choice(["2", "4", "8"]), default="4", show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=None)
def main(updates: int, parts: str, csv_path: Path | None) -> None:
    """Measure the drift between a run in one part and a run in several."""
    model = load_model("shapes", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        pool = encode_pool(model, open_data("shapes"), 64, Path(folder) / "data.safetensors")
        (one, whole), (other, divided) = (trained(model, pool, updates, count) for count in (1, int(parts)))
    rows = [
        {
            "update": step + 1,
            "gradient": abs(other[step] / one[step] - 1),
            "weights": float((divided[step] - whole[step]).norm() / whole[step].norm()),
        }
        for step in range(updates)
    ]
    show(pd.DataFrame(rows), csv_path)


if __name__ == "__main__":
    main()
