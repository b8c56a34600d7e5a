"""SSUL: an unknown class beside the background, a frozen network that only gains heads (Cha et al. 2021)."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Context, Method
from modules.norm import norm_layers
from segmentation_module import IncrementalSegmentationModule, freeze
from utils.loss import VOID, BCEWithLogitsLossWithIgnoreIndex, sigmoid_pseudo_labels

BODY_LR_FACTOR = 0.1  # step 0: SSUL trains the body at 1e-3 and the heads at 1e-2
BACKGROUND_LR_FACTOR = 1e-4  # later steps: the background's head hardly moves
RELEASED_BODY_MOMENTUM = 0.01  # of the running statistics in the body's norm layers
log = logging.getLogger(__name__)


class UnknownClass(Method):
    """Binary cross entropy with an "unknown" class; later steps train new heads only (SSUL).

    Background pixels that are salient are "unknown" (all of them where the data set has no saliency
    maps, as SSUL does on ADE20K). Where the label is background or unknown and the teacher's sigmoid
    reaches ``threshold`` for an old class, that class is the label.
    """

    replaces_classification = True

    def __init__(self, threshold: float, *, fidelity: str = "paper") -> None:
        self.threshold = threshold
        self.released = fidelity == "released"
        self.criterion = BCEWithLogitsLossWithIgnoreIndex(reduction="mean", ignore_index=255)
        self.step = 0

    @classmethod
    def add_options(cls, parser: argparse._ActionsContainer) -> None:
        """``--unknown``."""
        parser.add_argument(
            "--unknown",
            action="store_true",
            role="network",
            help="unknown class, heads of their own, frozen network (SSUL)",
        )

    @classmethod
    def from_options(cls, opts: Any) -> UnknownClass | None:
        """On with ``--unknown``; ``--threshold`` is the sigmoid that a pseudo-label must reach."""
        return cls(opts.threshold, fidelity=opts.fidelity) if opts.unknown else None

    @property
    def uses_teacher(self) -> bool:
        """Pseudo-labels come from the teacher, where there is one."""
        return True

    def begin_step(self, context: Context) -> None:
        """Later steps: the new head starts from unknown's; only it, unknown's and background's learn.

        Released: norm layers of the heads that train are frozen too (the published runs' ``--bn_freeze``);
        else frozen parts stay in training mode, so that the head's dropout goes on; at step 0 the body's
        running statistics move by 1 %. A network of another kind has no heads to start and freeze: that is
        left to who made it.
        """
        self.step = context.step
        model = context.model
        if not isinstance(model, IncrementalSegmentationModule):
            return
        if context.step == 0:
            for layer in norm_layers(model.network.body) if self.released else ():
                layer.momentum = RELEASED_BODY_MOMENTUM  # type: ignore[assignment]
            return
        model.init_from_unknown()
        if self.released:
            model.fix_bn()
        for part in (model.network, *model.cls[1:-1]):
            if self.released:
                part.requires_grad_(False)
            else:
                freeze(part)

    def lr_factor(self, parameter: str) -> float:
        """The body learns slower at step 0, the background's head hardly at all later."""
        if self.step == 0:
            return BODY_LR_FACTOR if parameter.startswith("network.body.") else 1.0
        return BACKGROUND_LR_FACTOR if parameter.startswith("cls.0.") else 1.0

    def relabel(self, batch: Batch) -> None:
        """Confident old classes take the background's place; what is left and salient becomes unknown.

        Released: an exemplar's labels are not shifted to make room for "unknown", which is class 0 there and
        the background 1. So its background is unknown, its class 1 the background, any other class the one
        before.
        """
        targets = batch.targets
        hidden = targets == 0
        if (salient := batch.extras.get("saliency")) is not None:
            hidden &= salient.bool()
        if self.released and (exemplar := batch.extras.get("exemplar")) is not None:
            exemplar = exemplar[:, None, None]
            hidden |= exemplar & (targets == 0)
            targets = targets - (exemplar & (targets > 0) & (targets != VOID)).long()
        if batch.outputs_old is not None:
            # The teacher's last channel is its unknown class, which is not handed on.
            targets = sigmoid_pseudo_labels(batch.outputs_old, targets, self.threshold, end=batch.classes_old)
        batch.targets = torch.where(hidden & (targets == 0), batch.classes_old + batch.classes_new, targets)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Binary cross entropy over classes and "unknown", void left out."""
        return {"bce": self.criterion(batch.outputs, batch.targets)}
