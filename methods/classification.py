"""The classification loss: cross entropy and its alternatives."""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Context, Method
from utils.errors import UserError
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import whole

FORMS = ("ce", "bce", "unce", "focal")


class Classification(Method):
    """Cross entropy, unbiased cross entropy (MiB, eq. 5), binary cross entropy or focal loss.

    Mean over all pixels of the batch; void pixels count as zero, as in all four released programs.
    """

    def __init__(self, kind: str = "ce", *, alpha: float = 1.0, gamma: float = 2.0) -> None:
        self.kind = kind
        self.alpha = alpha
        self.gamma = gamma
        self.typed: str | None = None  # the option by which the user chose the form
        self.criterion: torch.nn.Module = torch.nn.CrossEntropyLoss(ignore_index=255, reduction="none")

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--bce``, ``--unce``, ``--focal_loss``."""
        group.flag("--bce", help="binary cross entropy over classes")
        group.flag("--unce", help="unbiased cross entropy (MiB)")
        group.flag("--focal_loss", help="focal loss")
        group.value("--focal_loss_gamma", whole(0, 100), 2, help="exponent of the focal loss")

    @classmethod
    def from_options(cls, opts: Any) -> Classification:
        """Always enabled, unless another method has ``replaces_classification``.

        A typed form wins over a preset's.

        Raises:
            UserError: two forms are typed.
        """
        forms = {"bce": "bce", "unce": "unce", "focal_loss": "focal"}
        chosen = [option for option in forms if getattr(opts, option)]
        typed = [option for option in chosen if option in opts.typed]
        if len(typed) > 1:
            raise UserError(f"--{' and --'.join(typed)} exclude each other; give one")
        option = next(iter(typed or chosen), None)
        method = cls(forms.get(option or "", "ce"), alpha=opts.alpha, gamma=opts.focal_loss_gamma)
        method.typed = next(iter(typed), None)
        return method

    def check_unused(self, method: str) -> None:
        """Refuse a typed form that a method leaves without effect.

        Raises:
            UserError: naming both.
        """
        if self.typed is not None:
            raise UserError(
                f"--{self.typed} has no effect: {method} has its own classification loss; drop one"
            )

    def begin_step(self, context: Context) -> None:
        """Build the criterion; the unbiased one needs old classes."""
        if self.kind == "bce":
            self.criterion = loss.BCEWithLogitsLossWithIgnoreIndex(reduction="none")
        elif self.kind == "focal":
            self.criterion = loss.FocalLoss(alpha=self.alpha, gamma=self.gamma, reduction="none")
        elif self.kind == "unce" and context.classes_old > 0:
            self.criterion = loss.UnbiasedCrossEntropy(old_cl=context.classes_old, reduction="none")
        else:
            self.criterion = torch.nn.CrossEntropyLoss(ignore_index=255, reduction="none")

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Mean over all pixels of the weighted loss map."""
        values = self.criterion(batch.outputs, batch.targets)
        if batch.pixel_weights is not None:
            values = values * batch.pixel_weights
        if batch.image_weights is not None:
            values = values * batch.image_weights[:, None, None]
        return {self.kind: values.mean()}
