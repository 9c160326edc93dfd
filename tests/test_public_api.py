"""The public Python API: what it holds, that it is lazy, and that type checkers see it."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

PUBLIC = {
    "ddil_core": {"__version__", "distill", "load_model", "rollout", "sample"},
    "ddil_eval": {"__version__", "compare", "covariate_shift", "load_records", "metrics", "score"},
}
HEAVY = ("torch", "diffusers", "transformers", "pandas", "scipy", "matplotlib", "pydantic")


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", PUBLIC)
def test_type_checkers_see_the_names_that_are_imported_late(package: str, root: Path) -> None:
    """The imports under TYPE_CHECKING name the same modules as the late imports."""
    source = (root / package / "__init__.py").read_text()
    typed = {
        alias.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module and node.module.startswith(f"{package}.")
    }
    assert typed == importlib.import_module(package)._SOURCES
    assert (root / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PUBLIC)
def test_importing_a_package_imports_nothing_heavy(package: str, root: Path) -> None:
    script = f"import sys, {package}; print({package}.__version__, [name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split()[1] == "[]"


@pytest.mark.parametrize("package", PUBLIC)
def test_a_shell_completes_the_names_that_are_imported_late(package: str, root: Path) -> None:
    script = f"import {package}; print(*dir({package}))"
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert PUBLIC[package] <= set(run.stdout.split())


@pytest.mark.parametrize("package", PUBLIC)
def test_public_functions_are_typed_and_documented(package: str) -> None:
    """Functions with five parameters or more describe each of them."""
    module = importlib.import_module(package)
    functions = [value for name in module.__all__ if inspect.isfunction(value := getattr(module, name))]
    assert len(functions) == 4
    for function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        documented = inspect.getdoc(function) or ""
        for name, parameter in signature.parameters.items():
            assert parameter.annotation is not inspect.Parameter.empty
            assert len(signature.parameters) < 5 or f"\n    {name}: " in documented, f"{function.__name__}: {name}"
