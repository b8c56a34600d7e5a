"""Signals that ask a run to stop: from Slurm before its time limit, ``kill``, ``torchrun`` or Ctrl-C.

SIGTERM, SIGUSR1 and SIGINT only set a flag. Training looks at it between two batches, saves, and ends with
exit code ``EXIT_STOPPED``: the same command, started again, resumes with the next batch. A second Ctrl-C
does not wait for that.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Protocol, TypeVar

from utils import distributed

T = TypeVar("T")
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1
# Launchers pass a Ctrl-C on that the terminal has sent to their processes already; a hand is slower.
_ONE_CTRL_C_S = 1.0


class Stopped(Exception):
    """A signal ended the run; everything that it needs to be resumed is saved."""


class StopRequest:
    """Whether this process received a signal to stop.

    Attributes:
        signal: name of the signal that came, None before.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._owner = os.getpid()
        self._interrupted: float | None = None  # when the first Ctrl-C came

    def __bool__(self) -> bool:
        return self.signal is not None

    def listen(self) -> StopRequest:
        """Catch the signals from now on. Only the main thread can; in another this does nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                signal.signal(number, self._note)
        return self

    @property
    def reason(self) -> str:
        """What ended the run, for a message."""
        return self.signal or "a signal to another process"

    def raise_if_set(self) -> None:
        """End every process if one received a signal; every process must call it.

        Raises:
            Stopped: on every process.
        """
        if distributed.any_rank(bool(self)):
            raise Stopped(f"{self.reason}: stopped")

    def until_set(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to the one during which a signal came."""
        for item in items:
            yield item
            if self:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a child process that has not yet handlers of its own
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > _ONE_CTRL_C_S:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.signal = signal.Signals(number).name


class Flag(Protocol):
    """A truth value in memory that processes share (``multiprocessing.RawValue``)."""

    value: bool


def outlive_signals(unwanted: Flag, worker: int = 0) -> None:
    """Let this loader process outlive signals as long as the process that reads from it wants it.

    Slurm and Ctrl-C signal the loaders too. One that died of it would take the batch with it that the run
    still has to finish. Once the run has set the flag, or is gone, a signal ends the loader at once.

    Args:
        unwanted: set by the run when it needs its loaders no more.
        worker: number of the process; not used (torch passes it).
    """
    parent = os.getppid()

    def end_if_unwanted(number: int, frame: FrameType | None) -> None:
        if unwanted.value or os.getppid() != parent:
            os._exit(0)

    for number in _signals():
        signal.signal(number, end_if_unwanted)


def _signals() -> list[signal.Signals]:
    """The signals to listen to; a background job ignores Ctrl-C, and continues to do so."""
    numbers = [signal.Signals[name] for name in _NAMES if hasattr(signal, name)]
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return [number for number in numbers if not (ignored and number == signal.SIGINT)]
