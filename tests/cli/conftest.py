"""Pipelines for the commands that need one."""

from __future__ import annotations

from tests.pipelines import student, teacher

__all__ = ["student", "teacher"]
