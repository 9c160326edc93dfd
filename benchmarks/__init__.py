"""Benchmarks of ddil: one script, one claim. `python -m benchmarks --list` lists those that run together.

Some take networks from the checkout's `tests`. Therefore the checkout comes first on the path, also where the working
folder holds another package of this name.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

if sys.path[0] != str(ROOT):
    sys.path.insert(0, str(ROOT))
