"""SATS: the self-attention of class regions, handed from the old network to the new (Qiu et al. 2023)."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

from methods.base import Batch, Context, Method
from methods.presets import FAMILY_PLOP
from utils.loss import AttentionTransferLoss
from utils.option_types import loss_weight

INFINITE_THRESHOLD = 0.005  # what the released code puts where PLOP's median is infinite
OBJECTS = ("sats-selfattn", "sats-selfattn-GP", "sats-selfattn-NP", "sats-feature-CNN")


class AttentionTransfer(Method):
    """Attention maps averaged over class regions must stay as the teacher has them (SATS)."""

    needs_teacher = True

    def __init__(self, distill_object: str, weight: float, *, fidelity: str = "paper") -> None:
        self.maps = "attentions" if distill_object == "sats-feature-CNN" else "self_attention"
        self.needs = frozenset({self.maps})
        # The released trainer weights only the class-region form.
        weighted = fidelity == "paper" or distill_object == "sats-selfattn"
        self.weight = weight if weighted else 1.0
        self.distill_object = distill_object
        self.fidelity = fidelity

    @classmethod
    def add_options(cls, parser: argparse._ActionsContainer) -> None:
        """``--distill_object``, ``--distill_weight_args``."""
        parser.add_argument(
            "--distill_object",
            choices=OBJECTS,
            default=None,
            help="what is transferred: attention of class regions (sats-selfattn), its mean over all "
            "positions (-GP), every position (-NP), or class means of the stages' feature maps",
        )
        parser.add_argument(
            "--distill_weight_args", type=loss_weight, default=10.0, metavar="W", help="weight"
        )

    @classmethod
    def from_options(cls, opts: Any) -> AttentionTransfer | None:
        """On with ``--distill_object``."""
        if opts.distill_object is None:
            return None
        return cls(opts.distill_object, opts.distill_weight_args, fidelity=opts.fidelity)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Typed rather than by a preset, it brings the void and unseen labels of PLOP's program.

        Released, the trainer computes the weights of pseudo-labels but never applies them.
        """
        implied: dict[str, Any] = dict(FAMILY_PLOP) if "distill_object" in opts.typed else {}
        if opts.distill_object is not None and opts.fidelity == "released":
            implied |= {"pseudo_unweighted": True, "pseudo_infinite": INFINITE_THRESHOLD}
        return implied

    def begin_step(self, context: Context) -> None:
        """The classes whose regions are averaged."""
        self.criterion = AttentionTransferLoss(
            distill_object=self.distill_object,
            fidelity=self.fidelity,
            num_classes=context.classes_old + context.classes_new,
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted distance of the class regions' attention."""
        old, new = batch.features_old[self.maps], batch.features[self.maps]
        if self.maps == "attentions":
            old, new = old[:-1], new[:-1]  # the stages' alone: the head's output is PLOP's last map
        loss = self.criterion(attentions_old=old, attentions=new, labels=batch.targets)
        return {"attention_transfer": self.weight * loss}
