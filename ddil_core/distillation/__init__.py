"""Distillation of few-step students: a run, its stages, their sources of states, and one file for each method."""
