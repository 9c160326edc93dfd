"""The frame of the benchmarks: alternation, claims, the table and its runner, and what is printed and written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks import __main__ as runner
from benchmarks import alternation, printing
from benchmarks.claims import Claim, table
from benchmarks.table import BENCHMARKS, LIMIT, Benchmark, Plan

QUICK = ("--seconds", "0.01", "--size", "64")
"""Arguments with which ``benchmarks.ceilings`` takes little time."""


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
    claims = [
        ("x", Claim("fast", 1.0, 2.0, 1.0)),
        ("y", Claim("much", 3.0, bar=4.0, at_least=True)),
        ("z", Claim("", 5)),
    ]
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

    frame = pd.DataFrame({"what": ["[bold]a, b # c", "d"], "seconds": [1 / 3, float("nan")]})
    path = tmp_path / "new" / "figures.csv"
    printing.show(frame, path, packages=["click", "no-such-package"])
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert f"python {platform.python_version()}, ddil " in first
    assert first.endswith(", no-such-package (not installed)")
    pd.testing.assert_frame_equal(printing.read(path), frame)
    printed = capsys.readouterr().out
    assert "[bold]a, b # c │ 0.3333" in printed
    assert "d              │ –" in printed


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_of_the_table_is_a_script_that_writes_a_csv_file(name: str) -> None:
    from importlib import import_module

    module = import_module(f"benchmarks.{name}")
    assert isinstance(module.main, click.Command)
    assert "--csv" in {option for parameter in module.main.params for option in parameter.opts}
    assert f"python -m benchmarks.{name} " in module.__doc__


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_all_benchmarks_of_a_machine_fit_into_the_limit(kind: str) -> None:
    plans = [plan for row in BENCHMARKS.values() if (plan := row.plan(kind))]
    assert plans
    assert sum(plan.seconds for plan in plans) < LIMIT


def in_another_folder(folder: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks`` in a folder that has a package ``tests`` and a folder ``benchmarks`` of its own."""
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").write_text("raise RuntimeError('the wrong tests')")
    (folder / "benchmarks").mkdir()
    command = [sys.executable, "-m", "benchmarks", *arguments]
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_list_names_every_benchmark_from_any_folder(root: Path, tmp_path: Path) -> None:
    run = in_another_folder(tmp_path, root, "--list")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *BENCHMARKS]
    assert all(line.endswith(row.claim) for line, row in zip(lines[1:], BENCHMARKS.values(), strict=True))
    assert not (tmp_path / "runs").exists()


def test_the_checkouts_tests_are_imported_from_any_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise RuntimeError('the wrong tests')")
    script = "import benchmarks, tests; print(tests.__file__)"
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(root / "tests" / "__init__.py")


def test_an_unknown_benchmark_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(runner.main, ["--only", "speed", "--out", str(tmp_path / "new")])
    assert result.exit_code == 2
    known = ", ".join(map(repr, BENCHMARKS))
    assert result.stderr.splitlines()[-1] == f"Error: Invalid value for '--only': 'speed' is not one of {known}."
    assert not (tmp_path / "new").exists()


def test_a_benchmark_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "kind_of_machine", lambda: "gpu")
    result = CliRunner().invoke(runner.main, ["--only", "startup", "--out", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: startup: nothing to measure on a machine with a GPU"
    assert not (tmp_path / "new").exists()


def test_a_benchmark_runs_and_a_failed_one_does_not_stop_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real runner on the real ``ceilings``, beside a script that exits with an error."""
    monkeypatch.chdir(tmp_path)
    quick = Plan(60, *QUICK)
    rows = (Benchmark("startup", "", Plan(60, "--nonsense"), quick), Benchmark("ceilings", "", quick, quick))
    monkeypatch.setattr(runner, "BENCHMARKS", {row.name: row for row in rows})
    result = CliRunner().invoke(runner.main, ["--out", "out"])
    assert result.exit_code == 1
    out = tmp_path / "out"
    (failure,) = [line for line in result.stderr.splitlines() if "failed" in line]
    assert failure.startswith("startup failed: exit status 2: Error: No such option")
    assert failure.endswith(f"; see {out / 'startup.log'}")
    assert "product of matrices, float32" in (out / "ceilings.log").read_text()
    measured, claimed = printing.read(out / "ceilings.csv"), printing.read(out / "summary.csv")
    assert measured["rate"].gt(0).all()
    assert claimed["benchmark"].unique().tolist() == ["ceilings"]
    assert claimed["ours"].tolist() == pytest.approx(measured["rate"].tolist())


def test_a_benchmark_that_hangs_is_stopped_with_its_own_processes(tmp_path: Path) -> None:
    with pytest.raises(runner.Failed, match=r"^stopped after 0\.1 times its planned 1 s; see .*startup\.log$"):
        runner.run(Benchmark("startup", ""), Plan(1), tmp_path, patience=0.1)


def test_operations_of_a_product_are_counted_with_and_without_numbers() -> None:
    import torch

    from benchmarks.limits import operations

    for device in ("cpu", "meta"):
        a, b = torch.zeros(3, 5, device=device), torch.zeros(5, 7, device=device)
        assert operations(lambda a=a, b=b: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of the memory")
def test_the_peak_holds_what_was_freed_again_and_not_what_was_held_before() -> None:
    import numpy as np
    import torch

    from benchmarks.scale import peak, reset_peak

    if torch.cuda.is_available():
        pytest.skip("here the peak is that of the GPU")
    held = reset_peak()
    np.ones(2**23)  # 64 MiB, freed at once
    assert 60 < peak() - held < 100
    held = reset_peak()
    assert peak() - held < 10


def test_the_plots_of_scale_are_drawn(tmp_path: Path) -> None:
    from benchmarks.scale import plot

    rows = [
        {"axis": axis, "what": "work", "at": at, "seconds": at, "seconds_per_image": 1.0, "peak_MiB": 2.0 * at}
        for axis in ("batch", "steps", "prompts", "N")
        for at in (1, 2)
    ]
    plot(pd.DataFrame(rows), "title", tmp_path / "new")
    assert (tmp_path / "new" / "scale.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "new" / "scale.svg").read_text(encoding="utf-8")
    assert svg.count('id="axes_') == 6
