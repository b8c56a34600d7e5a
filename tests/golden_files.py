"""Golden files: inputs and outputs of the released programs (tests/golden/*.npz), and how they are compared.

A gradient's error is measured against its largest entry: entries that cancel to nothing have no digits of
their own in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent / "golden"
RTOL = 1e-5


def cases(pattern: str) -> list[str]:
    names = sorted(path.stem for path in GOLDEN.glob(f"{pattern}.npz"))
    assert names, f"no golden file {pattern}"
    return names


def load(name: str, device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        meta = json.loads(str(archive["meta"]))
        arrays = {key: torch.from_numpy(archive[key]).to(device) for key in archive.files if key != "meta"}
    return arrays, meta


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rounding: float = 0.0) -> None:
    """``rounding``: how far the released float32 value itself is from the exact one, absolute."""
    assert actual.shape == expected.shape
    atol = RTOL * expected.abs().max().item() + rounding
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=RTOL, atol=atol)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


def gradient(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output, inputs, retain_graph=True)
