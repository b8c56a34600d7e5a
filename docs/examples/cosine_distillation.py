"""A custom method: cosine distance between the head's features of student and teacher.

    python run.py --method_file docs/examples/cosine_distillation.py --method COSINE --step all ...

Loss: W · mean of 1 − cos(f, f_old) over the positions without a new class; f are the 256 channels before the
classifier (docs/methods.md).
"""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from methods import Batch, Method
from utils.option_types import loss_weight

PRESETS = {"COSINE": {"loss_cosine": 10.0, "unce": True, "init_balanced": True}}


def cosine_distance(features: Tensor, features_old: Tensor, keep: Tensor) -> Tensor:
    """Mean of 1 − cosine over the positions to keep.

    Args:
        features, features_old: B×D×h×w.
        keep: B×h×w, bool; the distance is 0 if all are false.
    """
    distance = 1 - F.cosine_similarity(features, features_old, dim=1)
    return (distance * keep).sum() / keep.sum().clamp(min=1)


class CosineDistillation(Method):
    """Cosine distance to the teacher's features on pixels without a new class."""

    needs = frozenset({"pre_logits"})
    needs_teacher = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def add_options(cls, parser: argparse._ActionsContainer) -> None:
        """``--loss_cosine``."""
        parser.add_argument(
            "--loss_cosine", type=loss_weight, default=0.0, metavar="W", help="weight of the loss"
        )

    @classmethod
    def from_options(cls, opts: Any) -> CosineDistillation | None:
        """Enabled if ``--loss_cosine`` is above 0."""
        return cls(opts.loss_cosine) if opts.loss_cosine > 0 else None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted distance, with labels downsampled to the features' size."""
        features, features_old = batch.features["pre_logits"], batch.features_old["pre_logits"]
        labels = F.interpolate(batch.targets[:, None].float(), size=features.shape[-2:], mode="nearest")[:, 0]
        keep = (labels < batch.classes_old) | (labels == 255)
        return {"cosine": self.weight * cosine_distance(features, features_old, keep)}
