"""One process holds a folder at a time, and messages name it. The lock ends with its process."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddil_core.support.errors import DdilError
from ddil_core.support.lock import LOCK, held, held_by_main, waiting_for

HOLDER = """
import sys, time
from pathlib import Path
from ddil_core.support.lock import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds ``tmp_path / "out"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_holder_is_refused_with_the_name_of_the_first(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(DdilError) as error, held(out):
        raise AssertionError("two hold one folder")
    sentence = str(error.value)
    assert sentence.startswith(f"the folder {out} is in use by process {other.pid} on {socket.gethostname()} since 2")
    assert sentence.endswith("); wait until that ends, or name another folder") and "\n" not in sentence
    assert error.value.exit_status == 1
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (out / LOCK).is_file()  # what it left does not count
    with held(out):
        assert (out / LOCK).is_file()
    assert list(out.iterdir()) == []


def test_a_cache_is_waited_for(tmp_path: Path, other: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {other.pid}"])
    with waiting_for(tmp_path / "out"):
        assert other.wait() == -signal.SIGKILL
    ended.wait()
    assert f"is in use by process {other.pid} on" in capfd.readouterr().err


def test_a_command_may_hold_what_a_part_of_it_holds(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with held(out):
        with held_by_main(out), held(out / ".." / "out"):
            (out / "file").write_text("x")
        assert (out / LOCK).is_file()
    assert [path.name for path in out.iterdir()] == ["file"]


def test_what_a_killed_command_left_among_the_figures_is_deleted(tmp_path: Path) -> None:
    """The images of strips are the deepest files that commands write."""
    folder = tmp_path / "out" / "covariate-shift" / "ddil-0a1b2c3d" / "strips" / "figure2"
    killed = "import os, pathlib, sys; from ddil_core.support.files import replacing\n"
    killed += "with replacing(pathlib.Path(sys.argv[1])) as path: path.write_text('half'); os._exit(9)"
    subprocess.run([sys.executable, "-c", killed, str(folder / "000000.png")], check=False)
    assert len(list(folder.iterdir())) == 1
    with held(tmp_path / "out"):
        assert list(folder.iterdir()) == []


def test_a_folder_made_in_vain_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(DdilError), held(tmp_path / "runs" / "deep" / "out"):
        raise DdilError("the work failed before it began")
    with pytest.raises(DdilError), held(tmp_path / "a" / "b" / ".." / ".." / "x"):
        raise DdilError("the path goes through folders that it does not need")
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_main_one_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # of one, so that it waits for nobody
    with held_by_main(tmp_path / "out"):
        assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DdilError, match="cannot be written to"), held(tmp_path / "file"):
        pass


def test_what_a_kill_left_is_gone_once_the_folder_is_held(tmp_path: Path) -> None:
    inside = tmp_path / "images" / "teacher"
    inside.mkdir(parents=True)
    for folder in (tmp_path, inside):
        (folder / ".a.0123abcd.partial.json").write_text("half")
        (folder / ".mine.json").write_text("whole")
    with held(tmp_path):
        (tmp_path / ".b.0123abcd.partial.json").write_text("being written")
        with held(tmp_path):
            names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != LOCK)
    assert names == [".b.0123abcd.partial.json", ".mine.json", ".mine.json"]


def test_a_lock_that_another_machine_left_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Over a network file system without locks, that command may still run."""
    content = {"host": "elsewhere", "pid": 7, "since": "2026-01-01T00:00:00+00:00", "command": "ddil distill"}
    (tmp_path / LOCK).write_text(json.dumps(content))
    with held(tmp_path):
        said = " ".join(capfd.readouterr().err.split())
    assert "was taken by process 7 on elsewhere since 2026-01-01T00:00:00+00:00 (ddil distill) and not released" in said
    (tmp_path / LOCK).write_text(json.dumps(content | {"host": socket.gethostname()}))
    with held(tmp_path):
        assert capfd.readouterr().err == ""  # this machine's locks end with their process


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def refused(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with held(tmp_path):
        said = " ".join(capfd.readouterr().err.split())
    assert "cannot be locked (No locks available); start no second command on it" in said
