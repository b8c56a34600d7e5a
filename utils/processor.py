"""What this machine's devices are good for: whether bfloat16 is fast, and how many cores are ours."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has bfloat16 arithmetic of its own, rather than emulating it.

    On the CPU that is what PyTorch asks oneDNN before each convolution (ONEDNN_MAX_CPU_ISA counts), and on
    x86 moreover AVX512_BF16 (every processor with AMX has it): with AVX-512 alone oneDNN emulates bfloat16 at
    half of float32's speed; with less, PyTorch's own loops take ten times as long (docs/performance.md).
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    taken = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # none in builds without oneDNN
    if taken is None or not taken():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


def available_cores() -> int:
    """Cores that this process may use: those it is bound to, within its container's share of time.

    Docker's ``--cpus`` and Kubernetes' limits leave every core visible; a thread for each of them would spend
    most of its time waiting.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return bound if quota is None else max(1, min(bound, int(quota)))


def _quota() -> float | None:
    """Cores' worth of time that the control group grants (its version 2, else 1); None without a limit."""
    try:
        if (both := _CGROUPS / "cpu.max").is_file():
            limit, period = both.read_text().split()
        else:
            limit, period = (
                (_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
    except OSError:
        return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def description() -> str:
    """Model of the processor, vector instructions, cores, and whether bfloat16 is fast."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    bfloat16 = "fast" if fast_bfloat16(torch.device("cpu")) else "slow"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {vectors}, bfloat16 {bfloat16}, {available_cores()} cores"
