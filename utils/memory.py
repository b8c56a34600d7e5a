"""Memory: keep what the processor freed, and know when there is no more."""

from __future__ import annotations

import ctypes
import platform
import shutil

import torch

# Numbers of mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1

# What helps where /dev/shm is full: containers get little of it.
SHARED_MEMORY_REMEDY = "enlarge /dev/shm (Docker: --shm-size 8g)"


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next batch; returns whether it could be asked.

    Training on a processor frees and allocates gigabytes in every step. By default glibc gives each large
    tensor back to the system at once, and every new one is then paid for by page faults; on virtual machines
    whose host takes back free pages this more than doubles the time of a step (docs/performance.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    asked = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 2**28))
    return all(mallopt(parameter, value) == 1 for parameter, value in asked)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA has an error of its own for it, the processor only a text."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_shared_memory_full() -> bool:
    """Whether /dev/shm has no room for 16 locks, a page each, which queues between processes need."""
    try:
        return shutil.disk_usage("/dev/shm").free < 16 * 4096
    except OSError:  # a system without it
        return False
