"""The collectives on NCCL: a group of one process, as many as one GPU allows."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forked import BOUND

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from utils import distributed as d

device = torch.device("cuda", 0)
torch.cuda.set_device(device)
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
d._join("nccl", 0, 1, device, 60.0)
assert torch.distributed.get_backend() == "nccl"
assert d.all_reduce_sum(torch.ones(3)).tolist() == [1, 1, 1]
assert d.all_reduce_sum(torch.ones(3, device=device)[::2]).tolist() == [1, 1]
assert d.gather_objects({"a": torch.ones(2)})[0]["a"].tolist() == [1, 1]
assert d.broadcast_object("word") == "word"
assert d.any_rank(True) and not d.any_rank(False)
norm = nn.BatchNorm2d(2).to(device)
d.broadcast_buffers(norm)
flag = d.AllReducedFlag(60.0)
assert [flag.reduce(2), flag.reduce(0), flag.reduce(0)] == [0, 2, 0]
wrapped = DistributedDataParallel(nn.Linear(3, 2).to(device), device_ids=[0])
wrapped(torch.ones(1, 3, device=device)).sum().backward()
assert wrapped.module.weight.grad.flatten().tolist() == [1] * 6
d.barrier()
d.stop()
print("done")
"""


@pytest.mark.cuda
def test_every_collective_in_a_group_of_one() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(port)], cwd=ROOT, capture_output=True, text=True, timeout=BOUND
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
