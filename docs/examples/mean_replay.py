"""A custom method with state: cross entropy of the classifiers on the old classes' mean features.

python run.py --method_file docs/examples/mean_replay.py --method REPLAY --step all ...
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods import Batch, Context, Method
from utils.option_types import loss_weight

PRESETS = {"REPLAY": {"extends": "MIB", "loss_replay": 1.0}}


class MeanReplay(Method):
    """Cross entropy of the old classes' mean features, computed at the end of their step."""

    needs = frozenset({"pre_logits"})

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.means = torch.zeros(0, 256)  # classes × channels

    @classmethod
    def add_options(cls, group: Any) -> None:
        group.add_argument("--loss_replay", type=loss_weight, default=0.0, metavar="W", help="loss weight")

    @classmethod
    def from_options(cls, opts: Any) -> "MeanReplay | None":
        return cls(opts.loss_replay) if opts.loss_replay > 0 else None

    def from_previous_step(self, state: dict[str, Any]) -> None:
        self.means = state["means"]

    def begin_step(self, context: Context) -> None:
        self.classifier: Any = context.model.cls
        self.means = self.means.to(context.device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if not len(self.means):
            return {}
        logits = self.classifier(self.means[:, :, None, None]).flatten(1)
        classes = torch.arange(len(self.means), device=logits.device)
        return {"replay": self.weight * F.cross_entropy(logits, classes)}

    @torch.no_grad()
    def end_step(self, context: Context) -> None:
        classes = context.classes_old + context.classes_new
        sums = torch.zeros(classes, 256, device=context.device)
        counts = torch.zeros(classes, device=context.device)
        for images, targets in context.batches():
            with context.autocast():
                features = context.model(images)[1]["pre_logits"].float()
            labels = F.interpolate(targets[:, None].float(), size=features.shape[2:])[:, 0].long()
            known = labels != 255
            sums.index_add_(0, labels[known], features.permute(0, 2, 3, 1)[known])
            counts += labels[known].bincount(minlength=classes)
        means = context.reduce(sums) / context.reduce(counts).clamp(min=1)[:, None]  # over all processes
        self.means = torch.cat([self.means, means[context.classes_old :]])

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means}
