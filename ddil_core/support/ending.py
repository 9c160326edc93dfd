"""How Ctrl-C or SIGTERM stops a command. Clusters send SIGTERM. Both have the same effect.

The first signal stops the work at once. Inside ``between_updates`` the current update is finished first, so that it can
be saved. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ddil_core.support import ranks
from ddil_core.support.errors import DdilError
from ddil_core.support.text import one_line

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
GO_ON = "run the same command again to go on"

_SAME = 10.0
"""For this many seconds, one of several processes ignores a second signal.

A terminal or a cluster sends the signal to every process, and the program that started them sends it again.
"""


PATIENCE = 120.0
"""Seconds that a process has to save its work when it is stopped."""

_LOOK = 1.0
"""Seconds between two looks at the parent process."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the command. The message says which part of the work is kept."""

    def __init__(self, number: int, kept: str = "what was finished is kept") -> None:
        super().__init__(f"stopped by {NAMES.get(signal.Signals(number), number)}: {kept}; {GO_ON}")
        self.number = number
        _received.at = time.monotonic()  # a signal that comes while the processes end still counts as the same one
        self.exit_status = 128 + number


class _Received:
    """The last signal and its time, and whether a signal waits for the end of an update."""

    number: int | None = None
    at = 0.0
    deferred = False
    listening = False


_received = _Received()


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """End the process with one sentence on stderr and an exit status where the block fails or is stopped."""
    try:
        yield
    except DdilError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Interrupted as error:
        if ranks.is_main():
            print(one_line(str(error)), file=sys.stderr)
        sys.exit(error.exit_status)


def listen() -> None:
    """From now on, raise ``Interrupted`` in the main thread on SIGTERM and Ctrl-C.

    Of several processes only the main one does so. Outside of training, the others have nothing to save. They may also
    wait for the main process in a call in which Python handles no signals.
    """
    _received.number, _received.deferred, _received.listening = None, False, True
    if ranks.is_main():
        _handle()


def stop_with(parent: int, patience: float = PATIENCE) -> None:
    """From now on, stop this process when its parent has ended, in whatever way: one that is killed can stop nothing.

    The process gets SIGTERM, so that it saves what it can, and is ended where that takes too long. A process that
    stops already gets no second signal.

    Args:
        parent: The parent's number, from the parent itself: it may have ended already.
        patience: Seconds until the process is ended.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        if _received.number is None:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


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
    """Finish the current update before a signal stops the work.

    Yields a function that returns the number of the signal that came, or 0. The block calls the function between
    updates, saves, and raises ``Interrupted``. Without ``listen``, as in a program that imports this package, signals
    keep their handlers.
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
    if _received.number is not None:  # the signal came after the block's last call
        raise Interrupted(_received.number)
