"""``run.py`` in a process group that it would not form itself: all processes on one device.

    torchrun --nproc_per_node=2 -m benchmarks.one_gpu gloo <options of run.py>      two processes on one GPU
    torchrun --nproc_per_node=1 -m benchmarks.one_gpu nccl <options of run.py>      a group of one

``run.py`` gives each process a GPU of its own with NCCL, which refuses two processes on one, and a single
process no group at all. For checks of both on a machine with one GPU; without a GPU the processes share the
CPU.
"""

from __future__ import annotations

import os
import sys

import torch

import run
from utils import distributed
from utils.command import run_command
from utils.processor import fast_bfloat16


def main(argv: list[str] | None = None) -> int:
    """Run the command of ``argv``, whose first word is the backend; returns the exit code."""
    backend, *words = sys.argv[1:] if argv is None else argv
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def start(where: str | None = None, local_rank: int | None = None, timeout_s: float = 1800.0) -> object:
        rank, local, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed._join(backend, rank, size, device, timeout_s)
        return distributed.World(rank, local, size, device, backend, fast_bfloat16(device))

    distributed.start = start  # type: ignore[assignment]
    return run.main(words)


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.one_gpu", main))
