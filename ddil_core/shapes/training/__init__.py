"""The training of the shapes world's networks: ``python -m ddil_core.shapes.training``."""
