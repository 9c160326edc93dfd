"""Run ``ddil`` by ``python -m ddil_eval.cli``."""

from __future__ import annotations

from ddil_eval.cli import main

if __name__ == "__main__":
    main()
