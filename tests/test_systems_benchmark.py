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
        assert (row["distils"], benchmark.REFUSALS) == ("yes, to 4 steps", [])
    else:
        assert row["distils"] == "refused"
        (sentence,) = benchmark.REFUSALS
        assert sentence.startswith(
            "instaflow: the teacher 'instaflow' predicts rectified_flow, and progressive distillation"
        )
