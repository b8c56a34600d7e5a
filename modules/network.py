"""What every network has in common: its sizes, and intermediates that are handed out by name."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from utils.errors import UserError

Features = dict[str, Tensor | list[Tensor]]


class Network(nn.Module):
    """A body (backbone) and a head.

    ``forward(images, needs)`` takes B×3×H×W and returns ``pre_logits`` B×256×h×w and those intermediates
    that ``needs`` names; others are neither computed nor kept.
    """

    intermediates: ClassVar[frozenset[str]]
    """Names that ``needs`` may hold."""
    out_channels: int
    """Channels of ``pre_logits``."""
    backbone_channels: int
    """Channels of the intermediate ``body``."""
    body: nn.Module
    head: nn.Module

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raise a UserError where ``needs`` names what this network does not have."""
        if unknown := needs - self.intermediates:
            raise UserError(
                f"{type(self).__name__} has no intermediate {', '.join(sorted(unknown))} "
                f"(it has {', '.join(sorted(self.intermediates))}): choose another --model or --method"
            )
