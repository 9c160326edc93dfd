"""Data sets of images with captions, one file for each kind, and the pool that they are encoded into."""
