"""Processes: who am I, how do we add up.

``torchrun`` and ``python -m torch.distributed.launch`` describe each process in its environment (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without them there is one process and no process group,
and every function below does the right thing for it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from utils.errors import Fault, UserError
from utils.memory import SHARED_MEMORY_REMEDY, is_out_of_memory, keep_freed_memory

PLACES = ("GPU_server", "GPU_windows", "CPU", "CPU_windows")

# How Gloo and NCCL say that a process is gone, in RuntimeErrors of no class of their own.
_LOST = ("connection closed by peer", "connection reset by peer", "timed out waiting", "gloo", "nccl")
# How torch begins what it raises for an exception in a loader process.
_CAUGHT = re.compile(r"Caught (\w+) in DataLoader worker process")
# How a full /dev/shm shows: in torch's words where it asks for memory, or as a signal where it uses it.
_SHARED_MEMORY_FULL = ("shared memory", "bus error", "</torch_", "no space left on device")


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: number of this process, from 0.
        local_rank: its number on this machine, from 0.
        size: number of processes.
        device: where this process computes.
        backend: "nccl", "gloo", or None without a process group.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str | None

    @property
    def description(self) -> str:
        """Processes, device and backend, for the log."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        if self.backend is None:
            return f"one process on {self.device}{name}"
        return f"{self.size} processes ({self.backend}), this one on {self.device}{name}"

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks."""
        return self.rank == 0


def launch_rank() -> int:
    """Rank that the launcher gave to this process, before ``start``; 0 without a launcher."""
    word = os.environ.get("RANK", "0")
    return int(word) if word.isdigit() else 0


def start(where: str | None = None, local_rank: int | None = None, timeout_s: float = 1800.0) -> World:
    """Join the process group, if the launcher started several processes, and choose the device.

    Args:
        where: ``--where_to_sim``: GPU_server (NCCL), GPU_windows (one process, no group), CPU (Gloo),
            CPU_windows (one process on the CPU, no group); None: NCCL where CUDA is, else Gloo.
        local_rank: ``--local_rank`` of old launchers; LOCAL_RANK of the environment comes first.
        timeout_s: seconds after which waiting for another process becomes an error.

    Raises:
        UserError: the machine or the launch does not fit ``where``.
    """
    if where is not None and where not in PLACES:
        raise UserError(f"--where_to_sim {where}: unknown; choose from {', '.join(PLACES)}")
    rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank = _from_environment("LOCAL_RANK", local_rank or 0)
    if size > 1 and where in ("GPU_windows", "CPU_windows"):
        raise UserError(
            f"--where_to_sim {where} means one process, but {size} were started; "
            "start without a launcher, or choose GPU_server or CPU"
        )
    device = _choose_device(where, local_rank, size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores(size)
        keep_freed_memory()
    backend = None
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        _join(backend, rank, size, device, timeout_s)
    return World(rank, local_rank, size, device, backend)


def stop(others_lost: bool = False) -> None:
    """Leave the process group, if there is one.

    Args:
        others_lost: another process may be gone or stand elsewhere; NCCL would wait for it here, so that is
            left to the exit.
    """
    if _grouped() and not (others_lost and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if _grouped():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it. Any device; the same shape everywhere."""
    if not _grouped():
        return tensor
    # NCCL takes only tensors on its GPU, Gloo is built for the CPU's, and both want them contiguous.
    staged = tensor.to(_collective_device()).contiguous()
    dist.all_reduce(staged)
    if staged is not tensor:
        tensor.copy_(staged)
    return tensor


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers (running statistics of norm layers)."""
    if not _grouped():
        return
    for buffer in module.buffers():
        staged = buffer.to(_collective_device()).contiguous()
        dist.broadcast(staged, src=0)
        buffer.copy_(staged)


def gather_objects(obj: Any) -> list[Any]:
    """Every process's object, in the order of ranks, on every process."""
    if not _grouped():
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any, source: int = 0) -> Any:
    """The object of the process ``source``, on every process."""
    if not _grouped():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=source, device=_collective_device())
    return box[0]


def any_rank(flag: bool) -> bool:
    """True on every process if ``flag`` is true on any."""
    if not _grouped():
        return flag
    votes = torch.tensor(int(flag), device=_collective_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """What one process raises as ``UserError`` in the body, every process raises at its end.

    The body calls no collective: the process that failed would be missed there.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    met = gather_objects(None if error is None else (type(error), str(error)))
    if error is not None:
        raise error
    for other in met:
        if other is not None:
            raise other[0](other[1])


class Vote:
    """Processes agree between batches on what to do, one batch late, without waiting for the device.

    The ballots travel in a Gloo group of their own while the next batch is computed: an answer read from
    the GPU after every batch would let it run empty.

    Args:
        timeout_s: seconds after which waiting for another process's ballot becomes an error.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if _grouped() else None
        self._pending: tuple[dist.Work, Tensor] | None = None

    def cast(self, ballot: int) -> int:
        """Cast this batch's ballot and return the highest of the batch before (0 for the first).

        Every process calls this equally often. One process alone gets its own ballot back at once.
        """
        if self._group is None:
            return ballot
        decided = self.close()
        box = torch.tensor(ballot)
        work = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = work, box
        return decided

    def close(self) -> int:
        """Wait for the ballots that are under way and return the highest (0 if there are none)."""
        if self._pending is None:
            return 0
        work, box = self._pending
        self._pending = None
        work.wait()
        return int(box)


def as_fault(error: BaseException) -> Fault | None:
    """One line for a fault of the machine or of another process, which ended or was too slow; else None."""
    if isinstance(error, Fault):
        return error
    text = str(error)
    if is_out_of_memory(error):
        return Fault(
            f"out of memory ({_one_line(text)}); give a smaller --batch_size with more --accumulate, "
            "--grad_checkpointing or --opt_level O1, and start again"
        )
    if "DataLoader worker" in text:
        return loader_fault(error)
    if isinstance(error, dist.DistError) or any(mark in text.lower() for mark in _LOST):
        reason = _one_line(text)[-160:]
        if "Last error:" in text:  # NCCL says here what happened
            reason += "; " + _one_line(text.split("Last error:", 1)[1].strip())
        return Fault(
            f"another process ended or did not answer within --timeout seconds ({reason}); its own message "
            "says why. Start again to go on from the last checkpoint"
        )
    return None


def loader_fault(error: BaseException) -> Fault:
    """One line for an error in or about a loader process, however torch wrapped it up."""
    text = str(error)
    caught = _CAUGHT.match(text)
    if caught is not None:  # torch put the worker's traceback behind this: the reason is its last line
        last = re.findall(rf"^(?:[\w.<>]+\.)?{caught[1]}(?:: .*)?$", text, re.M)
        reason = last[-1] if last else _one_line(text)
    elif "DataLoader worker" in text:
        reason = _one_line(text)
    else:
        reason = f"{type(error).__name__}: {_one_line(text)}".removesuffix(": ")
    if any(mark in text.lower() for mark in _SHARED_MEMORY_FULL):
        return Fault(
            f"the shared memory is full through which loader processes hand over their batches ({reason}); "
            f"{SHARED_MEMORY_REMEDY}, or give --num_workers 0, and start again to go on"
        )
    if caught is None:
        return Fault(
            f"a loader process was lost ({reason}): it was killed, or there is no room for one more; "
            "start again to go on, with fewer --num_workers if it happens again"
        )
    remedy = "give fewer --num_workers" if _lacks_memory(error) else "--num_workers 0 shows where"
    return Fault(f"a loader process failed ({reason}); {remedy}, and start again to go on")


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or is_out_of_memory(error)


def _one_line(text: str) -> str:
    """The first line, without its indentations."""
    return " ".join(text.splitlines()[0].split()) if text else ""


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _from_environment(name: str, default: int) -> int:
    word = os.environ.get(name)
    if word is None:
        return default
    if not word.isdigit():
        raise UserError(
            f"environment variable {name}={word!r} is no number; start with torchrun, or unset it"
        )
    return int(word)


def _choose_device(where: str | None, local_rank: int, size: int) -> torch.device:
    if where in ("CPU", "CPU_windows"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if where in ("GPU_server", "GPU_windows"):
            raise UserError(f"--where_to_sim {where}: no CUDA device is usable here; give --where_to_sim CPU")
        return torch.device("cpu")
    if size == 1:
        return torch.device("cuda", local_rank if local_rank < torch.cuda.device_count() else 0)
    if not dist.is_nccl_available():
        raise UserError(
            "this PyTorch has no NCCL; start one process with --where_to_sim GPU_windows, or use CPU"
        )
    gpus = torch.cuda.device_count()
    processes = max(_from_environment("LOCAL_WORLD_SIZE", 1), local_rank + 1)
    if processes > gpus:
        raise UserError(
            f"{processes} processes on this machine but {gpus} GPU{'s' if gpus > 1 else ''}; "
            f"start with --nproc_per_node={gpus}, give --where_to_sim CPU, or where Slurm shows each process "
            "only its own GPU, ask it for --gpus-per-node instead of --gpus-per-task"
        )
    return torch.device("cuda", local_rank)


def _share_cores(size: int) -> None:
    """Divide the cores among the processes of this machine, unless OMP_NUM_THREADS says otherwise."""
    processes = _from_environment("LOCAL_WORLD_SIZE", size)
    if processes < 2 or "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // processes))


def _join(backend: str, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun")
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun keeps its store when it starts processes again, and with it the addresses of the dead ones.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            # Names the GPU, which barriers would otherwise guess from the rank.
            device_id=device if backend == "nccl" else None,
        )
    except dist.DistError as error:
        reason = _one_line(str(error).split("Last error:", 1)[-1].strip())
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {rank} of {size} finds no group at {place} "
            f"({reason}); see that every process was started and that --master_port is free"
        ) from error
