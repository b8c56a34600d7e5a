"""Being told to stop: by Slurm before the time is over, by ``kill``, by ``torchrun``.

SIGTERM and SIGUSR1 only leave a note. Training looks at it between two batches, saves, and ends with exit
code ``EXIT_STOPPED``: start the same command again and it goes on with the next batch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from utils import distributed

T = TypeVar("T")
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
_NAMES = ("SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1


class Stopped(Exception):
    """A signal ended the run; everything that it needs to go on is saved."""


class StopRequest:
    """Whether this process was told to stop.

    Attributes:
        signal: name of the signal that came, None before.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._owner = os.getpid()

    def __bool__(self) -> bool:
        return self.signal is not None

    def listen(self) -> StopRequest:
        """Take note of the signals from now on. Only the main thread can; in another this does nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                signal.signal(number, self._note)
        return self

    @property
    def reason(self) -> str:
        """What ended the run, for a message."""
        return self.signal or "a signal to another process"

    def end_if_told(self) -> None:
        """End every process if one was told to stop; every process must call it.

        Raises:
            Stopped: on every process.
        """
        if distributed.any_rank(bool(self)):
            raise Stopped(f"{self.reason}: stopped")

    def until_told(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to the one after which this process was told to stop."""
        for item in items:
            yield item
            if self:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self.signal = signal.Signals(number).name
        else:  # a child process that inherited this: see outlive_first_signal
            signal.signal(number, signal.SIG_DFL)


def outlive_first_signal(worker: int = 0) -> None:
    """Let a loader process outlive the first signal of each kind; the second ends it.

    Slurm signals whole process groups. A loader that died of it would take the batch with it that the run
    still has to finish. The second signal is that of a parent that wants to be rid of its children.

    Args:
        worker: number of the process; not used (torch passes it).
    """

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in _signals():
        signal.signal(number, ignore_once)


def _signals() -> list[signal.Signals]:
    return [signal.Signals[name] for name in _NAMES if hasattr(signal, name)]
