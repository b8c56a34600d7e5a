"""EWF: the weights before and after a step, averaged (Xiao et al. 2023)."""

from __future__ import annotations

from typing import Any

from methods.base import Context, Method
from utils.lazy import loss
from utils.option_roles import OptionGroup


class EndpointWeightFusion(Method):
    """After a step, every weight is averaged with the teacher's; the new classifier is kept (EWF, eq. 4)."""

    needs_teacher = True

    @property
    def uses_teacher(self) -> bool:
        """Only its weights, after the step: its forward pass is not needed."""
        return False

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--ewf``, in the released program ``--weight_fusion``."""
        group.flag("--ewf --weight_fusion", help="average the weights before and after each step (EWF)")

    @classmethod
    def from_options(cls, opts: Any) -> EndpointWeightFusion | None:
        """Enabled with ``--ewf``."""
        return cls() if opts.ewf else None

    def end_step(self, context: Context) -> None:
        """Fuse the networks, running statistics included."""
        assert context.model_old is not None
        model: Any = context.model
        # With two branches the teacher's are merged first, as the student's were.
        old = model.network.from_previous(context.model_old.state_dict(), "network.")
        new = model.state_dict()
        model.load_state_dict(loss.fuse_weights(dict(old), new, context.classes_new, context.classes_old))
