"""Memory allocation on the CPU and recognition of out-of-memory errors."""

from __future__ import annotations

import ctypes
import platform
import shutil

from utils.lazy import torch

# Numbers of mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1

# Remedy for a full /dev/shm, which is small in containers.
SHARED_MEMORY_REMEDY = "enlarge /dev/shm (Docker: --shm-size 8g)"


def keep_freed_memory() -> bool:
    """Configure glibc to keep freed memory for the next batch; returns whether that succeeded.

    Training on the CPU frees and allocates gigabytes in every step. By default glibc returns each large
    tensor to the system, and each new one causes page faults; on virtual machines whose host reclaims free
    pages this more than doubles the time of a step (docs/performance.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    asked = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 2**28))
    return all(mallopt(parameter, value) == 1 for parameter, value in asked)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA has its own exception class, the CPU only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_shared_memory_full() -> bool:
    """Whether /dev/shm has no space for 16 locks (a page each), as queues between processes need."""
    try:
        return shutil.disk_usage("/dev/shm").free < 16 * 4096
    except OSError:  # no /dev/shm on this system
        return False
