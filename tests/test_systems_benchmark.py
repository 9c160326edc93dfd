"""The table of systems: its rows on tiny networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import systems as benchmark
from ddil_core.models.system_specs import load_systems
from tests.reference import random_files


@pytest.mark.parametrize("name", ["sd21", "instaflow", "sd35"])
def test_a_row_says_what_was_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REFUSALS", [])
    system = load_systems()[name]
    row = benchmark.row(name, system, random_files(system, tmp_path), tmp_path)
    assert row["latents"] < 1e-5
    assert 0 < row["levels"] < 0.5
    assert row["analyses"] == f"yes, {2 ** (1 if name == 'instaflow' else 4)} strings"
    if name == "sd21":
        assert (row["distils"], benchmark.REFUSALS) == ("pd, lcm, tcd, dmd2, LoRA", [])
    elif name == "sd35":
        assert row["distils"] == "pd, lcm, dmd2, LoRA"
        assert [sentence.partition(",")[0] for sentence in benchmark.REFUSALS] == [
            "sd35: the teacher 'sd35' predicts flow"
        ]
    else:
        assert row["distils"] == "refused"
        methods = (
            *("progressive distillation", "consistency distillation", "trajectory consistency distillation"),
            "distribution matching",
        )
        for sentence, method in zip(benchmark.REFUSALS, methods, strict=True):
            assert sentence.startswith(
                f"instaflow: the teacher 'instaflow' predicts rectified_flow, and {method} needs"
            )
