"""Real processes of commands, forked from one that has imported everything: without seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The bound of every process that a test starts, in seconds: at least five times what the slowest takes on a
# quiet machine with two cores, so that only a process that hangs reaches it.
BOUND = 600.0

_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What the programs import, also later than at their start.
_PRELOADED = (
    *("forked", "run", "session", "session.tensorboard", "inference.images", "dataset.check"),
    *("report.command", "utils.visualize", "torch.distributed.run"),
)


class Fork:
    """``python`` with some words, e.g. ``run.py --help``, in a process group of its own (cf. ``Popen``).

    Args:
        words: of the command line after ``python``.
        environment: all variables. Those that torch reads when it is imported have no effect.
        output: file to which stdout is appended.
        errors: the same for stderr; None: ``output``.
        prepare: a function of a module, called in the process before the program.
        folder: working directory.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str],
        output: Path,
        errors: Path | None = None,
        *,
        prepare: Callable[[], None] | None = None,
        folder: Path = ROOT,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the server when it imports torch
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        arguments = (list(words), environment, output, errors or output, prepare, folder)
        self._process: ForkServerProcess = context.Process(target=_python, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = BOUND) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("forked command", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def python(*words: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, as ``subprocess.run`` with ``capture_output`` and ``text``.

    Args:
        words: of the command line after ``python``.
        folder: working directory.
        environment: further variables.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out, err = (Path(temporary) / name for name in ("out", "err"))
        typed = [str(word) for word in words]
        fork = Fork(typed, environments()[0] | environment, out, err, folder=folder)
        try:
            code = fork.wait()
        finally:
            fork.kill()
        return subprocess.CompletedProcess(typed, code, out.read_text("utf-8"), err.read_text("utf-8"))


def environments(processes: int = 1) -> list[dict[str, str]]:
    """The variables of each process of a run, as a launcher sets them."""
    base = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    base |= {"OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [base]
    base |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def to_foreground() -> None:
    """A process group of its own, with Ctrl-C as a shell gives it to a command in the foreground."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore


def _python(
    words: list[str],
    environment: dict[str, str],
    output: Path,
    errors: Path,
    prepare: Callable[[], None] | None,
    folder: Path,
) -> None:
    to_foreground()
    for descriptor, path in ((1, output), (2, errors)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    # As Python makes them, whatever the server's are.
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Its loaders are forked, as by default; it has inherited the fork server's way.
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare()
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
