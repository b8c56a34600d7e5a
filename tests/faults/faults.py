"""Real runs that are killed, stopped and started again, and the comparison of what they leave."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import forked
import torch
from forked import BOUND, ROOT, SMALL_BACKBONE, environments, to_foreground

from runs.checkpoint import load_checkpoint

# Trains in seconds on one core; saves after almost every batch. Everything else is as a user gets it.
SMALL = ("--backbone", SMALL_BACKBONE)
MOBILENET, SEGFORMER = ("--backbone", "mobilenet_v2"), ("--model", "segformer_b0")
COMMON = (
    *("--dataset", "shapes", "--no_pretrained", "--crop_size", "64"),
    *("--batch_size", "4", "--lr", "0.01", "--task", "15-5", "--overlap"),
    *("--print_interval", "1"),
)
TINY = (*SMALL, *COMMON, "--ckpt_minutes", "0.01")


class Process(Protocol):
    """What ``subprocess.Popen`` and the campaign's forks have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def send_signal(self, number: int) -> None: ...


Start = Callable[[Sequence[str], dict[str, str], Path], Process]


def start_command(arguments: Sequence[str], environment: dict[str, str], output: Path) -> Process:
    """``python run.py`` with the arguments; what it prints is appended to a file."""
    return start_words([sys.executable, "-u", "run.py", *arguments], environment, output)


def start_words(words: Sequence[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """A command in a process group of its own, as a shell starts it in the foreground."""
    with output.open("ab") as file:
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=to_foreground,
        )


def living_in_group(leader: int) -> list[int]:
    """The processes of a group; those that have ended and wait for their parent's notice do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name, which may hold anything) state parent group ...
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


class Fork(forked.Fork):
    """``run.py`` with the arguments, forked from a process that has imported everything.

    ``prepare``, a function of a module, is called there before.
    """

    prepare: Callable[[], None] | None = None

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], output: Path) -> None:
        super().__init__(["run.py", *arguments], environment, output, prepare=type(self).prepare)


class Run:
    """One start of a run on some processes, without a launcher.

    Args:
        arguments: of ``run.py``.
        folder: where the processes' outputs go.
        size: number of processes.
        start: starts one of them.
    """

    def __init__(self, arguments: Sequence[object], folder: Path, size: int = 1, start: Start = Fork) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(size)]
        self.offsets = [path.stat().st_size if path.exists() else 0 for path in self.outputs]
        words = [str(argument) for argument in arguments]
        self.processes = [
            start(words, environment, output)
            for environment, output in zip(environments(size), self.outputs, strict=True)
        ]

    def output(self, rank: int = 0) -> str:
        """What a process has printed since this start."""
        data = self.outputs[rank].read_bytes() if self.outputs[rank].exists() else b""
        return data[self.offsets[rank] :].decode("utf-8", "replace")

    def wait_for(self, pattern: str, timeout: float = BOUND, rank: int = 0) -> bool:
        """Wait until a pattern is printed; False if the processes end before."""
        return self.wait_until(lambda: re.search(pattern, self.output(rank)) is not None, timeout)

    def wait_until(self, condition: Callable[[], bool], timeout: float = BOUND) -> bool:
        for _ in _polls(timeout):
            if condition():
                return True
            if all(process.poll() is not None for process in self.processes):
                return condition()
        raise AssertionError(f"waited {timeout} s in vain; output: {self.output()[-2000:]}")

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL, to all processes unless ranks are named."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                self.processes[rank].send_signal(signal.SIGKILL)

    def wait(self, timeout: float = BOUND) -> list[int]:
        """Exit codes by rank; kills what has not ended in time and fails."""
        for _ in _polls(timeout):
            if all(process.poll() is not None for process in self.processes):
                return [int(process.poll() or 0) for process in self.processes]
        self.kill()
        raise AssertionError(f"not ended after {timeout} s; output: {self.output()[-2000:]}")


def _polls(timeout: float) -> Iterator[None]:
    """Moments to look again, for so many seconds; time in which this process was stopped does not count."""
    waited, before = 0.0, time.monotonic()
    while waited < timeout:
        yield
        time.sleep(0.002)
        now = time.monotonic()
        waited += min(now - before, 1.0)
        before = now


@contextlib.contextmanager
def running(*args: Any, **kwargs: Any) -> Iterator[Run]:
    """A ``Run`` of which nothing is left afterwards."""
    run = Run(*args, **kwargs)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def completed(arguments: Sequence[object], folder: Path, size: int = 1, start: Start = Fork) -> Run:
    """A run to its good end."""
    with running(arguments, folder, size, start) as run:
        codes = run.wait()
        assert codes == [0] * size, (codes, run.output()[-3000:], run.output(size - 1)[-3000:])
        return run


def saves_now(run_dir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(run_dir.glob(".*.pth.*.tmp"))


# ── what a run leaves ────────────────────────────────────────────────────────────────────────────────

_COMPARED = (
    *("epoch", "batch", "best_score", "model_state", "modules", "optimizer_state", "scheduler_state"),
    *("method_state", "method_state_of_rank", "rng_state", "best", "kept_epoch"),
)


def left_by(run_dir: Path, step: int | str = "*") -> dict[str, Any]:
    """Everything that must not depend on kills: checkpoints and results of a step or of all."""
    left: dict[str, Any] = {}
    for path in sorted(run_dir.glob(f"*-*-*_{step}.pth")):
        content = load_checkpoint(path)
        number = path.stem.rpartition("_")[2]
        left[f"checkpoint {number}"] = {key: content.get(key) for key in _COMPARED}
    for path in sorted(run_dir.glob(f"results_{step}.json")):
        left[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return left


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two contents differ in a single bit."""
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if equal else [where]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [where]
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if not isinstance(b, (list, tuple)) or len(a) != len(b):
            return [where]
        pairs = enumerate(zip(a, b, strict=True))
        return [place for i, (x, y) in pairs for place in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]
