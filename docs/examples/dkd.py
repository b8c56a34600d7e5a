"""A custom method: the losses of Decomposed Knowledge Distillation (Baek et al., NeurIPS 2022).

    python run.py --method_file docs/examples/dkd.py --method DKD-EXAMPLE --step all ...

An example of a loss in one file; the whole method is methods/dkd.py (``--method DKD``). As in DKD a pixel is
background where no class has a sigmoid above 0.5: the background's logit stays 0. DKD's auxiliary classifier,
which initialises new classes, its head, schedule and frozen norms are not included.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods import Batch, Context, Method
from utils.option_types import loss_weight

PRESETS = {"DKD-EXAMPLE": {"example_dkd": 5.0}}


def bce(logits: Tensor, targets: Tensor, pos_weight: float = 1.0) -> Tensor:
    """Binary cross entropy of B×C×h×w, mean over images and pixels, sum over channels."""
    weight = logits.new_tensor(pos_weight)
    maps = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=weight)
    return maps.mean(dim=(0, 2, 3)).sum()


def reasoning_scores(features: Tensor, model: Any, steps: int) -> Tensor:
    """Positive and negative parts of the foreground logits of the first steps, without biases."""
    weights = torch.cat([part.weight for part in model.cls.parts[:steps]])[1:]
    return F.conv2d(features, torch.cat([weights.clamp(min=0), weights.clamp(max=0)]))


class ReasoningScores(Method):
    """Binary cross entropy of new classes; distillation of old logits and reasoning scores."""

    needs = teacher_needs = frozenset({"pre_logits"})
    replaces_classification = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def add_options(cls, group: Any) -> None:
        group.add_argument("--example_dkd", type=loss_weight, default=0.0, metavar="W", help="weight of DKD")

    @classmethod
    def from_options(cls, opts: Any) -> "ReasoningScores | None":
        return cls(opts.example_dkd) if opts.example_dkd > 0 else None

    def begin_step(self, context: Context) -> None:
        self.step, self.model, self.model_old = context.step, context.model, context.model_old
        if self.step == 0:
            for name in ("cls.0.weight", "cls.0.bias"):  # the background's, which has no loss
                context.model.get_parameter(name).data[0] = 0

    def lr_factor(self, name: str) -> float:
        return 1.0 if name.startswith("network.body.") else 10.0

    def weight_decay_factor(self, name: str) -> float:
        return 1.0 if self.step == 0 or name.startswith(f"cls.{self.step}.") else 0.0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        first = max(batch.classes_old, 1)
        new = batch.outputs[:, first:]
        classes = torch.arange(first, batch.outputs.shape[1], device=new.device)
        targets = (batch.targets[:, None] == classes[:, None, None]).to(new.dtype)
        terms = {"mbce": bce(new, targets, pos_weight=1.0 if self.step else 2.0)}
        if batch.outputs_old is not None:
            scores = reasoning_scores(batch.features["pre_logits"], self.model, self.step)
            scores_old = reasoning_scores(batch.features_old["pre_logits"], self.model_old, self.step)
            terms["kd"] = self.weight * bce(batch.outputs[:, 1:first], batch.outputs_old[:, 1:].sigmoid())
            terms["dkd"] = self.weight * bce(scores, scores_old.sigmoid())
        return terms
