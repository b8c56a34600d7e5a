"""SSUL: an unknown class beside the background, and a frozen network with new heads (Cha et al. 2021)."""

from __future__ import annotations

import logging
from typing import Any

from methods.base import Batch, Context, Method
from utils.labels import VOID
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup

BACKBONE_LR_FACTOR = 0.1  # step 0: 1e-3 for the backbone, 1e-2 for the heads
BACKGROUND_LR_FACTOR = 1e-4  # later steps, of the background's head
RELEASED_BACKBONE_MOMENTUM = 0.01  # of the running statistics in the backbone's norm layers
log = logging.getLogger(__name__)


class UnknownClass(Method):
    """Binary cross entropy with an "unknown" class; later steps train new heads only (SSUL).

    Salient background pixels are "unknown" (all background pixels without saliency maps, as SSUL on ADE20K).
    Background and unknown pixels get the teacher's old class if its sigmoid is at least ``threshold``.
    """

    replaces_classification = True
    classifier = "unknown"

    def __init__(self, threshold: float, *, fidelity: str = "paper") -> None:
        self.threshold = threshold
        self.released = fidelity == "released"
        self.extras = frozenset({"saliency", "exemplar"} if self.released else {"saliency"})
        self.criterion = loss.BCEWithLogitsLossWithIgnoreIndex()
        self.step = 0

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--unknown``."""
        group.flag("--unknown", role="network", help="unknown class, a head per step, frozen network (SSUL)")

    @classmethod
    def from_options(cls, opts: Any) -> UnknownClass | None:
        """Enabled with ``--unknown``; ``--threshold`` is the smallest sigmoid of a pseudo-label."""
        return cls(opts.threshold, fidelity=opts.fidelity) if opts.unknown else None

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Released: head, augmentation, schedule, use of exemplars and evaluation of its program.

        The schedule with warm-up, published for ADE20K, has no minimum learning rate.
        """
        if not opts.unknown or opts.fidelity != "released":
            return {}
        return {
            "augmentation": "scale_crop",
            "eval_images": "all",
            "memory_choice": "in_turn",
            "memory_labels": "current",
            "memory_batches": "overwrite",
            "warmup_form": "factor",
            **({"head": "aspp"} if opts.model == "deeplab" else {}),
            **({"min_lr": 1e-6} if opts.warmup == 0 and opts.lr_policy == "poly" else {}),
        }

    @property
    def uses_teacher(self) -> bool:
        """From step 1 on, for the pseudo-labels."""
        return True

    def begin_step(self, context: Context) -> None:
        """Later steps: freeze all but the new, the unknown and the background head.

        Released: norm layers of the trained heads are frozen too (the published runs' ``--bn_freeze``),
        frozen parts stay in training mode, which keeps the head's dropout, and at step 0 the momentum of the
        backbone's running statistics is 0.01. A network of another class is not changed.
        """
        from modules.norm import norm_layers  # need torch
        from segmentation_module import IncrementalSegmentationModule, freeze

        self.step = context.step
        model = context.model
        if not isinstance(model, IncrementalSegmentationModule):
            return
        if context.step == 0:
            for layer in norm_layers(model.network.body) if self.released else ():
                layer.momentum = RELEASED_BACKBONE_MOMENTUM  # type: ignore[assignment]
            return
        if self.released:
            model.fix_bn()
        for part in (model.network, *model.cls.parts[1:-1]):
            if self.released:
                part.requires_grad_(False)
            else:
                freeze(part)

    def lr_factor(self, parameter: str) -> float:
        """Lower rates for the backbone at step 0 and for the background's head at later steps."""
        if self.step == 0:
            return BACKBONE_LR_FACTOR if parameter.startswith("network.body.") else 1.0
        return BACKGROUND_LR_FACTOR if parameter.startswith("cls.0.") else 1.0

    def relabel(self, batch: Batch) -> None:
        """Replace background by pseudo-labels; remaining salient background becomes unknown.

        Released: "unknown" is class 0 and the background 1, but an exemplar's labels are not shifted. So its
        background is unknown, its class 1 the background, and any other class c is class c − 1.
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
            # The teacher's last channel is its unknown class, which is no pseudo-label.
            targets = loss.sigmoid_pseudo_labels(
                batch.outputs_old, targets, self.threshold, end=batch.classes_old
            )
        batch.targets = torch.where(hidden & (targets == 0), batch.classes_old + batch.classes_new, targets)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Binary cross entropy over classes and "unknown" on non-void pixels."""
        return {"bce": self.criterion(batch.outputs, batch.targets)}
