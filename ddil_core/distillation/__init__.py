"""Distillers: one file for each method, on a shared training loop and shared sources of states."""
