"""A method of one's own that acts after a step: new and old weights are fused, the idea of EWF (CVPR 2023).

python run.py --method_file docs/examples/weight_fusion.py --method FUSION --step all ...
"""

from typing import Any

import torch

from methods import Context, Method
from utils.option_types import share

PRESETS = {"FUSION": {"extends": "MIB", "fusion": 0.5}}


class WeightFusion(Method):
    """After each step θ becomes F·θ_old + (1 - F)·θ, but for the new classes' part."""

    factor = 0.0

    @classmethod
    def add_options(cls, group: Any) -> None:
        group.add_argument("--fusion", type=share, default=0.0, metavar="F", help="share of the old weights")

    @classmethod
    def from_options(cls, opts: Any) -> "WeightFusion | None":
        method = cls()
        method.factor = opts.fusion
        return method if opts.fusion > 0 else None

    def begin_step(self, context: Context) -> None:
        named = context.model.named_parameters() if context.step else ()  # just grown: still the old weights
        self.old = {n: p.detach().clone() for n, p in named if not n.startswith(f"cls.{context.step}.")}

    @torch.no_grad()
    def end_step(self, context: Context) -> None:
        for name, parameter in context.model.named_parameters():
            if name in self.old:
                parameter.lerp_(self.old[name], self.factor)
