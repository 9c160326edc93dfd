"""The table of systems: its rows on tiny networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import systems as benchmark
from ddil_core.models.system_specs import load_systems
from tests.reference import random_files


@pytest.mark.parametrize("name", ["sd21", "instaflow"])
def test_a_row_says_what_was_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REFUSALS", [])
    system = load_systems()[name]
    row = benchmark.row(name, system, random_files(system, tmp_path), tmp_path)
    assert row["latents"] < 1e-5
    assert 0 < row["levels"] < 0.5
    assert row["analyses"] == f"yes, {2 ** (1 if name == 'instaflow' else 4)} strings"
    if name == "sd21":
        assert (row["distils"], benchmark.REFUSALS) == ("pd, lcm, dmd2", [])
    else:
        assert row["distils"] == "refused"
        methods = ("progressive distillation", "consistency distillation", "distribution matching")
        for sentence, method in zip(benchmark.REFUSALS, methods, strict=True):
            assert sentence.startswith(
                f"instaflow: the teacher 'instaflow' predicts rectified_flow, and {method} needs"
            )


def test_a_flow_transformer_is_distilled_by_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REFUSALS", [])
    row = benchmark.flow_row(tmp_path)
    assert row["latents"] < 1e-5 and 0 < row["levels"] < 0.5
    assert (row["distils"], row["analyses"], benchmark.REFUSALS) == ("pd, lcm, dmd2", "yes, 16 strings", [])
