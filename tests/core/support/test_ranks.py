"""A process that never starts, or that dies, leaves the others with one sentence and not waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from datetime import timedelta
from ddil_core.support import ranks
from ddil_core.support.ending import in_a_sentence

ranks.ARRIVAL = timedelta(seconds=float(sys.argv[1]))
with in_a_sentence():
    ranks.meet()
    if ranks.rank() == 1 and sys.argv[2] == "dies":
        os._exit(1)
    ranks.barrier()
"""


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize(
    ("fate", "arrival", "reason"), [("dies", 60, "Connection "), ("never starts", 1, "Timed out after ")]
)
def test_a_process_that_is_gone_ends_the_others_in_a_sentence(fate: str, arrival: int, reason: str) -> None:
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2",
                                "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(arrival), fate], env=environment | {"RANK": str(rank)}, text=True,
            stderr=subprocess.PIPE,
        )
        for rank in ((0, 1) if fate == "dies" else (0,))
    ]  # fmt: skip
    said, *_ = [process.communicate(timeout=120)[1] for process in started]
    assert started[0].returncode == 1
    assert said.splitlines()[-1].startswith("error: process 0 of 2 waits in vain for the others (") and reason in said
    assert said.endswith("); see what they said, and run the same command again to go on\n") and "Traceback" not in said
