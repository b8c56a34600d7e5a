"""LGKD: distillation guided by the labels of the new classes (Yang et al. 2023)."""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Method
from methods.checks import refuse_other_channels, refuse_without
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight


class LabelGuidedDistillation(Method):
    """Where a new class is labelled, it gets the teacher's probability of the background.

    Computed on the logits before upsampling, with the labels before pseudo-labels, in both forms of
    ``--fidelity``: the released code is the only source of the size.
    """

    needs = frozenset({"logits_small"})
    needs_teacher = True

    def __init__(self, prev_kd: float, novel_kd: float) -> None:
        self.criterion = loss.LabelGuidedKnowledgeDistillationLoss(prev_kd, novel_kd)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--lgkd``, ``--prev_kd``, ``--novel_kd``."""
        group.flag("--lgkd", help="label-guided distillation (LGKD)")
        group.value("--prev_kd", loss_weight, 10.0, metavar="W", help="weight on pixels without a new label")
        group.value("--novel_kd", loss_weight, 2.0, metavar="W", help="weight on pixels with a new label")

    @classmethod
    def from_options(cls, opts: Any) -> LabelGuidedDistillation | None:
        """Enabled with ``--lgkd``.

        Raises:
            UserError: a weight is typed without it, or the classifier has other channels.
        """
        refuse_without(opts, ["lgkd"], ["prev_kd", "novel_kd"])
        if not opts.lgkd:
            return None
        refuse_other_channels(opts, "lgkd")
        return cls(opts.prev_kd, opts.novel_kd)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Mean over the non-void positions."""
        new, old = batch.features["logits_small"], batch.features_old["logits_small"]
        return {"lgkd": self.criterion(new, old, batch.original_targets)}
