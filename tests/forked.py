"""Real processes of commands, forked from one that has imported everything: without seconds of imports.

``Fork`` and ``python`` start one from a test; ``interpreter`` makes a file that programs under test start as
Python: shell scripts, torchrun, an experiment.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkProcess, ForkServerContext, ForkServerProcess
from pathlib import Path

import torch.multiprocessing

ROOT = Path(__file__).resolve().parents[1]

# The bound of every process that a test starts, in seconds: at least five times what the slowest takes on a
# quiet machine with two cores, so that only a process that hangs reaches it.
BOUND = 600.0

# timm's network for tests, of four blocks, for runs whose point is not the network.
SMALL_BACKBONE = "timm/test_resnet"

# What was written is there for the next process also without waiting for the disk: only a machine that fails
# could lose it. The suite writes 14 GB. Other Pythons than the forked ones do wait.
os.fsync = os.fstat

_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What the programs import, also later than at their start.
_PRELOADED = (
    *("forked", "run", "session", "session.tensorboard", "inference.images", "dataset.check"),
    *("report.command", "utils.visualize", "torch.distributed.run", "timm"),
)
# Imported by timm, but anew by a program: they read variables, or make a folder, when they are imported.
_FORGOTTEN = ("huggingface_hub", "wandb")


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
        arguments = (list(words), environment, output, errors or output, prepare, folder)
        self._process: ForkServerProcess = _server().Process(target=_to_files, args=arguments)
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


def spawn(function: Callable[..., None], args: tuple[object, ...], nprocs: int) -> None:
    """``torch.multiprocessing.spawn`` whose processes need not import torch."""
    _server()
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def to_foreground() -> None:
    """A process group of its own, with Ctrl-C as a shell gives it to a command in the foreground."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore


@contextlib.contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """A file ``python`` in a folder, which runs programs and modules as Python does, but forked.

    It passes on arguments, variables, working directory, standard streams, signals and the exit code, and is
    ``sys.executable`` there, so that torchrun starts it also. Variables that torch reads when it is imported
    have no effect; ``-c`` is not known.
    """
    file, address = folder / "python", folder / "socket"
    file.write_text(f"#!{sys.executable} -IS\n" + _CLIENT.format(address=str(address)), encoding="utf-8")
    file.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        server = _server().Process(target=_serve, args=(listener, str(file)))
        server.start()
    try:
        yield file
    finally:
        server.terminate()
        server.join()


_CLIENT = """\
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
words = [word for word in sys.argv[1:] if word != "-u"]
request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
replies = server.makefile()
process = int(replies.readline())
def pass_on(number, frame):
    try:
        os.kill(process, number)
    except ProcessLookupError:  # it has just ended
        pass

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, pass_on)
code = int(replies.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def _server() -> ForkServerContext:
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the server when it imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _serve(listener: socket.socket, executable: str) -> None:
    """Fork a process for each client, until the tests end. A client that is killed takes it along."""
    to_foreground()
    fork = multiprocessing.get_context("fork")
    tests = multiprocessing.parent_process()
    assert tests is not None
    running: dict[ForkProcess, socket.socket] = {}
    while True:
        sentinels = {each.sentinel: each for each in running}
        clients = {client: each for each, client in running.items()}
        for ready in connection.wait([listener, tests.sentinel, *sentinels, *clients]):
            if ready is listener:
                client = listener.accept()[0]
                length, streams, *_ = socket.recv_fds(client, 4, 3)
                with client.makefile("rb") as file:
                    words, environment, folder = json.loads(file.read(int.from_bytes(length, "big")))
                arguments = (words, environment, Path(folder), streams, executable)
                child = fork.Process(target=_of_client, args=arguments)
                child.start()
                for stream in streams:
                    os.close(stream)
                client.sendall(f"{child.pid}\n".encode())
                running[child] = client
            elif ready == tests.sentinel:
                for child in running:
                    child.kill()
                return
            elif ready in clients:  # they send nothing more: it has ended
                clients[ready].kill()
            else:
                child = sentinels[ready]
                child.join()
                with running.pop(child) as client, contextlib.suppress(OSError):
                    client.sendall(f"{child.exitcode}\n".encode())


def _of_client(
    words: list[str], environment: dict[str, str], folder: Path, streams: Sequence[int], executable: str
) -> None:
    to_foreground()
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.executable = executable
    _run(words, environment, folder)


def _to_files(
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
    _run(words, environment, folder, prepare)


def _run(
    words: list[str], environment: dict[str, str], folder: Path, prepare: Callable[[], None] | None = None
) -> None:
    """The program of a command line, on the standard streams as they are."""
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
    for name in [name for name in sys.modules if name.partition(".")[0] in _FORGOTTEN]:
        del sys.modules[name]
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # the server's: torch's take long
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
