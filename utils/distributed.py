"""Process group set-up and reductions, shared errors, and one-line messages for faults.

``torchrun`` and ``python -m torch.distributed.launch`` set the environment variables RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them there is one process and no process group; every
function below supports that case too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from utils.errors import Fault, UserError
from utils.lazy import dist, no_grad, torch
from utils.memory import SHARED_MEMORY_REMEDY, is_out_of_memory, keep_freed_memory
from utils.processor import available_cores, fast_bfloat16

PLACES = ("GPU_server", "GPU_windows", "CPU", "CPU_windows")

_NAME_LOOKUPS = 5

# Texts by which the RuntimeErrors of Gloo and NCCL show that another process ended.
_LOST = (
    *("connection closed by peer", "connection reset by peer", "timed out waiting"),
    *("timeout caused pair closure", "gloo", "nccl"),
)
# First words of the error that torch raises for an exception in a loader process.
_CAUGHT = re.compile(r"Caught (\w+) in DataLoader worker process")
# Texts of errors caused by a full /dev/shm: torch's message on allocation, or the signal on access.
_SHARED_MEMORY_FULL = ("shared memory", "bus error", "</torch_", "no space left on device")


@dataclass(frozen=True)
class World:
    """Rank, device and process group of this process.

    Attributes:
        rank: of this process, from 0.
        local_rank: rank on this machine, from 0.
        size: number of processes.
        device: of this process.
        backend: "nccl", "gloo", or None without a process group.
        bfloat16: whether the devices of all processes have native bfloat16 arithmetic; None: not checked.
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
        """True on rank 0, which writes files and log lines."""
        return self.rank == 0


def launch_rank() -> int:
    """Rank set by the launcher, also before ``start``; 0 without a launcher."""
    return _number("RANK") or 0


def prints_shared_errors() -> bool:
    """Whether this process prints errors that all processes raise: rank 0, and before the process group is
    set up local rank 0 of each machine, as the machines' environments may differ."""
    if _grouped():
        return dist.get_rank() == 0
    local_rank = _number("LOCAL_RANK")
    return (launch_rank() if local_rank is None else local_rank) == 0


def start(where: str | None = None, local_rank: int | None = None, timeout_s: float = 1800.0) -> World:
    """Choose the device and, if the launcher started several processes, join the process group.

    Args:
        where: ``--where_to_sim``: GPU_server (NCCL), GPU_windows (one process, no group), CPU (Gloo),
            CPU_windows (one process on the CPU, no group); None: NCCL if CUDA is available, else Gloo.
        local_rank: ``--local_rank`` of old launchers; the environment variable LOCAL_RANK takes precedence.
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
    # All processes use one precision: gradients of different scale or type cannot be summed.
    bfloat16 = not any_rank(not fast_bfloat16(device))
    return World(rank, local_rank, size, device, backend, bfloat16)


def stop(others_lost: bool = False) -> None:
    """Leave the process group, if there is one.

    Args:
        others_lost: another process may have ended or be in another collective. NCCL would wait for it here,
            so its group is left to the exit of this process.
    """
    if _grouped() and not (others_lost and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has called this."""
    if _grouped():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place, and return it. Any device; the same shape everywhere."""
    if not _grouped():
        return tensor
    # NCCL needs tensors on the GPU, Gloo on the CPU, both contiguous.
    staged = tensor.to(_collective_device()).contiguous()
    dist.all_reduce(staged)
    if staged is not tensor:
        tensor.copy_(staged)
    return tensor


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Copy rank 0's buffers (running statistics of norm layers) to every process."""
    _broadcast(module.buffers())


def broadcast_weights(module: torch.nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every process."""
    _broadcast((*module.parameters(), *module.buffers()))


@no_grad
def average_gradients(module: torch.nn.Module) -> None:
    """Average the gradients over all processes and copy rank 0's buffers to every process.

    A parameter without gradient counts as gradient 0, so that all processes reduce the same tensors.
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


@no_grad
def _broadcast(tensors: Iterable[torch.Tensor]) -> None:
    if not _grouped():
        return
    for tensor in tensors:
        staged = tensor.to(_collective_device()).contiguous()
        dist.broadcast(staged, src=0)
        tensor.copy_(staged)


def gather_objects(obj: Any) -> list[Any]:
    """The objects of all processes, in order of rank, on every process."""
    if not _grouped():
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Rank 0's object, on every process."""
    if not _grouped():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0, device=_collective_device())
    return box[0]


def any_rank(flag: bool) -> bool:
    """True on every process if ``flag`` is true on any."""
    if not _grouped():
        return flag
    highest = torch.tensor(int(flag), device=_collective_device())
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return bool(highest.item())


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """A ``UserError`` that one process raises in the ``with`` block is raised on every process at its end.

    The block must not call a collective: the other processes would wait there for the one that failed.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    errors = gather_objects(None if error is None else (type(error), str(error)))
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other[0](other[1])


class AllReducedFlag:
    """Maximum of a flag over all processes, one batch late, without synchronising with the GPU.

    The flags are reduced in a separate Gloo group while the next batch is computed: reading a value from the
    GPU after every batch would leave it idle.

    Args:
        timeout_s: seconds after which waiting for another process's flag becomes an error.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._group: Any = None
        if _grouped():
            with _interface_errors():
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def reduce(self, flag: int) -> int:
        """Start to reduce this batch's flag and return the maximum of the previous batch (0 for the first).

        Every process must call this equally often. A single process gets its own flag back at once.
        """
        if self._group is None:
            return flag
        before = 0
        if self._pending is not None:
            work, reduced = self._pending
            work.wait()
            before = int(reduced)
        value = torch.tensor(flag)
        started = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert started is not None
        self._pending = started, value
        return before


def as_fault(error: BaseException) -> Fault | None:
    """The error as a one-line ``Fault`` if memory ran out or another process ended or timed out; or None."""
    if isinstance(error, Fault):
        return error
    text = str(error)
    if is_out_of_memory(error):
        return Fault(
            f"out of memory ({_one_line(text)}); give --opt_level O1, a smaller --batch_size with more "
            "--accumulate, --grad_checkpointing or a smaller --crop_size, and start again"
        )
    if isinstance(error, dist.DistError) or any(mark in text.lower() for mark in _LOST):
        reason = _one_line(text)[-160:]
        if "Last error:" in text:  # NCCL says here what happened
            reason += "; " + _one_line(text.split("Last error:", 1)[1].strip())
        return Fault(
            f"another process ended or did not answer within --timeout seconds ({reason}); its own message "
            "says why. Start again to resume from the last checkpoint"
        )
    return None


def loader_fault(error: BaseException, signals: Sequence[str] = ()) -> Fault:
    """An error of a loader process as a one-line ``Fault``.

    Args:
        error: raised by torch.
        signals: descriptions of the signals that killed loader processes.
    """
    text = str(error)
    caught = _CAUGHT.match(text)
    if caught is not None:  # the worker's traceback follows; its last line is the reason
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
            f"the shared memory is full, which loader processes need for their batches ({reason}); "
            f"{SHARED_MEMORY_REMEDY}, or give --num_workers 0, and start again to resume"
        )
    if caught is None:
        return Fault(
            f"a loader process was lost ({reason}): it was killed, or memory is too short for another one; "
            "start again to resume, with fewer --num_workers if it happens again"
        )
    lacks_memory = isinstance(error, MemoryError) or is_out_of_memory(error)
    remedy = "give fewer --num_workers" if lacks_memory else "--num_workers 0 shows where"
    return Fault(f"a loader process failed ({reason}); {remedy}, and start again to resume")


def _one_line(text: str) -> str:
    """The first line, with single spaces."""
    return " ".join(text.splitlines()[0].split()) if text else ""


def _grouped() -> bool:
    # Without torch there is no group yet: an error in the options need not wait for its import.
    return "torch" in sys.modules and dist.is_available() and dist.is_initialized()


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
            f"environment variable {name}={os.environ[name]!r} is not a number; start with torchrun, or "
            "unset it"
        )
    return value


def _number(name: str) -> int | None:
    """An environment variable as a whole number of 0 or more; None if it is unset or something else."""
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
            f"start with --nproc_per_node={gpus}, give --where_to_sim CPU, or if Slurm limits each process "
            "to its own GPU, request --gpus-per-node instead of --gpus-per-task"
        )
    return torch.device("cuda", local_rank)


def _share_cores(size: int) -> None:
    """Divide the cores among the processes of this machine, unless the user set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ and not _launcher_chose_threads():
        return
    processes = _from_environment("LOCAL_WORLD_SIZE", size)
    share = max(1, available_cores() // processes)
    # One process keeps PyTorch's default, unless its container grants fewer cores than that.
    if processes > 1 or share < torch.get_num_threads():
        torch.set_num_threads(share)


def _launcher_chose_threads() -> bool:
    """Whether torchrun set OMP_NUM_THREADS: to 1 for several processes if the user did not set it, which
    leaves the other cores idle. The environment of torchrun itself shows which."""
    if os.environ["OMP_NUM_THREADS"] != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # not Linux
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
        # When torchrun restarts processes it keeps its store, with the addresses of the ended processes.
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
            f"rank {rank} of {size} finds no process group at {place} "
            f"({reason}); check that every process was started and that --master_port (MASTER_PORT) is free"
        ) from error


def _check_address() -> None:
    """Check the rendezvous address, for which torch would wait --timeout seconds.

    Raises:
        UserError: MASTER_PORT is not a port, or MASTER_ADDR is not the address of a machine.
    """
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    if port is None or not 1 <= port <= 65535:
        raise UserError(
            f"environment variable MASTER_PORT={os.environ['MASTER_PORT']!r} is not a port; "
            "give a free one of 1 to 65535 (--master_port), or start with torchrun"
        )
    for attempt in reversed(range(_NAME_LOOKUPS)):
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if attempt and getattr(error, "errno", None) == socket.EAI_AGAIN:
                time.sleep(1)  # many processes start at once and may overload the name server
                continue
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"environment variable MASTER_ADDR={address!r} is not the address of a machine ({reason}); "
                "give the first machine's name or IP address (--master_addr), or --local_addr to torchrun"
            ) from error


def _check_interfaces(backend: str) -> None:
    """Check the network interfaces in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.

    Gloo's are needed with NCCL too, for ``AllReducedFlag``.

    Raises:
        UserError: this machine has no such interface.
    """
    here = [name for _, name in socket.if_nameindex()]
    gloo = os.environ.get("GLOO_SOCKET_IFNAME", "")
    # An alias such as eth0:1 is an address of eth0.
    wrong = [name for name in gloo.split(",") if gloo and name.split(":")[0] not in here]
    if wrong:
        raise _no_interface("GLOO_SOCKET_IFNAME", here)
    nccl = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if backend == "nccl" and nccl:
        # NCCL's syntax: prefixes of names; "=" before whole names; "^" excludes.
        bare = nccl.removeprefix("^")
        names = tuple(name.split(":")[0] for name in bare.removeprefix("=").split(",") if name)
        meant = [name for name in here if (name in names if bare[:1] == "=" else name.startswith(names))]
        if not (set(here) - set(meant) if nccl[0] == "^" else meant):
            raise _no_interface("NCCL_SOCKET_IFNAME", here)


@contextlib.contextmanager
def _interface_errors() -> Iterator[None]:
    """Raise Gloo's error about a network interface without an address as a ``UserError``."""
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
        f"environment variable {variable}={os.environ[variable]!r} names no network interface with an "
        f"address on {platform.node()}, which has {', '.join(here)}; give the one between the machines, or "
        "unset it"
    )
