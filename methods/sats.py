"""SATS: distillation of the self-attention of class regions (Qiu et al. 2023)."""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Context, Method
from methods.presets import FAMILY_PLOP
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight

INFINITE_THRESHOLD = 0.005  # replaces an infinite median of PLOP's in the released code


class AttentionTransfer(Method):
    """Distance of attention maps averaged over class regions from the teacher's (SATS)."""

    needs_teacher = True

    def __init__(self, distill_object: str, weight: float, *, fidelity: str = "paper") -> None:
        self.maps = "attentions" if distill_object == "sats-feature-CNN" else "self_attention"
        self.needs = frozenset({self.maps})
        # The released trainer applies the weight to the class-region variant only.
        weighted = fidelity == "paper" or distill_object == "sats-selfattn"
        self.weight = weight if weighted else 1.0
        self.distill_object = distill_object
        self.fidelity = fidelity

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--distill_object``, ``--distill_weight_args``."""
        group.choice(
            "--distill_object",
            ("sats-selfattn", "sats-selfattn-GP", "sats-selfattn-NP", "sats-feature-CNN"),
            None,
            help="what is distilled: attention of class regions (sats-selfattn), its mean over all "
            "positions (-GP), every position (-NP), or class means of the stages' feature maps",
        )
        group.value("--distill_weight_args", loss_weight, 10.0, metavar="W", help="weight")

    @classmethod
    def from_options(cls, opts: Any) -> AttentionTransfer | None:
        """Enabled with ``--distill_object``."""
        if opts.distill_object is None:
            return None
        return cls(opts.distill_object, opts.distill_weight_args, fidelity=opts.fidelity)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Void and unseen labels of PLOP's program, if typed rather than set by a preset.

        Released: no weights of pseudo-labels, which the trainer computes but does not apply.
        """
        implied: dict[str, Any] = dict(FAMILY_PLOP) if "distill_object" in opts.typed else {}
        if opts.distill_object is not None and opts.fidelity == "released":
            implied |= {"pseudo_unweighted": True, "pseudo_infinite": INFINITE_THRESHOLD}
        return implied

    def begin_step(self, context: Context) -> None:
        """Build the loss for the classes of this step."""
        self.criterion = loss.AttentionTransferLoss(
            distill_object=self.distill_object,
            fidelity=self.fidelity,
            num_classes=context.classes_old + context.classes_new,
        )

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The weighted distance of the class regions' attention."""
        old, new = batch.features_old[self.maps], batch.features[self.maps]
        if self.maps == "attentions":
            old, new = old[:-1], new[:-1]  # without the head's output, which is PLOP's last map
        distance = self.criterion(attentions_old=old, attentions=new, labels=batch.targets)
        return {"attention_transfer": self.weight * distance}
