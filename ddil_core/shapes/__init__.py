"""The shapes world: scenes, their renderer, a reader of images, a scorer, and the shipped weights."""
