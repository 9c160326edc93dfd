"""Captioned pictures by reference, one file a kind, and the pool that they are encoded into."""
