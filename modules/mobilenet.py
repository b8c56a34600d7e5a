"""MobileNetV2 backbone: torchvision's, dilated to output stride 16 or 8.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
from torchvision.ops.misc import Conv2dNormActivation

from modules.branches import TwoBranches
from modules.checkpointing import run_stage
from modules.norm import NormAct

STAGE_ENDS = (3, 6, 13, 17)
"""Last block before the resolution halves (strides 4, 8, 16, 32 of the undilated network)."""
STAGE_STARTS = (7, 14)
"""Blocks that take the stride from 8 to 16 and from 16 to 32."""
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class AtrousDepthwiseConv2d(nn.Conv2d):
    """3×3 atrous depthwise convolution, padded by its dilation d, with stride 1.

    On the CPU the convolution library (oneDNN, torch 2.15) has no fast backward pass for dilated
    convolutions in bfloat16, nor in float32 without AVX-512. There each of the d×d grids of every d-th pixel
    is convolved undilated, as a separate image: the same products in a third of the time
    (docs/performance.md).
    """

    def forward(self, features: Tensor) -> Tensor:
        """B×C×h×w → B×C×h×w."""
        fast = not torch.is_autocast_enabled("cpu") and (_AVX512 or not torch.is_grad_enabled())
        if features.device.type != "cpu" or fast:
            return super().forward(features)
        d = self.dilation[0]
        height, width = features.shape[2:]
        maps = F.pad(features, (0, -width % d, 0, -height % d)).permute(0, 2, 3, 1)
        # B, rows of a grid, grid, columns of a grid, grid, C: the grids become images.
        maps = maps.unflatten(2, (-1, d)).unflatten(1, (-1, d)).permute(0, 2, 4, 5, 1, 3)
        grids = F.conv2d(maps.flatten(0, 2), self.weight, self.bias, padding=1, groups=self.groups)
        maps = grids.unflatten(0, (-1, d, d)).permute(0, 4, 1, 5, 2, 3).flatten(3, 4).flatten(1, 2)
        return maps.permute(0, 3, 1, 2)[:, :, :height, :width]


class TwoBranchDepthwise(TwoBranches):
    """A block's depthwise convolution ``0``, norm ``1`` and activation ``2``, with ``0_new`` and ``1_new``.

    Args:
        layer: torchvision's convolution, norm and activation; the second convolution has random weights.
        norm_act: norm layers and activations.
    """

    def __init__(self, layer: Conv2dNormActivation, norm_act: NormAct) -> None:
        super().__init__()
        self.add_module("0", layer[0])
        self.add_module("1", norm_act.plain(layer.out_channels))
        self.add_branch("0", "1")
        self.add_module("2", norm_act.after_sum() if norm_act.leaky else layer[2])
        nn.init.kaiming_normal_(self.get_parameter("0_new.weight"), mode="fan_out")

    def forward(self, features: Tensor) -> Tensor:
        """Both branches, mixed and activated."""
        return self.get_submodule("2")(self.mixed(features))


class MobileNetV2Backbone(MobileNetV2):
    """MobileNetV2 without its classifier; state dict keys are torchvision's.

    Includes the last 1×1 convolution, so that the features are activated, as SDR's losses on ``body`` expect.
    ``std`` and ``sync`` keep the network's ReLU6; the leaky kinds replace it.

    Args:
        norm_act: norm layers and activations.
        output_stride: 16 or 8.
        two_branches: with :class:`TwoBranchDepthwise`.

    Attributes:
        checkpointing: keep activations between stages only and recompute the others in the backward pass.
    """

    widths = (24, 32, 96, 320)
    out_channels = 1280
    checkpointing = False

    def __init__(self, norm_act: NormAct, output_stride: int, *, two_branches: bool = False) -> None:
        super().__init__(norm_layer=norm_act)
        del self.classifier
        for module in self.features.modules():
            if isinstance(module, InvertedResidual):
                module.conv[-1] = norm_act.plain(module.out_channels)
            elif isinstance(module, Conv2dNormActivation) and norm_act.leaky:
                module[2] = norm_act.activation()
        self._dilate(output_stride)
        for module in list(self.features.modules()) if two_branches else ():
            if isinstance(module, InvertedResidual):
                module.conv[-3] = TwoBranchDepthwise(module.conv[-3], norm_act)

    def _dilate(self, output_stride: int) -> None:
        """Replace strides beyond ``output_stride`` by dilation of the following blocks.

        A block whose stride is replaced has the dilation of the block before it, as in torchvision's ResNet:
        the features are those of the undilated network at more positions.
        """
        stride, dilation = 8, 1
        for index in range(STAGE_STARTS[0], STAGE_ENDS[-1] + 1):
            block, own = self.features[index].conv[1], dilation
            if index in STAGE_STARTS:
                if stride == output_stride:
                    block[0].stride = (1, 1)
                    dilation *= 2
                else:
                    stride *= 2
            if own > 1:
                block[0] = _atrous(block[0], own)

    def forward(
        self, images: Tensor, keep_stages: bool = False, keep_activated: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features of the last layer and optionally of the stages (linear bottlenecks, not activated).

        Args:
            images: B×3×H×W.
            keep_stages: whether to return the stages' features (for PLOP).
            keep_activated: the same, since no activation follows them (for RCIL).

        Returns:
            B×1280×h×w, h = H / output stride, and two lists of four tensors (24, 32, 96, 320 channels) or
            empty ones.
        """
        recompute = self.checkpointing and torch.is_grad_enabled()
        x = images
        stages: list[Tensor] = []
        for start, end in pairwise((-1, *STAGE_ENDS, len(self.features) - 1)):
            stage = self.features[start + 1 : end + 1]
            x = run_stage(stage, stage, x, recompute=recompute)
            if end in STAGE_ENDS:
                stages.append(x)
        return x, stages if keep_stages else [], stages if keep_activated else []


def _atrous(depthwise: nn.Conv2d, dilation: int) -> AtrousDepthwiseConv2d:
    """A dilated depthwise convolution of stride 1 with the same weights."""
    channels = depthwise.in_channels
    # Not initialised, so that no random numbers are drawn for weights that are replaced.
    atrous = nn.utils.skip_init(
        AtrousDepthwiseConv2d,
        channels,
        channels,
        3,
        padding=dilation,
        dilation=dilation,
        groups=channels,
        bias=False,
    )
    atrous.weight = depthwise.weight
    return atrous
