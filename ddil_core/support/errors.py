"""Errors that a user can mend. Their message is one sentence: what is wrong, where, and what to do."""

from __future__ import annotations


class DdilError(Exception):
    """Work that failed: exit status 1, no traceback."""

    exit_status = 1


class WrongCommand(DdilError):
    """A command, option or configuration that cannot be meant: exit status 2, no traceback."""

    exit_status = 2
