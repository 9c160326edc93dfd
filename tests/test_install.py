"""A wheel holds everything that is read at run time, and what it holds is found from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout built into a wheel, with the build backend of the ``dev`` extra, so that nothing is fetched."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: install the dev extra")
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", out, root], check=True, cwd=out)
    (built,) = out.glob("ddil-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def relative(root: Path, folder: str, pattern: str) -> set[str]:
    """Files under ``folder`` of the checkout that fit ``pattern``, by their path below it."""
    files = (root / folder).rglob(pattern)
    return {file.relative_to(root / folder).as_posix() for file in files if file.is_file()}


def python(script: str, folder: Path, path: Path) -> list[str]:
    """The lines that ``script`` prints when it runs in ``folder`` with ``path`` before the site packages."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


SHOW_DATA = """
from ddil_core.support.resources import paper_results, protocols
print(protocols(), paper_results(), sep="\\n")
print(len(list(protocols().rglob("*.yaml"))), len(list(paper_results().glob("*.csv"))))
"""


def test_wheel_has_the_parts_of_the_page(names: set[str]) -> None:
    assert {f"ddil_eval/report/page/page.{suffix}" for suffix in ("html.j2", "css", "js")} <= names


@pytest.mark.parametrize("package", ["ddil_core", "ddil_eval"])
def test_wheel_has_every_module(package: str, root: Path, names: set[str]) -> None:
    modules = relative(root, package, "*.py")
    assert modules
    assert {f"{package}/{module}" for module in modules} <= names
    assert f"{package}/py.typed" in names


@pytest.mark.parametrize(
    ("folder", "pattern", "inside"),
    [("protocols", "*.yaml", "ddil_core/_data/protocols"), ("results/paper", "*.csv", "ddil_core/_data/paper")],
)
def test_wheel_has_the_data(folder: str, pattern: str, inside: str, root: Path, names: set[str]) -> None:
    files = relative(root, folder, pattern)
    assert files
    assert {name for name in names if name.startswith(f"{inside}/")} >= {f"{inside}/{file}" for file in files}


@pytest.mark.weights
def test_wheel_has_the_shipped_weights(root: Path, names: set[str], wheel: Path) -> None:
    folder = "ddil_core/shapes/weights"
    files = {file for suffix in ("safetensors", "json", "txt") for file in relative(root, folder, f"*.{suffix}")}
    assert "teacher/model_index.json" in files
    assert {f"{folder}/{file}" for file in files} <= names
    with zipfile.ZipFile(wheel) as archive:
        size = sum(item.file_size for item in archive.infolist() if item.filename.startswith(folder))
    assert size <= 50e6


def test_wheel_has_only_the_packages(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ddil_core", "ddil_eval"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_installed_wheel_runs_from_any_folder(wheel: Path, root: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere and started there, it finds its own protocols and paper numbers, not the checkout's."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    first, second, counts = python(SHOW_DATA, elsewhere, site)
    assert Path(first) == site / "ddil_core" / "_data" / "protocols"
    assert Path(second) == site / "ddil_core" / "_data" / "paper"
    tables = relative(root, "results/paper", "*.csv")
    assert counts == f"{len(relative(root, 'protocols', '*.yaml'))} {len(tables)}"


def test_doctor_reads_the_bounds_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "from ddil_eval.cli import doctor; print(*doctor.declared(), sep='\\n')"
    bounds, requirements = python(script, tmp_path, tmp_path / "site")
    assert set(bounds.split(",")) == {">=3.11", "<3.14"}
    assert "'torch>=2.11'" in requirements and "extra == 'dev'" in requirements


def test_the_checkouts_own_data_is_used_in_the_checkout(root: Path, tmp_path: Path) -> None:
    first, second, _ = python(SHOW_DATA, tmp_path, root)
    assert (first, second) == (str(root / "protocols"), str(root / "results" / "paper"))
