"""Run the training of the shapes world's networks: ``python -m ddil_core.shapes.training``."""

from __future__ import annotations

from ddil_core.shapes.training.train import main
from ddil_core.support import ending

if __name__ == "__main__":
    ending.listen()
    main()
