"""iCaRL's binary cross entropy on old classes, as LWF-MC uses it (Rebuffi et al. 2017, eq. 2)."""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Method
from methods.checks import refuse_other_channels
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight


class ICaRL(Method):
    """Binary cross entropy towards the teacher's sigmoid on the old classes.

    By default a term beside the classification loss, summed over the old classes; with ``disjoint`` it
    replaces the classification loss.
    """

    needs_teacher = True
    classification = "bce"

    def __init__(self, importance: float, *, disjoint: bool = False, bkg: bool = False) -> None:
        self.importance = importance
        self.replaces_classification = disjoint
        self.disjoint = loss.IcarlLoss(reduction="mean", bkg=bkg) if disjoint else None

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--icarl``, ``--icarl_*``."""
        group.flag("--icarl", help="binary cross entropy with teacher outputs")
        group.value(
            "--icarl_importance", loss_weight, 1.0, metavar="W", help="weight of the combined variant"
        )
        group.flag("--icarl_disjoint", help="old classes learn from the teacher only")
        group.flag("--icarl_bkg", help="disjoint variant: background from the ground truth")

    @classmethod
    def from_options(cls, opts: Any) -> ICaRL | None:
        """Enabled with ``--icarl``.

        Raises:
            UserError: the classifier has other channels.
        """
        if not opts.icarl:
            return None
        refuse_other_channels(opts, "icarl")
        return cls(opts.icarl_importance, disjoint=opts.icarl_disjoint, bkg=opts.icarl_bkg)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The combined term, or the disjoint loss."""
        assert batch.outputs_old is not None
        teacher = batch.outputs_old.sigmoid()
        if self.disjoint is not None:
            return {"icarl": self.disjoint(batch.outputs, batch.targets, teacher)}
        old = batch.outputs_old.shape[1]
        mean = torch.nn.functional.binary_cross_entropy_with_logits(batch.outputs[:, :old], teacher)
        return {"icarl": self.importance * old * mean}
