"""Base class of the networks: sizes, and intermediates by name."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from utils.errors import UserError

Features = dict[str, Tensor | list[Tensor]]


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

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raise a UserError if ``needs`` contains a name that is not in ``intermediates``."""
        if unknown := needs - self.intermediates:
            raise UserError(
                f"{type(self).__name__} has no intermediate {', '.join(sorted(unknown))} "
                f"(it has {', '.join(sorted(self.intermediates))}): choose another --model or --method"
            )
