"""Process group: set-up, reductions, agreement between processes, and faults in one line.

``torchrun`` and ``python -m torch.distributed.launch`` describe each process in its environment (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without them there is one process and no process group,
and every function below does the right thing for it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import Fault, UserError
from utils.memory import SHARED_MEMORY_REMEDY, is_out_of_memory, keep_freed_memory
from utils.processor import available_cores, fast_bfloat16

PLACES = ("GPU_server", "GPU_windows", "CPU", "CPU_windows")

_NAME_LOOKUPS = 5

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
        bfloat16: whether the devices of all processes compute bfloat16 fast; None: nobody asked.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str | None
    bfloat16: bool | None = None

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


ONE_PROCESS = World(0, 0, 1, torch.device("cpu"), None)  # alone on the CPU


def launch_rank() -> int:
    """Rank that the launcher gave to this process, before ``start``; 0 without a launcher."""
    return _number("RANK") or 0


def prints_shared_errors() -> bool:
    """Whether this process tells what all of them meet: the first one, and until they have found each other
    the first one of each machine, as the other machines may have another environment."""
    if _grouped():
        return dist.get_rank() == 0
    local_rank = _number("LOCAL_RANK")
    return (launch_rank() if local_rank is None else local_rank) == 0


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
    if rank >= size:
        raise UserError(f"RANK is {rank} but WORLD_SIZE {size}: start with torchrun, or unset both")
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
    # Agreed on: gradients that one process scales, or holds in another type, cannot be summed.
    bfloat16 = not any_rank(not fast_bfloat16(device))
    return World(rank, local_rank, size, device, backend, bfloat16)


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
    _broadcast(module.buffers())


def broadcast_weights(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    _broadcast((*module.parameters(), *module.buffers()))


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Give every process the mean of all processes' gradients, and the first one's buffers.

    A weight without gradient counts as one of gradient 0 on every process, so that none waits for another.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    if gradients and _grouped():
        flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        means = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    broadcast_buffers(module)


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor]) -> None:
    if not _grouped():
        return
    for tensor in tensors:
        staged = tensor.to(_collective_device()).contiguous()
        dist.broadcast(staged, src=0)
        tensor.copy_(staged)


def gather_objects(obj: Any) -> list[Any]:
    """Every process's object, in the order of ranks, on every process."""
    if not _grouped():
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """The first process's object, on every process."""
    if not _grouped():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0, device=_collective_device())
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


class AllReducedFlag:
    """The highest flag over all processes, one batch late, without waiting for the device.

    The flags are reduced in a Gloo group of their own while the next batch is computed: a value read from
    the GPU after every batch would let it run empty.

    Args:
        timeout_s: seconds after which waiting for another process's flag becomes an error.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._group: Any = None
        if _grouped():
            with _interface_errors():
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._pending: tuple[dist.Work, Tensor] | None = None

    def reduce(self, flag: int) -> int:
        """Hand in this batch's flag and return the highest of the batch before (0 for the first).

        Every process calls this equally often. One process alone gets its own flag back at once.
        """
        if self._group is None:
            return flag
        before = self.wait()
        value = torch.tensor(flag)
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = work, value
        return before

    def wait(self) -> int:
        """Wait for the flags that are being reduced and return the highest (0 if there are none)."""
        if self._pending is None:
            return 0
        work, value = self._pending
        self._pending = None
        work.wait()
        return int(value)


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
    if isinstance(error, dist.DistError) or any(mark in text.lower() for mark in _LOST):
        reason = _one_line(text)[-160:]
        if "Last error:" in text:  # NCCL says here what happened
            reason += "; " + _one_line(text.split("Last error:", 1)[1].strip())
        return Fault(
            f"another process ended or did not answer within --timeout seconds ({reason}); its own message "
            "says why. Start again to go on from the last checkpoint"
        )
    return None


def loader_fault(error: BaseException, signals: Sequence[str] = ()) -> Fault:
    """One line for an error in or about a loader process, however torch wrapped it up.

    Args:
        error: what torch raised.
        signals: what loader processes were killed by, in the system's words.
    """
    text = str(error)
    caught = _CAUGHT.match(text)
    if caught is not None:  # torch put the worker's traceback behind this: the reason is its last line
        last = re.findall(rf"^(?:[\w.<>]+\.)?{caught[1]}(?:: .*)?$", text, re.M)
        reason = last[-1] if last else _one_line(text)
    elif "DataLoader worker" in text:
        reason = _one_line(text)
    else:
        reason = f"{type(error).__name__}: {_one_line(text)}".removesuffix(": ")
    if signals:
        reason += f": {', '.join(signals)}"
    if any(mark in f"{text} {reason}".lower() for mark in _SHARED_MEMORY_FULL):
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


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _from_environment(name: str, default: int) -> int:
    if name not in os.environ:
        return default
    value = _number(name)
    if value is None:
        raise UserError(
            f"environment variable {name}={os.environ[name]!r} is no number; start with torchrun, or unset it"
        )
    return value


def _number(name: str) -> int | None:
    """The whole number that a variable of the environment holds; None without it, or where it is none."""
    word = os.environ.get(name, "")
    return int(word) if word.isascii() and word.isdigit() and len(word) < 10 else None


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
    """Divide the cores among the processes of this machine, unless the user set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ and not _launcher_chose_threads():
        return
    processes = _from_environment("LOCAL_WORLD_SIZE", size)
    share = max(1, available_cores() // processes)
    # For one process PyTorch's own number stays, except in a container that has less than these cores.
    if processes > 1 or share < torch.get_num_threads():
        torch.set_num_threads(share)


def _launcher_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is torchrun's: it gives several processes one thread each where the user gives
    no number, with which all other cores would idle. The environment it was started with tells."""
    if os.environ["OMP_NUM_THREADS"] != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # no Linux
        return False
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in variables)


def _join(backend: str, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun")
    _check_address()
    _check_interfaces(backend)
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun keeps its store when it starts processes again, and with it the addresses of the dead ones.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        with _interface_errors():
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
            f"({reason}); see that every process was started and that --master_port (MASTER_PORT) is free"
        ) from error


def _check_address() -> None:
    """The place where the processes meet, before torch waits --timeout seconds for it.

    Raises:
        UserError: MASTER_PORT is no port, or MASTER_ADDR no name of a machine.
    """
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    if port is None or not 1 <= port <= 65535:
        raise UserError(
            f"environment variable MASTER_PORT={os.environ['MASTER_PORT']!r} is no port; "
            "give a free one of 1 to 65535 (--master_port), or start with torchrun"
        )
    for attempt in reversed(range(_NAME_LOOKUPS)):
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if attempt and getattr(error, "errno", None) == socket.EAI_AGAIN:
                time.sleep(1)  # the name server may be busy: many processes start at once
                continue
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"environment variable MASTER_ADDR={address!r} is not the address of a machine ({reason}); "
                "give the first machine's name or IP address (--master_addr), or --local_addr to torchrun"
            ) from error


def _check_interfaces(backend: str) -> None:
    """The networks that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name; Gloo carries the votes in any case.

    Raises:
        UserError: this machine has none of them.
    """
    here = [name for _, name in socket.if_nameindex()]
    gloo = os.environ.get("GLOO_SOCKET_IFNAME", "")
    # An alias, eth0:1, is an address of eth0.
    wrong = [name for name in gloo.split(",") if gloo and name.split(":")[0] not in here]
    if wrong:
        raise _no_interface("GLOO_SOCKET_IFNAME", here)
    nccl = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if backend == "nccl" and nccl:
        # NCCL's rule: beginnings of names, whole names after "=", all but these after "^".
        bare = nccl.removeprefix("^")
        names = tuple(name.split(":")[0] for name in bare.removeprefix("=").split(",") if name)
        meant = [name for name in here if (name in names if bare[:1] == "=" else name.startswith(names))]
        if not (set(here) - set(meant) if nccl[0] == "^" else meant):
            raise _no_interface("NCCL_SOCKET_IFNAME", here)


@contextlib.contextmanager
def _interface_errors() -> Iterator[None]:
    """A network without an address, which only Gloo finds out, as bad input."""
    try:
        yield
    except dist.DistError:
        raise
    except RuntimeError as error:
        if "GLOO_SOCKET_IFNAME" not in os.environ or "Unable to find address" not in str(error):
            raise
        raise _no_interface("GLOO_SOCKET_IFNAME", [name for _, name in socket.if_nameindex()]) from error


def _no_interface(variable: str, here: list[str]) -> UserError:
    return UserError(
        f"environment variable {variable}={os.environ[variable]!r} names no network with an address on "
        f"{platform.node()}, which has {', '.join(here)}; give the one between the machines, or unset it"
    )
