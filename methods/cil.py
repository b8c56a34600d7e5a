"""CIL: distillation weighted by the teacher's uncertainty (Klingner et al. 2020)."""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Method
from methods.checks import refuse_other_channels
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight


class CIL(Method):
    """Distillation on pixels without a new class, weighted by the teacher's entropy (CIL)."""

    needs_teacher = True

    def __init__(self, gs: float, *, fidelity: str = "paper") -> None:
        self.criterion = loss.CILDistillationLoss(gs=gs, temp=1, fidelity=fidelity)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_CIL``."""
        group.value(
            "--loss_CIL",
            loss_weight,
            0.0,
            metavar="GS",
            help="factor of the entropy in the weight; above 0: enabled",
        )

    @classmethod
    def from_options(cls, opts: Any) -> CIL | None:
        """Enabled if ``--loss_CIL`` is above 0.

        Raises:
            UserError: the classifier has other channels.
        """
        if opts.loss_CIL <= 0:
            return None
        refuse_other_channels(opts, "loss_CIL")
        return cls(opts.loss_CIL, fidelity=opts.fidelity)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The weighted distillation."""
        return {
            "cil": self.criterion(outputs=batch.outputs, outputs_old=batch.outputs_old, targets=batch.targets)
        }
