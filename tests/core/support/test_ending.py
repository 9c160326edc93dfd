"""Signals: the first stops the work as soon as it can be kept, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

UPDATES = """
import os, sys, time
from ddil_core.support.ending import Interrupted, between_updates, in_a_sentence, listen

listen()
with in_a_sentence():
    if sys.argv[1] == "outside":
        print("ready", flush=True)
        time.sleep(60)
    with between_updates() as signalled:
        for update in range(600):
            print("ready", flush=True)
            time.sleep(0.2)
            if signalled():
                print("update finished", flush=True)
                if sys.argv[1] == "saving":
                    time.sleep(60)
                if sys.argv[1] == "last":
                    break
                raise Interrupted(signalled(), "update 7 is saved")
"""


def start(where: str, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", UPDATES, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("where", "kept"),
    [("outside", "what was finished is kept"), ("updates", "update 7 is saved"), ("last", "what was finished is kept")],
)
@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_is_one_sentence_and_its_status(where: str, kept: str, number: Any, name: str, status: int) -> None:
    process = start(where)
    process.send_signal(number)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors == f"stopped by {name}: {kept}; run the same command again to go on\n"
    assert ("update finished" in said) == (where != "outside")


def test_a_second_signal_ends_at_once() -> None:
    process = start("saving")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    while process.stdout.readline() != "update finished\n":
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")


def test_what_a_terminal_and_a_launcher_send_together_is_one_signal() -> None:
    """One of several processes receives both. Only the main process prints."""
    for rank, sentence in (
        ("0", "stopped by Ctrl-C: update 7 is saved; run the same command again to go on\n"),
        ("1", ""),
    ):
        process = start("updates", RANK=rank, WORLD_SIZE="2")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=30)
        assert "update finished" in said and errors == sentence
        assert process.returncode in (130, 143)


PARENT = """
import os, subprocess, sys

child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), *sys.argv[2:]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
CHILD = """
import signal, sys, time
from pathlib import Path
from ddil_core.support.ending import Interrupted, listen, stop_with

stop_with(int(sys.argv[1]), 2.0)
listen()
if sys.argv[3] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    print("ready", flush=True)
    time.sleep(60)
except Interrupted as stop:
    if sys.argv[3] == "slow":
        time.sleep(1.5)  # longer than between two looks at the parent
    Path(sys.argv[2]).write_text(f"saved after signal {stop.number}")
"""


def ended(number: int) -> bool:
    """Whether a process of another parent is gone, or waits to be forgotten."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the state of a process is read from /proc")
@pytest.mark.parametrize(
    ("kind", "saved"), [("idle", "saved after signal 15"), ("slow", "saved after signal 15"), ("deaf", None)]
)
def test_a_process_stops_with_a_parent_that_is_killed(kind: str, saved: str | None, tmp_path: Path) -> None:
    """One that stops already is not disturbed, and one that does not stop is ended."""
    file = tmp_path / "saved"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(file), kind],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if kind == "slow":
        os.kill(child, signal.SIGTERM)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 30
    while not ended(child):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert (file.read_text() if file.exists() else None) == saved
