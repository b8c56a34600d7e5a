from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import processor

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "onednn", "native", "fast"),
    [
        ("x86_64", True, True, True),  # AVX512_BF16 or AMX
        ("AMD64", True, False, False),  # AVX-512, where oneDNN emulates it
        ("x86_64", False, True, False),  # less, or ONEDNN_MAX_CPU_ISA says so
        ("aarch64", True, False, True),  # Arm's BF16
        ("aarch64", False, False, False),
        ("arm64", None, False, False),  # a build without oneDNN
    ],
)
def test_which_processors_compute_bfloat16_fast(
    monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool | None, native: bool, fast: bool
) -> None:
    class Operators:
        if onednn is not None:
            _is_mkldnn_bf16_supported = staticmethod(lambda: onednn)

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert processor.fast_bfloat16(CPU) is fast


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an instruction set of x86")
def test_the_limit_on_onednn_counts() -> None:
    code = "from utils.processor import *; print(fast_bfloat16(torch.device('cpu')), description())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")
    assert "bfloat16 slow" in done.stdout


@pytest.mark.cuda
def test_cuda_has_bfloat16_since_ampere() -> None:
    device = torch.device("cuda", 0)
    assert processor.fast_bfloat16(device) is (torch.cuda.get_device_capability(device) >= (8, 0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_container_has_less_than_the_visible_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(processor, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert processor.available_cores() == cores
