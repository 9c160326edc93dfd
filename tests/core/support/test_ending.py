"""Signals: the first stops the work as soon as it can be kept, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
