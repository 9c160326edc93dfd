"""The random numbers of a sample depend on the sample and the seed alone."""

from __future__ import annotations

from itertools import combinations

import torch

from ddil_core.diffusion.noise import Sample, decisions, generator_for, initial_noise

SHAPE = (4, 8, 8)
SAMPLES = [Sample(f"prompt-{i}", j) for i in range(5) for j in range(2)]


def test_noise_depends_neither_on_the_batch_nor_on_the_order() -> None:
    together = initial_noise(SAMPLES, SHAPE, seed=3)
    backwards = initial_noise(SAMPLES[::-1], SHAPE, seed=3)
    assert torch.equal(together, backwards.flip(0))
    for i, sample in enumerate(SAMPLES):
        assert torch.equal(initial_noise([sample], SHAPE, seed=3)[0], together[i])
    draws = decisions(SAMPLES, 4, seed=3)
    assert torch.equal(draws, decisions(SAMPLES[::-1], 4, seed=3).flip(0))
    assert torch.equal(draws[7], decisions([SAMPLES[7]], 4, seed=3)[0])


def test_other_prompt_index_seed_or_purpose_is_other_noise() -> None:
    streams = [
        torch.randn(256, generator=Sample(prompt, index).generator(seed, purpose))
        for prompt in ("a", "b")
        for index in (0, 1)
        for seed in (0, 1, 2**40)
        for purpose in ("noise", "decisions", "solver")
    ]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert float(correlations.abs().max()) < 0.35  # 36 independent streams of 256: σ = 1/16
    assert not any(torch.equal(a, b) for a, b in combinations(streams, 2))


def test_keys_do_not_run_into_each_other() -> None:
    keys = [("0", "a/1", 2, "noise"), ("0", "a", 12, "noise"), (0, "distill", 0, 11, 0), (0, "distill", 0, 1, 10)]
    keys += [(2024, "distill", 0, 7, purpose) for purpose in (0, 1)] + [(10**30, "distill", -1, 7, 0)]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)


def test_noise_is_standard_normal_and_decisions_uniform() -> None:
    many = [Sample("p", i) for i in range(400)]
    z = initial_noise(many, SHAPE, seed=0)
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.var()) - 1) < 0.02
    draws = decisions(many, 4, seed=0)
    assert draws.dtype == torch.float64
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    for p in (0.2, 0.5, 0.8):
        assert abs(float((draws < p).double().mean()) - p) < 5 * (p * (1 - p) / draws.numel()) ** 0.5
