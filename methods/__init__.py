"""The methods, in the order in which their hooks are called."""

from __future__ import annotations

from typing import Any

from methods.attention_transfer import AttentionTransfer
from methods.base import Batch, Context, Method
from methods.cil import CIL
from methods.classification import Classification
from methods.distillation import EncoderDistillation, OutputDistillation
from methods.icarl import ICaRL
from methods.pod import PooledOutputDistillation
from methods.presets import METHODS, preset
from methods.prototypes import FeatureSparsity, PrototypeLearning, SoftNearestNeighbours
from methods.pseudo_labels import PseudoLabels
from methods.regularization import Regularization
from methods.unknown import UnknownClass

# A new method is one file, one line here and, if it has a name of its own, one preset.
REGISTRY: tuple[type[Method], ...] = (
    Classification,
    OutputDistillation,
    EncoderDistillation,
    ICaRL,
    CIL,
    PrototypeLearning,
    FeatureSparsity,
    SoftNearestNeighbours,
    PseudoLabels,
    PooledOutputDistillation,
    UnknownClass,
    AttentionTransfer,
    Regularization,
)

__all__ = ["METHODS", "REGISTRY", "Batch", "Context", "Method", "build_methods", "preset"]


def build_methods(opts: Any, step: int) -> dict[str, Method]:
    """The methods that the options ask for at a step, by class name, in calling order."""
    built = ((kind.__name__, kind.from_options(opts)) for kind in REGISTRY)
    return {
        name: method
        for name, method in built
        if method is not None and not (method.needs_teacher and step == 0)
    }
