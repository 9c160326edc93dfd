"""Code in README and docs/python.md runs, each script in ``examples`` runs, and links of all pages lead somewhere."""

from __future__ import annotations

import doctest
import importlib.util
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddil_eval.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def desk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the committed results in it, where guides and scripts write."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "shapes").symlink_to(root / "results" / "shapes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.weights
@pytest.mark.parametrize("guide", ["README.md", "docs/python.md"])
def test_the_code_of_a_guide_runs(guide: str, root: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    results = doctest.testfile(str(root / guide), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 4
    assert results.failed == 0


Example = Callable[..., str]


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Run a script of ``examples`` as ``python`` does, in this process, and return what it prints."""

    def run(script: str, *options: str) -> str:
        path = root / "examples" / script
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.mark.weights
def test_an_example_compares_a_student(desk: Path, root: Path, run: Example) -> None:
    student = str(root / "ddil_core" / "shapes" / "weights" / "teacher")  # the teacher again, under another name
    printed = run("compare_a_student.py", "--student", student, "--num-prompts", "8", "--out", "out")
    assert len(printed.splitlines()) >= 3 and "drawn_right_low" in printed
    assert (desk / "out" / "student.png").is_file()


@pytest.mark.weights
def test_an_example_rolls_out_a_string(desk: Path, run: Example) -> None:
    assert run("roll_out_a_string.py", "--student", "shapes") == "rollouts.png: TTTT | TTSS | SSTT | SSSS\n"
    assert (desk / "rollouts.png").is_file()


@pytest.mark.weights
@pytest.mark.usefixtures("desk")
def test_an_example_adds_a_metric(run: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METRICS, "_own", dict(METRICS._own))
    printed = run("add_a_metric.py", "--num-prompts", "8")
    assert printed.startswith("standard deviation of an image's values: 0.")


def test_the_rows_of_the_guide_to_additions_are_rows(root: Path) -> None:
    """The guide's solver is DDIM, and its method is a row of the table of methods."""
    import torch

    from ddil_core.diffusion.schedule import Schedule
    from ddil_core.diffusion.solvers import SOLVERS, Solver
    from ddil_core.distillation.methods import Method

    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (root / "docs/guides/extend.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "extend.md", "exec", dont_inherit=True), names)
    solver, method = names["SOLVER"], names["METHOD"]
    assert isinstance(solver, Solver) and isinstance(method, Method)
    assert method.config().method == method.name
    z, x0 = torch.randn(2, 2, 4, 8, 8)
    t, s = torch.tensor([999, 749]), torch.tensor([749, 250])
    schedule = Schedule.stable_diffusion()
    expected, _ = SOLVERS["ddim"].step(schedule, z, t, s, x0, None, None)
    assert torch.allclose(solver.step(schedule, z, t, s, x0, None, None)[0], expected)


DOCS = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *DOCS)
LINK = re.compile(r"\]\((?!\w+://)(?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    headings = re.findall(r"^#+ (.*)$", without_links, flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str, root: Path) -> None:
    text = (root / page).read_text(encoding="utf-8")
    for link in LINK.finditer(text):
        target = (root / page).parent / link["target"] if link["target"] else root / page
        assert target.exists(), link[0]
        if link["anchor"] and target.suffix == ".md":
            assert link["anchor"] in anchors(target.read_text(encoding="utf-8")), link[0]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_pages_end_at_120_columns(page: str, root: Path) -> None:
    long = [line for line in (root / page).read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert long == []


@pytest.mark.parametrize("page", DOCS)
def test_the_site_gets_the_images_outside_of_docs(page: str, root: Path) -> None:
    """Pages show figures of the results, which the site copies."""
    specification = importlib.util.spec_from_file_location("hooks", root / "docs" / "hooks.py")
    assert specification is not None and specification.loader is not None
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    shown = re.findall(r"!\[[^\]]*\]\((?:\.\./)+(results/[^)]*)\)", (root / page).read_text(encoding="utf-8"))
    assert hooks.images_outside([page]) == list(dict.fromkeys(shown))
    assert all((root / path).is_file() for path in shown)
