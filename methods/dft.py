"""DFT*: fine-tuning with a frozen network and the classifiers of all steps (FT-FixBC-P, arXiv 2508.04267)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from methods.base import Context, Method
from modules.classifiers import Classifier, LinearClassifier, add_classifier
from segmentation_module import IncrementalSegmentationModule, freeze
from utils.loss import trainable_parts
from utils.option_roles import OptionGroup


@add_classifier
class PreallocatedClassifier(LinearClassifier):
    """1×1 convolutions of all steps from step 0 on; those of later steps are negatives in the softmax.

    The prediction is among the seen classes only.
    """

    name = "preallocated"
    needs_its_method = True
    starts_balanced = False
    of_all_steps = True
    start = Classifier.start  # this step's part has been trained already

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all classes, in evaluation mode (so also the teacher's) of the seen ones."""
        logits = super().forward(features)
        return logits if self.training else logits[:, : sum(self.classes)]


class Preallocation(Method):
    """Classifiers of all steps from step 0 on (DFT*)."""

    classifier = PreallocatedClassifier.name

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
        model = context.model
        trained = trainable_parts(context.step, context.task.num_steps)
        if isinstance(model, IncrementalSegmentationModule) and not trained["body"]:
            freeze(model.network)
