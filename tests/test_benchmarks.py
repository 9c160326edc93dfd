"""The frame of the benchmarks: alternation, claims, and what is printed and written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import alternation, printing
from benchmarks.claims import Claim, table


def test_contenders_alternate_and_the_order_is_reversed_each_round() -> None:
    order: list[str] = []
    times = alternation.compare({name: lambda n=name: order.append(n) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert list(times) == ["a", "b", "c"]
    assert {len(seconds) for seconds in times.values()} == {3}


def test_the_two_clocks_differ_in_what_sleeping_costs() -> None:
    from time import sleep

    def seconds(clock: alternation.Clock) -> float:
        return alternation.compare({"sleep": lambda: sleep(0.05)}, rounds=1, clock=clock)["sleep"][0]

    assert seconds("wall") >= 0.05
    assert seconds("cpu") < 0.05


@pytest.mark.parametrize(("names", "rounds"), [("", 1), ("a", 0)])
def test_nothing_to_compare_is_refused(names: str, rounds: int) -> None:
    with pytest.raises(ValueError, match=f"^compare needs a contender and a round, not {len(names)} and {rounds}$"):
        alternation.compare(dict.fromkeys(names, int), rounds=rounds)


def test_ratios_are_paired_by_round() -> None:
    """A machine that slows down tenfold changes the medians, and no ratio."""
    peer, ours = [1.0, 10.0, 1.0], [0.5, 5.0, 0.5]
    assert alternation.ratios(ours, peer) == [0.5, 0.5, 0.5]
    assert alternation.spread(peer) == 9.0
    rows = alternation.figures({"ours": ours, "peer": peer}, peer="peer").set_index("contender")
    assert rows.loc["ours", ["ratio", "ratio_least", "ratio_most"]].tolist() == [0.5, 0.5, 0.5]
    assert rows.loc["peer", ["median_s", "least_s", "most_s", "ratio"]].tolist() == [1.0, 1.0, 10.0, 1.0]


def test_a_claim_is_judged_by_its_ratio_or_by_its_own_figure() -> None:
    assert Claim("", ours=0.8, peer=1.0, bar=0.8).met is True
    assert Claim("", ours=0.9, peer=1.0, bar=0.8).met is False
    assert Claim("", ours=1.5, peer=1.0, bar=1.5, at_least=True).met is True
    assert Claim("", ours=0.2, bar=0.3).met is True
    assert Claim("", ours=0.4, bar=0.3).met is False
    assert Claim("", ours=0.4).met is None
    timed = Claim.timed("", [1.0, 40.0, 1.0], [2.0, 20.0, 2.0])  # 0.5, 2, 0.5
    assert (timed.ours, timed.peer, timed.quotient, timed.met) == (1.0, 2.0, 0.5, True)


def test_the_summary_has_a_row_for_each_claim() -> None:
    claims = [("x", Claim("fast", 1.0, 2.0, 1.0)), ("y", Claim("much", 3.0, bar=4.0, at_least=True)), ("z", Claim("", 5))]
    rows = table(claims).astype(object).where(lambda frame: frame.notna(), None).to_numpy().tolist()
    assert rows == [
        ["x", "fast", 1.0, 2.0, 0.5, "≤ 1", "yes"],
        ["y", "much", 3.0, None, None, "≥ 4", "no"],
        ["z", "", 5.0, None, None, None, ""],
    ]
    assert list(table([])) == list(table(claims))


def test_a_csv_file_names_the_device_and_the_versions_and_can_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import platform

    frame = pd.DataFrame({"what": ["[bold]a, b # c"], "seconds": [1 / 3]})
    path = tmp_path / "new" / "figures.csv"
    printing.show(frame, path, packages=["click", "no-such-package"])
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert f"python {platform.python_version()}, ddil " in first
    assert first.endswith(", no-such-package (not installed)")
    pd.testing.assert_frame_equal(printing.read(path), frame)
    assert "[bold]a, b # c" in capsys.readouterr().out
