"""``run.py`` in a process group that it would not form itself: all processes on one device.

    torchrun --nproc_per_node=2 -m benchmarks.one_gpu gloo <options of run.py>      two processes on one GPU
    torchrun --nproc_per_node=1 -m benchmarks.one_gpu nccl <options of run.py>      a group of one

``run.py`` gives each process a GPU of its own with NCCL, which refuses two processes on one, and a single
process no group at all. For checks of both on a machine with one GPU; without a GPU the processes share the
CPU.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

from utils import distributed
from utils.command import run_command
from utils.errors import UserError
from utils.processor import fast_bfloat16

PROGRAM = Path(__file__).resolve().parent.parent / "run.py"


def main(argv: list[str]) -> None:
    """Run the program in a process group: the backend, then its options.

    Raises:
        UserError: the first word is no backend.
    """
    backend, *words = argv or [""]
    if backend not in ("gloo", "nccl"):
        raise UserError(f"{backend!r} is no backend; give gloo or nccl, then the options of run.py")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def start(where: str | None = None, local_rank: int | None = None, timeout_s: float = 1800.0) -> object:
        rank, local, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed._join(backend, rank, size, device, timeout_s)
        return distributed.World(rank, local, size, device, backend, fast_bfloat16(device))

    distributed.start = start  # type: ignore[assignment]
    sys.argv = [str(PROGRAM), *words]
    runpy.run_path(str(PROGRAM), run_name="__main__")


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.one_gpu", lambda: main(sys.argv[1:])))
