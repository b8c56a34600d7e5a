"""A custom method: cosine distance between the features of student and teacher (docs/methods.md)."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from methods import Batch, Method
from utils.option_types import loss_weight

PRESETS = {"COSINE": {"loss_cosine": 10.0, "unce": True, "init_balanced": True}}  # options of --method COSINE


class CosineDistillation(Method):
    """W · mean of 1 − cos(f, f_old) over the features before the classifier."""

    needs = frozenset({"pre_logits"})  # of both networks
    needs_teacher = True  # not used at step 0

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def add_options(cls, group: Any) -> None:
        group.add_argument("--loss_cosine", type=loss_weight, default=0.0, metavar="W", help="loss weight")

    @classmethod
    def from_options(cls, opts: Any) -> "CosineDistillation | None":
        return cls(opts.loss_cosine) if opts.loss_cosine > 0 else None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        features, features_old = batch.features["pre_logits"], batch.features_old["pre_logits"]
        similarity = F.cosine_similarity(features, features_old, dim=1)  # B×256×h×w → B×h×w
        return {"cosine": self.weight * (1 - similarity).mean()}
