"""Base class of the networks: sizes, and intermediates by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from utils.errors import UserError

Features = dict[str, Tensor | list[Tensor]]
M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Freeze a module: no gradients, and it stays in evaluation mode (norm layers, dropout)."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.frozen = True  # type: ignore[assignment]  # read by IncrementalSegmentationModule.train
    return module


class Network(nn.Module):
    """A backbone (``body``) and a head.

    ``forward(images, needs)``: B×3×H×W → ``pre_logits`` B×256×h×w and the intermediates named in ``needs``;
    others are not computed.
    """

    intermediates: ClassVar[frozenset[str]]
    """Names that ``needs`` may contain."""
    out_channels: int
    """Channels of ``pre_logits``."""
    backbone_channels: int
    """Channels of the intermediate ``body``."""
    body: nn.Module
    head: nn.Module

    @classmethod
    def check_needs(cls, needs: frozenset[str]) -> None:
        """Raise a UserError if ``needs`` contains a name that is not in ``intermediates``."""
        if unknown := needs - cls.intermediates:
            raise UserError(
                f"the network has no {', '.join(sorted(unknown))}, which the method needs "
                f"(it has {', '.join(sorted(cls.intermediates))}): choose another --model or --method, or "
                "correct the needs of your own"
            )

    def from_previous(self, state: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
        """The previous step's weights as those with which this step's network starts; by default the same.

        Args:
            state: its weights are named with ``prefix``.
            prefix: of this network's weights.
        """
        return state
