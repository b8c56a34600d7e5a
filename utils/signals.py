"""Signals that stop a run: from Slurm before its time limit, ``kill``, ``torchrun`` or Ctrl-C.

SIGTERM, SIGUSR1 and SIGINT set a flag. Training checks it after every optimiser step, saves a checkpoint and
exits with code ``EXIT_STOPPED``; the same command resumes with the next batch. A second Ctrl-C interrupts at
once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Protocol, TypeVar

from utils import distributed

T = TypeVar("T")
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1
# Launchers forward a Ctrl-C that the terminal has already sent to their processes: SIGINTs within this time,
# in seconds, count as one Ctrl-C.
_ONE_CTRL_C_S = 1.0


class Stopped(Exception):
    """A signal ended the run, which can be resumed from what it saved."""


class StopRequest:
    """Whether this process received a signal to stop.

    Attributes:
        signal: name of the received signal, else None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._owner = os.getpid()
        self._interrupted: float | None = None  # time of the first Ctrl-C

    def __bool__(self) -> bool:
        return self.signal is not None

    def listen(self) -> StopRequest:
        """Install the signal handlers; does nothing outside the main thread, where that is not possible."""
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                signal.signal(number, self._note)
        return self

    @property
    def reason(self) -> str:
        """The signal that stopped the run, for a message."""
        return self.signal or "a signal to another process"

    def raise_if_set(self) -> None:
        """Raise on every process if one received a signal; every process must call it.

        Raises:
            Stopped: on every process.
        """
        if distributed.any_rank(bool(self)):
            raise Stopped(f"{self.reason}: stopped")

    def until_set(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, up to the one during which a signal is received."""
        for item in items:
            yield item
            if self:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a child process before it installs its own handlers
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > _ONE_CTRL_C_S:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.signal = signal.Signals(number).name


class Flag(Protocol):
    """A bool in shared memory (``multiprocessing.RawValue``)."""

    value: bool


def outlive_signals(unwanted: Flag) -> None:
    """Let this loader process ignore signals while its parent process needs it.

    Slurm and Ctrl-C signal the loaders too; ending there would lose the batches that the run still needs.
    When the run has set the flag or has ended, a signal ends the loader at once.

    Args:
        unwanted: set by the run when it no longer needs its loaders.
    """
    parent = os.getppid()

    def end_if_unwanted(number: int, frame: FrameType | None) -> None:
        if unwanted.value or os.getppid() != parent:
            os._exit(0)

    for number in _signals():
        signal.signal(number, end_if_unwanted)


def end_with_parent() -> None:
    """Let Linux kill this process as soon as the thread that started it ends.

    torch's loader processes look for their parent every five seconds, but wait for ever if it was killed
    while it held the lock of the event that they read first.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _signals() -> list[signal.Signals]:
    """The signals to handle; without SIGINT if it is ignored, as in background jobs."""
    numbers = [signal.Signals[name] for name in _NAMES if hasattr(signal, name)]
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return [number for number in numbers if not (ignored and number == signal.SIGINT)]
