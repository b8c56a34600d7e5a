"""The methods, in the order in which their hooks are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from methods.base import Batch, Context, Method
from methods.checks import check_built, fault, shown
from methods.cil import CIL
from methods.classification import FORMS, Classification
from methods.dft import FixedNetwork, Preallocation
from methods.distillation import EncoderDistillation, OutputDistillation
from methods.dkd import DecomposedDistillation
from methods.ewf import EndpointWeightFusion
from methods.icarl import ICaRL
from methods.importance import Regularization
from methods.lgkd import LabelGuidedDistillation
from methods.nest import ClassifierPreTuning
from methods.plop import PooledOutputDistillation
from methods.plugin import read_method_file
from methods.presets import METHODS, add_preset, preset
from methods.pseudo_labels import PseudoLabels
from methods.rcil import PooledCubeDistillation
from methods.sats import AttentionTransfer
from methods.sdr import FeatureSparsity, PrototypeLearning, SoftNearestNeighbours
from methods.ssul import UnknownClass
from methods.star import FeatureReplay
from utils.errors import UserError

# In calling order. --method_file adds the methods of a user's file.
REGISTRY: list[type[Method]] = [
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
    LabelGuidedDistillation,
    PooledCubeDistillation,
    ClassifierPreTuning,  # begin_step sets the final start of the classifiers
    UnknownClass,
    AttentionTransfer,
    EndpointWeightFusion,  # end_step changes the weights, which the next ones read
    DecomposedDistillation,
    FeatureReplay,
    Preallocation,
    FixedNetwork,
    Regularization,
]

__all__ = [
    "CLASSIFIERS",
    "METHODS",
    "REGISTRY",
    "Batch",
    "Context",
    "Method",
    "build_methods",
    "classifier_of",
    "load_method_file",
    "preset",
]

# Names for --classifier; --method_file adds those of a user's file.
CLASSIFIERS: list[str] = list(
    dict.fromkeys(["linear", *(kind.classifier for kind in REGISTRY if kind.classifier)])
)

_LOADED: set[Path] = set()


def build_methods(opts: Any, step: int) -> dict[str, Method]:
    """The methods that the options enable at a step, by class name, in calling order.

    Raises:
        UserError: ``from_options`` of a user's class returned something else, two methods replace the
            classification loss or name different forms of it, or an option chooses a form that is not used.
    """
    methods: dict[str, Method] = {}
    forms: dict[str, str] = {}
    for kind in REGISTRY:
        method = kind.from_options(opts)
        check_built(kind, method)
        if method is not None and method.classification is not None:
            if method.classification not in FORMS:
                what = f"must be one of {', '.join(FORMS)}, not {shown(method.classification)}"
                raise fault(kind, "classification", what)
            forms[kind.__name__] = method.classification
        if method is not None and not (method.needs_teacher and step == 0):
            methods[kind.__name__] = method
    replacing = [name for name, method in methods.items() if method.replaces_classification]
    if len(replacing) > 1:
        raise UserError(
            f"{' and '.join(replacing)} each replace the classification loss (replaces_classification); "
            "disable one of them"
        )
    if len(set(forms.values())) > 1:
        listed = " and ".join(f"{name} with '{form}'" for name, form in forms.items())
        raise UserError(f"{listed}: different classification losses; disable one of them")
    classification = cast(Classification, methods[Classification.__name__])
    if replacing:
        classification.check_unused(replacing[0])
        del methods[Classification.__name__]
    elif forms:
        ((name, form),) = list(forms.items())[:1]
        if classification.kind != form:
            classification.check_unused(name)
        classification.kind = form
    return methods


def classifier_of(opts: Any) -> str | None:
    """Kind of classifier that the enabled methods need; None: any.

    Raises:
        UserError: two of them need different ones.
    """
    needed = {kind: kind.classifier for kind in REGISTRY if kind.classifier and kind.from_options(opts)}
    if len(set(needed.values())) > 1:
        listed = ", ".join(f"{kind.__name__} needs --classifier {name}" for kind, name in needed.items())
        raise UserError(f"{listed}; disable one of them")
    return next(iter(needed.values()), None)


def load_method_file(path: Path) -> tuple[list[type[Method]], dict[str, dict[str, Any]]]:
    """Register the methods and presets of a user's Python file (``--method_file``), unless already loaded.

    Returns:
        The added methods, and presets by name.

    Raises:
        UserError: the file cannot be run, or its methods or presets are invalid.
    """
    from methods.classifiers import classifier_names  # needs torch

    resolved = path.resolve()
    if resolved in _LOADED:
        return [], {}
    kinds, presets = read_method_file(resolved, taken={kind.__name__ for kind in REGISTRY})
    for name, options in presets.items():
        add_preset(name, options, source=resolved)
    REGISTRY.extend(kinds)
    CLASSIFIERS[:] = classifier_names()
    _LOADED.add(resolved)
    return kinds, presets
