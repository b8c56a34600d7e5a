"""DeepLab head of the released programs of DKD and STAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from modules.deeplab import ASPP_DILATIONS, HIDDEN_CHANNELS, ASPPHead
from modules.norm import NormAct


class DKDHead(ASPPHead):
    """The ASPP head with a 3×3 convolution, norm and activation after it (``last_conv``).

    Parameters are named as in the released code below ``aspp.``.

    Args:
        in_channels: channels of the backbone's features.
        channels: output channels of every branch and of the head.
        rates: dilations of the three 3×3 branches.
        norm_act: norm layers and activations; default: BatchNorm and ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = HIDDEN_CHANNELS,
        rates: Sequence[int] = ASPP_DILATIONS[16],
        norm_act: NormAct | None = None,
    ) -> None:
        norm_act = norm_act or NormAct("std")
        super().__init__(in_channels, norm_act, rates, channels)
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        self.last_conv = nn.Sequential(convolution, norm_act(channels), norm_act.activation())

    def forward(self, features: Tensor) -> Tensor:
        """B×D×h×w → B×channels×h×w, activated."""
        return self.last_conv(super().forward(features))
