"""Errors that a user can correct. The message is one sentence: what is wrong, where, and what to do."""

from __future__ import annotations


class DdilError(Exception):
    """The work failed. A command ends with exit status 1 and without a traceback."""

    exit_status = 1


class WrongCommand(DdilError):
    """A command, option or configuration is wrong. A command ends with exit status 2 and without a traceback."""

    exit_status = 2
