"""A custom method that changes weights after a step: EWF's average of old and new weights (CVPR 2023).

python run.py --method_file docs/examples/weight_fusion.py --method FUSION --step all ...
"""

from typing import Any

import torch

from methods import Context, Method

PRESETS = {"FUSION": {"extends": "MIB", "fusion": True}}


class WeightFusion(Method):
    """θ ← (1 − α)·θ_old + α·θ after a step, α² = new classes / all classes; the new classifier is kept."""

    needs_teacher = True

    @classmethod
    def add_options(cls, group: Any) -> None:
        group.add_argument("--fusion", action="store_true", help="average old and new weights after a step")

    @classmethod
    def from_options(cls, opts: Any) -> "WeightFusion | None":
        return cls() if opts.fusion else None

    @torch.no_grad()
    def end_step(self, context: Context) -> None:
        alpha = (context.classes_new / (context.classes_new + context.classes_old)) ** 0.5
        teacher: Any = context.model_old
        new = context.model.state_dict()
        for name, old in teacher.state_dict().items():
            if old.is_floating_point():  # all but num_batches_tracked
                new[name].copy_(torch.lerp(old, new[name], alpha))
