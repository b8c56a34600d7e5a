"""Random generator states in checkpoints, and deterministic algorithms."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of this process's random generators: of the CPU and, on CUDA, of the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state from ``rng_state``; without a CUDA state, set the CPU's alone.

    Raises:
        UserError: the state is of another kind of generator.
    """
    try:
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except (RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            "the checkpoint's random state is of another kind of generator; give --fresh to start the step "
            "over"
        ) from error


def make_deterministic() -> None:
    """Use deterministic algorithms only; operations without one raise.

    Call it before CUDA is used: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
