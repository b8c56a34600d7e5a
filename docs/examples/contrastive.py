"""A custom method with a trainable module: supervised contrastive loss (Khosla et al. 2020).

python run.py --method_file docs/examples/contrastive.py --method CONTRAST --step all ...
"""

from typing import Any

import torch
from torch import Tensor, nn

from methods import Batch, Context, Method
from utils.option_types import loss_weight

PRESETS = {"CONTRAST": {"extends": "MIB", "loss_contrast": 0.1}}


def contrast(vectors: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean of −log softmax over the pairs with one label, 0 without pairs; n×D with norm 1, n → scalar."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (vectors @ vectors.T / temperature).masked_fill(itself, -1e9)
    pairs = (labels[:, None] == labels) & ~itself
    return -(similarity.log_softmax(dim=1) * pairs).sum() / pairs.sum().clamp(min=1)


class Contrast(Method):
    """Contrastive loss on the projected mean feature of each class in each image."""

    needs = frozenset({"pre_logits"})

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def add_options(cls, group: Any) -> None:
        group.add_argument("--loss_contrast", type=loss_weight, default=0.0, metavar="W", help="loss weight")

    @classmethod
    def from_options(cls, opts: Any) -> "Contrast | None":
        return cls(opts.loss_contrast) if opts.loss_contrast > 0 else None

    def begin_step(self, context: Context) -> None:
        self.head = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))

    def modules(self) -> dict[str, nn.Module]:
        return {"head": self.head}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        features = batch.features["pre_logits"].float().permute(0, 2, 3, 1)
        labels = nn.functional.interpolate(batch.targets[:, None].float(), size=features.shape[1:3])[:, 0]
        is_class = (labels > 0) & (labels < 255)
        image = torch.arange(len(labels), device=labels.device)[:, None, None]
        regions, place = (256 * image + labels)[is_class].unique(return_inverse=True)
        sums = features.new_zeros(len(regions), 256).index_add(0, place, features[is_class])
        vectors = nn.functional.normalize(self.head(sums / place.bincount()[:, None]))
        return {"contrast": self.weight * contrast(vectors, regions % 256)}
