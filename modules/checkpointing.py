"""Gradient checkpointing: a stage's activations are recomputed in the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from modules.norm import norm_layers

T = TypeVar("T")


def run_stage(function: Callable[..., T], stage: nn.Module, *inputs: Any, recompute: bool) -> T:
    """``function(*inputs)``, with gradient checkpointing if ``recompute``.

    Values, gradients, running statistics and random numbers are those of a plain call.

    Args:
        function: runs the stage; deterministic.
        stage: the module with all norm layers that ``function`` runs.
        inputs: of the function; kept until the backward pass.
        recompute: whether to checkpoint.
    """
    if not recompute:
        return function(*inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_statistics(stage)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _frozen_statistics(stage: nn.Module) -> Iterator[None]:
    """Context in which norm layers update copies of their running statistics, which are discarded.

    Recomputation would count the batch twice. (Layers without running statistics would save other tensors for
    the backward pass than in the first forward pass.)
    """
    kept = [(layer, dict(layer.named_buffers(recurse=False))) for layer in norm_layers(stage)]
    for layer, buffers in kept:
        for name, value in buffers.items():
            setattr(layer, name, value.clone())
    try:
        yield
    finally:
        for layer, buffers in kept:
            for name, value in buffers.items():
                setattr(layer, name, value)
