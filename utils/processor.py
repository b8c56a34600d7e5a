"""Native bfloat16 arithmetic of devices, and the CPU cores available to this process."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from utils.lazy import torch

_CGROUPS = Path("/sys/fs/cgroup")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has native bfloat16 arithmetic, not emulation.

    On the CPU: oneDNN supports it, as PyTorch checks before each convolution (ONEDNN_MAX_CPU_ISA counts), and
    on x86 there is AVX512_BF16 (all CPUs with AMX have it). With AVX-512 alone oneDNN emulates bfloat16 at
    half the speed of float32; with less, PyTorch's own loops take ten times as long (docs/performance.md).
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # None in builds without oneDNN
    if supported is None or not supported():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


def available_cores() -> int:
    """Number of cores that this process may use: its CPU affinity, limited by its container's CPU quota.

    With Docker's ``--cpus`` and Kubernetes' limits every core is visible; one thread per visible core would
    spend most of its time waiting.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def _quota() -> float | None:
    """CPU quota of the control group (version 2, else 1), in cores; None without a limit."""
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


def model_name() -> str:
    """Model of the CPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def description() -> str:
    """CPU model, vector instructions, cores, and whether bfloat16 is native (fast)."""
    bfloat16 = "fast" if fast_bfloat16(torch.device("cpu")) else "slow"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{model_name()}, {vectors}, bfloat16 {bfloat16}, {available_cores()} cores"
