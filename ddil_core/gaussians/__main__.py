"""Write the shipped world: ``python -m ddil_core.gaussians``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import DDIMScheduler

from ddil_core.gaussians.networks import GaussianMixture
from ddil_core.gaussians.pipeline import GaussiansPipeline
from ddil_core.gaussians.world import FOLDER, make_mixture
from ddil_core.support.files import replacing, write_text

SAMPLING = {"solver": "ddim", "steps": None, "guidance_scale": 1.0}
"""How the exact teacher is sampled. Without guidance its points have the true distribution."""


def write_world(mixture: GaussianMixture, folder: Path) -> None:
    """Write a mixture as a pipeline folder, with Stable Diffusion's noise schedule. Replace the folder."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    shutil.rmtree(folder, ignore_errors=True)
    with replacing(folder) as temporary:
        GaussiansPipeline(mixture, scheduler).save_pretrained(temporary)
        write_text(temporary / "ddil.json", json.dumps(SAMPLING, indent=2) + "\n")


if __name__ == "__main__":
    write_world(make_mixture(), FOLDER)
