"""The real command in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forked import BOUND, ROOT, SMALL_BACKBONE, Fork, environments

# Networks that train in seconds on one core. Everything else is as a user gets it.
_SHORT = ("--no_pretrained", "--crop_size", "64", "--batch_size", "4", "--epochs", "1")
SMALL = ("--backbone", SMALL_BACKBONE, *_SHORT)
SEGFORMER = ("--model", "segformer_b0", *_SHORT)  # takes twice as long
MOBILENET = ("--backbone", "mobilenet_v2", *_SHORT)  # four times


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last_error(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("run.py: error:")]
        assert len(lines) == 1, f"one line of error expected:\n{self.err[-3000:]}"
        return lines[0]


Launch = Callable[..., Outcome]


class Started:
    """``run.py`` in one process or several, which a launcher's environment joins."""

    def __init__(self, arguments: Sequence[str | Path], processes: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = {name: Path(self._folder.name) / name for name in ("out", "err")}
        words = ["run.py", *map(str, arguments)]
        self._forks = [Fork(words, each, *self._files.values()) for each in environments(processes)]

    def poll(self) -> int | None:
        """The exit code, with several processes the highest; None: one is running."""
        codes = [fork.poll() for fork in self._forks]
        return None if None in codes else max(codes, key=abs)

    def kill(self) -> None:
        for fork in self._forks:
            fork.kill()

    def communicate(self, timeout: float = BOUND) -> tuple[str, str]:
        """Wait for the end; what was printed."""
        try:
            for fork in self._forks:
                fork.wait(timeout)
        except subprocess.TimeoutExpired as expired:
            expired.output = "".join(path.read_text("utf-8") for path in self._files.values())
            raise
        out, err = (path.read_text("utf-8") if path.exists() else "" for path in self._files.values())
        self._folder.cleanup()
        return out, err


def start(*arguments: str | Path) -> Started:
    """Start ``run.py`` with the arguments."""
    return Started(arguments)


def launch(
    *arguments: str | Path,
    launcher: str | None = None,
    interpreter: str | Path = sys.executable,
    processes: int = 1,
) -> Outcome:
    """Run ``run.py`` to its end.

    Args:
        arguments: of the command line.
        launcher: "torchrun", or "launch" for ``torch.distributed.launch``. None: without one.
        interpreter: the launcher's.
        processes: number of processes.
    """
    if launcher is not None:
        return _by_launcher(arguments, launcher, interpreter, processes)
    started = Started(arguments, processes)
    try:
        out, err = started.communicate()
    finally:
        started.kill()
    code = started.poll()
    assert code is not None
    return Outcome(code, out, err)


def _by_launcher(
    arguments: Sequence[str | Path], launcher: str, interpreter: str | Path, processes: int
) -> Outcome:
    options = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone"],
        "launch": ["-m", "torch.distributed.launch", f"--master_port={20000 + os.getpid() % 20000}"],
    }
    words = [interpreter, *options[launcher], f"--nproc_per_node={processes}", "run.py"]
    done = subprocess.run(
        [*words, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=BOUND,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
