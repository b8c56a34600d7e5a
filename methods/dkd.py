"""DKD: decomposed knowledge distillation, and an auxiliary classifier (Baek et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from methods.base import Batch
from methods.checks import refuse_without
from methods.foreground import ForegroundMethod, checked_pos_weight
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import Number, loss_weight


class DecomposedDistillation(ForegroundMethod):
    """Distillation of old sigmoids and of their reasoning scores (DKD)."""

    classifier = "auxiliary"

    def __init__(
        self, pos_weight: Sequence[float], kd: float, dkd: float, *, fidelity: str = "paper"
    ) -> None:
        super().__init__(pos_weight, fidelity=fidelity)
        self.kd, self.dkd = kd, dkd
        self.auxiliary = loss.AuxiliaryLoss()
        self.distillation = loss.SigmoidDistillationLoss()
        self.decomposed = loss.DecomposedDistillationLoss("both", fidelity)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--dkd``, its weights, and ``--pos_weight``, which is also STAR's."""
        group.flag("--dkd", role="network", help="sigmoids and an auxiliary classifier (DKD)")
        for name, what in {
            "--loss_sigmoid_kd": "the distillation of old sigmoids",
            "--loss_dkd": "each of the two distillations of reasoning scores",
        }.items():
            group.value(name, loss_weight, 5.0, metavar="W", help=f"weight of {what} (DKD)")
        group.value(
            *("--pos_weight", Number(float, 0, 1e6, above=True), [1.0]),
            nargs="+",
            metavar="G",
            help="weight of a class's own pixels in the binary cross entropy of DKD and STAR; two values: at "
            "step 0 and at later steps",
        )

    @classmethod
    def from_options(cls, opts: Any) -> DecomposedDistillation | None:
        """Enabled with ``--dkd``."""
        if not opts.dkd:
            return None
        weights = opts.loss_sigmoid_kd, opts.loss_dkd
        return cls(checked_pos_weight(opts.pos_weight), *weights, fidelity=opts.fidelity)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """The published head."""
        refuse_without(opts, ["dkd"], ["loss_sigmoid_kd", "loss_dkd"])
        refuse_without(opts, ["dkd", "star"], ["pos_weight"])
        return {"head": "dkd"} if opts.dkd and opts.model == "deeplab" else {}

    def weight_decay_factor(self, parameter: str) -> float:
        """From step 1 on only the newest classifier decays."""
        return 1.0 if self.step == 0 or self.is_newest(parameter) else 0.0

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Classification and auxiliary loss; from step 1 on distillation of sigmoids and reasoning scores."""
        terms = {"mbce": self.mbce(batch), "auxiliary": self.auxiliary(batch.outputs)}
        if batch.outputs_old is not None:
            terms["kd"] = self.kd * self.distillation(batch.outputs, batch.outputs_old)
            features = batch.features["pre_logits"], batch.features_old["pre_logits"]
            weights = _foreground(self.model.cls.parts[:-1]), _foreground(self.model_old.cls.parts)
            positive, negative = self.dkd * self.decomposed(*features, *weights)
            terms |= {"dkd_positive": positive, "dkd_negative": negative}
        return terms


def _foreground(parts: Sequence[Any]) -> torch.Tensor:
    """Weights C×D of the foreground classes."""
    return torch.cat([part.weight for part in parts[1:]]).flatten(1)
