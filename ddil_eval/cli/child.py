"""Run ``ddil`` for another process, and stop with it: ``python -m ddil_eval.cli.child PID COMMAND …``."""

from __future__ import annotations

import sys

from ddil_core.support.ending import stop_with
from ddil_eval.cli import main

if __name__ == "__main__":
    stop_with(int(sys.argv.pop(1)))
    main()
