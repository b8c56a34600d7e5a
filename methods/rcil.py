"""RCIL: pooled cube distillation, on networks with two branches (Zhang et al. 2022).

The branches and their merge are the network's (``--two_branches``, ``modules/branches.py``).
"""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Context, Method
from utils.lazy import loss, no_grad, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight


class PooledCubeDistillation(Method):
    """Distance of the stages' maps, averaged over windows and over channels, from the teacher's (RCIL)."""

    needs = frozenset({"stages", "pre_logits", "logits_small"})
    needs_teacher = True

    def __init__(self, factors: tuple[float, float], *, copy_weights: bool = False) -> None:
        self.criterion = loss.PooledCubeDistillationLoss(factors)
        self.copy_weights = copy_weights

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_pckd``, ``--loss_pckd_last``."""
        group.value("--loss_pckd", loss_weight, 0.0, metavar="W", help="weight of pooled cube distillation")
        group.value("--loss_pckd_last", loss_weight, 0.0, metavar="W", help="weight of the last map in it")

    @classmethod
    def from_options(cls, opts: Any) -> PooledCubeDistillation | None:
        """Enabled if one of the weights is above 0."""
        factors = opts.loss_pckd, opts.loss_pckd_last
        if not any(factors):
            return None
        return cls(factors, copy_weights=opts.fidelity == "released" and not opts.init_balanced)

    @no_grad
    def begin_step(self, context: Context) -> None:
        """Released: new classifiers have the background's weights and random biases.

        There the bias part of the balanced initialisation runs for another data set only, so that the
        background's bias stays.
        """
        from segmentation_module import IncrementalSegmentationModule  # needs torch

        model = context.model
        if self.copy_weights and isinstance(model, IncrementalSegmentationModule):
            first, new = (model.cls.parts[k].get_parameter("weight") for k in (0, model.cls.newest))
            new.copy_(first[:1].expand_as(new))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Its two parts, over the four stages, the head's output and the small logits."""
        old, new = (
            [*features["stages"], features["pre_logits"], features["logits_small"]]
            for features in (batch.features_old, batch.features)
        )
        spatial, channel = self.criterion(
            old,
            new,
            nb_current_classes=batch.classes_old + batch.classes_new,
            nb_new_classes=batch.classes_new,
            index_new_class=batch.classes_old,
        )
        return {"pckd_spatial": spatial, "pckd_channel": channel}
