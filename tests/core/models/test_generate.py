"""Images of prompts: the same in every batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddil_core.diffusion.noise import Sample, initial_noise
from ddil_core.diffusion.schedule import timestep_grid, transitions
from ddil_core.diffusion.solvers import SOLVERS, ddim
from ddil_core.models.generate import sample
from ddil_core.models.model import Model
from ddil_core.support.errors import WrongCommand
from tests.core.closed_form import rows

PROMPTS = ["a small red circle", "a large blue star", "a green square"]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_ddim_sampling_equals_its_own_loop(model: Model) -> None:
    z = initial_noise([Sample(PROMPTS[0], 1)], model.latent_shape, seed=7)
    denoiser, condition = model.guided(2.0), model.encode(PROMPTS[:1])
    with torch.no_grad():
        for t, s in transitions(timestep_grid(5)):
            z, _ = ddim(denoiser.schedule, z, rows(t, z), rows(s, z), denoiser(z, rows(t, z), condition))
    made = sample(model, PROMPTS[:1], num_images=2, steps=5, guidance_scale=2.0, seed=7)
    assert made.shape == (1, 2, 64, 64, 3)
    assert made.dtype == np.uint8
    assert apart(made[0, 1], model.decode(z)[0]) <= 1


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "lcm", "heun"])
def test_an_image_depends_on_its_prompt_number_and_seed_alone(model: Model, solver: str) -> None:
    together = sample(model, PROMPTS, num_images=2, steps=4, solver=solver, batch_size=4)
    alone = sample(model, PROMPTS[1:2], num_images=2, steps=4, solver=solver, batch_size=1)
    assert apart(together[1], alone[0]) <= 1
    other = sample(model, PROMPTS[1:2], num_images=2, steps=4, solver=solver, seed=1)
    assert apart(other[0, 0], alone[0, 0]) > 1
    assert apart(alone[0, 0], alone[0, 1]) > 1


def test_solvers_and_guidance_change_the_image(model: Model) -> None:
    base = sample(model, PROMPTS[:1], steps=4)
    assert apart(base, sample(model, PROMPTS[:1], steps=4, guidance_scale=3.0)) == 0  # the model's own scale
    for options in ({"solver": "lcm"}, {"solver": "dpmpp_2m"}, {"steps": 8}, {"guidance_scale": 9.0}):
        assert apart(base, sample(model, PROMPTS[:1], **({"steps": 4} | options))) > 1


def test_images_are_drawn_without_tf32_and_the_empty_prompt_is_encoded_once(model: Model) -> None:
    precision, before = list[str](), torch.backends.cuda.matmul.fp32_precision
    hook = model.denoiser.net.register_forward_pre_hook(
        lambda *_: precision.append(torch.backends.cuda.matmul.fp32_precision)
    )
    sample(model, PROMPTS[:1], steps=2)
    hook.remove()
    assert set(precision) == {"ieee"} and torch.backends.cuda.matmul.fp32_precision == before
    assert model.guided(3.0).unconditional is model.nothing()


def test_a_solver_of_another_package_samples(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file outside of this project adds Heun under another name, as an entry point."""
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddil.solvers]\ntoy = toy_solver:SOLVER\n")
    (tmp_path / "toy_solver.py").write_text(
        "from ddil_core.diffusion.solvers import Solver, ddim, heun_corrector\n"
        "SOLVER = Solver('toy', ddim, False, False, 'this test', heun_corrector)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(SOLVERS, "_added", None)
    assert apart(*(sample(model, PROMPTS[:1], steps=4, solver=solver) for solver in ("toy", "heun"))) == 0
    assert list(SOLVERS)[-1] == "toy"


def test_an_unknown_solver_is_refused(model: Model) -> None:
    with pytest.raises(WrongCommand, match="the solver 'eular' is not known"):
        sample(model, PROMPTS, solver="eular")
