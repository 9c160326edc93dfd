"""The frame of the command line: lazy imports of commands, one sentence for an error, exit statuses."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import Result

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.cli import COMMANDS, LACKS_MEMORY, Commands

HEAVY = ("torch", "torchvision", "diffusers", "transformers", "open_clip", "pandas", "scipy", "matplotlib", "pydantic")
NETWORKS = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip", "timm", "lpips")
"""Packages that a command imports only to run networks, or to look at devices."""


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Add a real command ``fail``, loaded as the others are, which raises the given exception."""

    def install(exception: BaseException) -> None:
        @click.command()
        def fail() -> None:
            raise exception

        module = ModuleType("failing")
        module.fail = fail  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "failing", module)
        monkeypatch.setitem(COMMANDS, "fail", "failing:fail")

    return install


def test_help_lists_every_command_with_its_first_sentence(cli: Callable[..., Result]) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    commands = result.stdout.split("Commands:\n")[1].splitlines()
    listed = {words[0]: words[1:] for words in map(str.split, commands) if words and words[0] in COMMANDS}
    assert list(listed) == list(COMMANDS)
    assert all(len(words) >= 3 for words in listed.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_says_what_it_does(name: str, cli: Callable[..., Result]) -> None:
    assert cli(name, "--help").exit_code == 0
    command = Commands().get_command(click.Context(Commands()), name)
    assert command is not None and command.help


def test_help_is_quick_and_imports_nothing_heavy(root: Path) -> None:
    script = (
        "import sys\nfrom ddil_eval.cli import ddil\n"
        "ddil(['--help'], standalone_mode=False)\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.stderr == "heavy: []\n"
    # Seconds of processor time, which other work on the machine does not stretch as it does the clock's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("--help", (*HEAVY, "numpy", "rich", "importlib.metadata")),
        ("--version", (*HEAVY, "numpy", "rich")),
        ("report --results results/shapes", (*NETWORKS, "scipy", "pandas", "matplotlib", "numpy")),
        ("models", (*NETWORKS, "scipy", "pandas", "matplotlib")),
        ("data", (*NETWORKS, "scipy", "pandas", "matplotlib", "pydantic")),
        ("metrics", (*NETWORKS, "pandas", "matplotlib", "pydantic")),
        ("doctor", (*NETWORKS[1:], "torch._dynamo", "scipy", "pandas", "matplotlib", "pydantic")),
    ],
)
def test_a_quick_command_does_not_import_what_it_does_not_use(
    command: str, unused: tuple[str, ...], root: Path
) -> None:
    """These imports take most of a quick command's time. `benchmarks.startup` measures the seconds."""
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('imported:', sorted(set({unused!r}) & set(sys.modules)), file=sys.stderr))\n"
        "from ddil_eval.cli import main\nmain()"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *command.split()], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.stdout
    assert run.stderr.splitlines()[-1] == "imported: []"


def test_version(cli: Callable[..., Result]) -> None:
    try:
        expected = version("ddil")
    except PackageNotFoundError:
        expected = "(not installed)"
    assert cli("--version").stdout == f"ddil {expected}\n"


@pytest.mark.parametrize(("kind", "status"), [(DdilError, 1), (WrongCommand, 2)])
def test_a_users_mistake_is_one_sentence_without_traceback(
    kind: type[DdilError], status: int, cli: Callable[..., Result], fail_with: Callable[[BaseException], None]
) -> None:
    fail_with(kind("there is no folder a/b: make it, or name another with --out."))
    result = cli("fail")
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr == "error: there is no folder a/b: make it, or name another with --out.\n"


def test_an_interrupted_command_says_how_to_go_on(
    cli: Callable[..., Result], fail_with: Callable[[BaseException], None]
) -> None:
    fail_with(KeyboardInterrupt())
    result = cli("fail")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b cannot be used: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a\nb"), "a\\nb cannot be used: Read-only file system"),
        (MemoryError(), LACKS_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 2^62 bytes"), LACKS_MEMORY),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(
    error: Exception, sentence: str, cli: Callable[..., Result], fail_with: Callable[[BaseException], None]
) -> None:
    fail_with(error)
    result = cli("fail")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {sentence}\n")


def test_a_folder_that_was_deleted(cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = cli("data")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: the working folder of this command has been deleted; change into another folder\n"


def test_a_fault_of_the_program_keeps_its_traceback(
    cli: Callable[..., Result], fail_with: Callable[[BaseException], None]
) -> None:
    fail_with(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("fail")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("distil", "There is no command 'distil': did you mean distill?"),
        ("metric", "There is no command 'metric': did you mean metrics?"),
        ("zzzz", "There is no command 'zzzz': ddil --help lists the commands."),
    ],
)
def test_an_unknown_command_is_refused_with_the_nearest(word: str, sentence: str, cli: Callable[..., Result]) -> None:
    result = cli(word)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {sentence}"


def test_an_unknown_option_exits_2(cli: Callable[..., Result]) -> None:
    result = cli("doctor", "--no-such-option")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_the_module_runs_as_the_script_does(root: Path) -> None:
    command = [sys.executable, "-m", "ddil_eval.cli", "zzzz"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "There is no command 'zzzz'" in run.stderr
    assert "Traceback" not in run.stderr
