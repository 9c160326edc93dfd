"""``python -m ddil_core.shapes.training`` trains the networks of the shapes world."""

from __future__ import annotations

from ddil_core.shapes.training.train import main
from ddil_core.support import ending

if __name__ == "__main__":
    ending.listen()
    main()
