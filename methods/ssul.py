"""SSUL: an unknown class beside the background, a frozen network that only gains heads (Cha et al. 2021)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Batch, Context, Method
from modules.classifiers import Classifier, add_classifier
from modules.norm import norm_layers
from segmentation_module import IncrementalSegmentationModule, freeze
from utils.loss import VOID, BCEWithLogitsLossWithIgnoreIndex, sigmoid_pseudo_labels

BACKBONE_LR_FACTOR = 0.1  # step 0: SSUL trains the body at 1e-3 and the heads at 1e-2
BACKGROUND_LR_FACTOR = 1e-4  # later steps: the background's head hardly moves
RELEASED_BACKBONE_MOMENTUM = 0.01  # of the running statistics in the body's norm layers
log = logging.getLogger(__name__)


class ConvolutionalPart(nn.Sequential):
    """Classifier of a step: 3×3 convolution, norm, ReLU, 1×1 convolution (SSUL, section 3.2)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, classes, 1),
        )


@add_classifier
class UnknownClassifier(Classifier):
    """Convolutional parts, the background in one of its own, and an "unknown" class, the last channel."""

    name = "unknown"
    former_names: ClassVar[Mapping[str, str]] = {"unknown.": "cls.unknown."}
    torchvision_resnet = True

    def __init__(self, channels: int, classes: Sequence[int], later: Sequence[int] = ()) -> None:
        super().__init__(channels, classes, later)
        self.unknown = ConvolutionalPart(channels, 1)

    def widths(self, classes: Sequence[int], later: Sequence[int]) -> list[int]:
        """The background's, then the classes of each step."""
        return [1, classes[0] - 1, *classes[1:]]

    def make_part(self, channels: int, width: int) -> nn.Module:
        """B×channels×h×w → B×width×h×w."""
        return ConvolutionalPart(channels, width)

    def initialise(self, head: str) -> None:
        """He's initialisation behind the head of SSUL's program, of which the classifiers are part there."""
        for module in self.modules() if head == "aspp" else ():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @torch.no_grad()
    def start(self, balanced: bool) -> None:
        """The newest part starts from the unknown class's (SSUL, section 3.2)."""
        new, unknown = (part.state_dict().values() for part in (self.parts[self.newest], self.unknown))
        for to, value in zip(new, unknown, strict=True):
            to.copy_(value.expand_as(to))

    def forward(self, features: Tensor) -> Tensor:
        """Logits B×(C+1)×h×w."""
        return torch.cat([super().forward(features), self.unknown(features)], dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoids B×C×H×W, the unknown class's added to the background's: it counts as background."""
        scores = logits.float().sigmoid()
        scores[:, 0] += scores[:, -1]
        return scores[:, :-1]


class UnknownClass(Method):
    """Binary cross entropy with an "unknown" class; later steps train new heads only (SSUL).

    Background pixels that are salient are "unknown" (all of them where the data set has no saliency
    maps, as SSUL does on ADE20K). Where the label is background or unknown and the teacher's sigmoid
    reaches ``threshold`` for an old class, that class is the label.
    """

    replaces_classification = True
    classifier = UnknownClassifier.name

    def __init__(self, threshold: float, *, fidelity: str = "paper") -> None:
        self.threshold = threshold
        self.released = fidelity == "released"
        self.extras = frozenset({"saliency", "exemplar"} if self.released else {"saliency"})
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

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Released: head, augmentation, schedule, use of exemplars and evaluation of its program.

        Its schedule with warm-up, the published one on ADE20K, has no smallest rate.
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
        """Pseudo-labels come from the teacher, where there is one."""
        return True

    def begin_step(self, context: Context) -> None:
        """Later steps: only the new head, unknown's and background's learn.

        Released: norm layers of the heads that train are frozen too (the published runs' ``--bn_freeze``);
        else frozen parts stay in training mode, so that the head's dropout goes on; at step 0 the body's
        running statistics move by 1 %. A network of another kind has no heads to freeze: that is left to
        who made it.
        """
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
        """The body learns slower at step 0, the background's head hardly at all later."""
        if self.step == 0:
            return BACKBONE_LR_FACTOR if parameter.startswith("network.body.") else 1.0
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
