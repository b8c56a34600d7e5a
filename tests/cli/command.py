"""The real command in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A network that trains in seconds on one core. Everything else is as a user gets it.
SMALL = (
    *("--backbone", "mobilenet_v2", "--no_pretrained", "--crop_size", "64"),
    *("--batch_size", "4", "--epochs", "1"),
)


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


def start(*arguments: str | Path, launcher: str = "python", processes: int = 1) -> subprocess.Popen[str]:
    """Start ``run.py`` with the arguments, by one of the three launchers."""
    python = [sys.executable, "-u"]
    commands = {
        "python": python,
        "torchrun": [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"],
        "launch": [
            *python,
            *("-m", "torch.distributed.launch", f"--nproc_per_node={processes}"),
            f"--master_port={20000 + os.getpid() % 20000}",
        ],
    }
    return subprocess.Popen(
        [*commands[launcher], "run.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def launch(
    *arguments: str | Path, launcher: str = "python", processes: int = 1, timeout: float | None = None
) -> Outcome:
    """Run ``run.py`` to its end."""
    process = start(*arguments, launcher=launcher, processes=processes)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)
