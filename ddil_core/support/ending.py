"""How a command ends before its work is done: by Ctrl-C, or by SIGTERM, which clusters send. Both mean the same.

The first signal stops the work as soon as what was done can be kept: at once, or within ``between_updates`` after the update
that is being made. A second one ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ddil_core.support import ranks
from ddil_core.support.errors import DdilError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
GO_ON = "run the same command again to go on"

_SAME = 10.0
"""Seconds in which several processes take a further signal for the first one: a terminal or a cluster sends it to each of them, and
so does the program that started them."""


class Interrupted(KeyboardInterrupt):
    """A command stopped by a signal. The message says what is kept."""

    def __init__(self, number: int, kept: str = "what was finished is kept") -> None:
        super().__init__(f"stopped by {NAMES.get(signal.Signals(number), number)}: {kept}; {GO_ON}")
        self.number = number
        _received.at = time.monotonic()  # what comes while the processes end together is still the same signal
        self.exit_status = 128 + number


class _Received:
    """The signal that came, and when; whether it waits for the end of an update."""

    number: int | None = None
    at = 0.0
    deferred = False
    listening = False


_received = _Received()


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """End the process with a sentence on stderr and an exit status where the block fails or is stopped."""
    try:
        yield
    except DdilError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Interrupted as error:
        if ranks.is_main():
            print(error, file=sys.stderr)
        sys.exit(error.exit_status)


def listen() -> None:
    """From now on SIGTERM and Ctrl-C raise ``Interrupted`` in the main thread.

    Of several processes the main one listens. The others have nothing to say or to save outside of training, and may be waiting for
    the main one where Python handles no signals.
    """
    _received.number, _received.deferred, _received.listening = None, False, True
    if ranks.is_main():
        _handle()


def _handle() -> None:
    for number in SIGNALS:
        signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    if _received.number is not None:
        if ranks.world() > 1 and time.monotonic() - _received.at < _SAME:
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _received.number, _received.at = number, time.monotonic()
    if not _received.deferred:
        raise Interrupted(number)


@contextmanager
def between_updates() -> Iterator[Callable[[], int]]:
    """Let an update be finished before a signal stops the work.

    Yields a function that gives the number of the signal that came, or 0. The block looks at it between updates, saves, and raises
    ``Interrupted``. Without ``listen``, as in a program that calls this package, signals do what they did before.
    """
    before = [signal.getsignal(number) for number in SIGNALS]
    _received.deferred = True
    if _received.listening:
        _handle()
    try:
        yield lambda: _received.number or 0
    finally:
        _received.deferred = False
        if _received.listening:
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)
    if _received.number is not None:  # it came after the last look
        raise Interrupted(_received.number)
