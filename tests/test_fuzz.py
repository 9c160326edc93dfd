"""The short form of ``make fuzz``: generated command lines and files, without those that load a network."""

from __future__ import annotations

import pytest

from tests.fuzz import cases
from tests.fuzz.__main__ import fuzz


def test_generated_cases_succeed_or_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = [kind for kind in cases.KINDS if kind.share >= 1]
    monkeypatch.setattr("tests.fuzz.__main__.KINDS", cheap)
    outcomes, findings = fuzz(150, seed=0)
    assert findings == []
    assert outcomes.total() == 150 and {kind for kind, _ in outcomes} == {kind.name for kind in cheap}


def test_a_finding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cases.Kind("command lines", 1, lambda rng, place: ["report", "--results", str(place)])
    monkeypatch.setattr("tests.fuzz.__main__.KINDS", [broken])
    monkeypatch.setattr("ddil_eval.report.records.sift", lambda folder: 1 / 0)
    _, findings = fuzz(1, seed=0)
    assert [finding.what.startswith("a traceback: ") for finding in findings] == [True]
