"""DFT*: fine-tuning with a frozen network and the classifiers of all steps (FT-FixBC-P, arXiv 2508.04267)."""

from __future__ import annotations

from typing import Any

from methods.base import Context, Method
from utils.lazy import loss
from utils.option_roles import OptionGroup


class Preallocation(Method):
    """Classifiers of all steps from step 0 on (DFT*)."""

    classifier = "preallocated"

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--pre_allocate``."""
        group.flag("--pre_allocate", role="network", help="classifiers of all steps from step 0 on")

    @classmethod
    def from_options(cls, opts: Any) -> Preallocation | None:
        """Enabled with ``--pre_allocate``."""
        return cls() if opts.pre_allocate else None


class FixedNetwork(Method):
    """Backbone and head are frozen from step 1 on, in evaluation mode (DFT*)."""

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--fix_backbone``."""
        group.flag("--fix_backbone", help="freeze backbone and head after step 0")

    @classmethod
    def from_options(cls, opts: Any) -> FixedNetwork | None:
        """Enabled with ``--fix_backbone``."""
        return cls() if opts.fix_backbone else None

    def begin_step(self, context: Context) -> None:
        """Freeze both, with the running statistics of their norms."""
        from segmentation_module import IncrementalSegmentationModule, freeze  # needs torch

        model = context.model
        trained = loss.trainable_parts(context.step, context.task.num_steps)
        if isinstance(model, IncrementalSegmentationModule) and not trained["body"]:
            freeze(model.network)
