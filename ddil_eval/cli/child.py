"""Run ``ddil`` for another process, and stop with it: ``python -m ddil_eval.cli.child PID COMMAND …``.

A process that is killed cannot stop what it started. This one looks whether its parent is still there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from ddil_eval.cli import main

EVERY = 1.0
"""Seconds between two looks."""


def stop_with(parent: int) -> None:
    """Send SIGTERM to this process when its parent has ended, so that it saves what it can."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    stop_with(int(sys.argv.pop(1)))
    main()
