"""``python -m ddil_eval.cli`` is ``ddil``."""

from __future__ import annotations

from ddil_eval.cli import main

if __name__ == "__main__":
    main()
