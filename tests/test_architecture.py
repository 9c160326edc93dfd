"""Imports go one way, from later rooms to earlier ones, and a command's heavy imports wait until it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    *("ddil_core.support", "ddil_core.diffusion", "ddil_core.gaussians", "ddil_core.models", "ddil_core.shapes"),
    "ddil_core.data",
    *("ddil_core.distillation", "ddil_core.export", "ddil_core.inversion", "ddil_core.shapes.training"),
    *("ddil_eval.statistics", "ddil_eval.report", "ddil_eval.metrics", "ddil_eval.features", "ddil_eval.experiments"),
    *("ddil_eval.study", "ddil_eval.cli"),
)
"""The rooms in the order of the work. A room imports from itself and from those before it."""
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip", "timm"} | {
    "matplotlib",
    "pandas",
    "scipy",
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of the modules that ``tree`` imports; ``package`` is what a relative import starts from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*parts, *filter(None, [node.module])])


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)


def package_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).parent.parts)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room that a module lies in, the inner one where rooms are nested; None for a package's own ``__init__``."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def imports() -> dict[str, set[str]]:
    """Each module of the two packages with the modules of theirs that it imports, in functions and for type checkers too."""
    files = {module_of(file): file for package in ("ddil_core", "ddil_eval") for file in sources(package)}
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {
            str(n.module) for n in nodes
        }
        found[module] = {name for name in names if name in files} - {module}
    return found


def test_every_module_has_a_room() -> None:
    homeless = {module for module in imports() if room_of(module) is None}
    assert homeless == {"ddil_core", "ddil_eval"}


def test_rooms_import_from_earlier_rooms_alone() -> None:
    """What type checkers alone import counts too."""
    upward = {
        (module, name)
        for module, names in imports().items()
        for name in names
        if (here := room_of(module)) and (there := room_of(name)) and ROOMS.index(there) > ROOMS.index(here)
    }
    assert upward == set()


def test_no_modules_import_one_another_in_a_circle() -> None:
    left = imports()
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert left == {}


def test_core_never_imports_eval() -> None:
    files = sources("ddil_core")
    assert files
    offenders = {
        str(file.relative_to(ROOT)): name
        for file in files
        for name in imported(ast.parse(file.read_text()), package_of(file))
        if name.split(".")[0] == "ddil_eval"
    }
    assert offenders == {}


@pytest.mark.parametrize("file", sources("ddil_eval/cli"), ids=lambda file: file.name)
def test_a_command_imports_nothing_heavy_before_it_runs(file: Path) -> None:
    names = {name for node in at_import(ast.parse(file.read_text()).body) for name in imported(node, package_of(file))}
    assert {name for name in names if name.split(".")[0] in HEAVY} == set()


def test_the_rules_see_what_they_forbid() -> None:
    """The two rules above on a source that breaks both in every form."""
    source = (
        "from ..ddil_eval import store\nimport ddil_eval.report.tables as t\n"
        "def later():\n    import torch\n    from ddil_eval import prompts\n"
        "if TYPE_CHECKING:\n    import pandas\nelse:\n    import scipy\n"
        "try:\n    import timm.models\nexcept ImportError:\n    import peft\n"
    )
    tree = ast.parse(source)
    assert sorted(name for name in imported(tree, "ddil_core") if "ddil_eval" in name) == [
        "ddil_eval",
        "ddil_eval",
        "ddil_eval.report.tables",
    ]
    early = {name for node in at_import(tree.body) for name in imported(node, "ddil_core")}
    assert early & {"torch", "pandas"} == set()
    assert {"scipy", "timm.models", "peft"} <= early


@pytest.mark.parametrize("package", ["ddil_core", "ddil_eval"])
def test_files_and_functions_stay_short(package: str) -> None:
    """At most 400 lines a file and 60 a function."""
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in sources(package)}
    assert {name for name, text in texts.items() if len(text.splitlines()) > 400} == set()
    functions = (
        (name, node)
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {f"{name}: {node.name}" for name, node in functions if (node.end_lineno or 0) - node.lineno >= 60} == set()


@pytest.mark.parametrize("package", ["ddil_core", "ddil_eval"])
def test_lines_end_at_120_columns(package: str) -> None:
    long = {
        f"{file.relative_to(ROOT)}:{number}"
        for file in sources(package)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    }
    assert long == set()
