"""ResNet backbones: torchvision's ResNet-50 and ResNet-101, dilated to output stride 16 or 8.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from modules.branches import TwoBranches
from modules.checkpointing import run_stage
from modules.norm import NormAct, norm_layers

RELEASED_MOMENTUM = 3e-4  # of the running statistics, in SDR's program
LAYERS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}


class ResidualBlock(Bottleneck):
    """torchvision's bottleneck with the activation of ``norm_layer``, and access to the residual sum."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Sequential | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Any = None,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        self.bn3 = norm_layer.plain(self.conv3.out_channels)
        if self.downsample is not None:
            self.downsample[1] = norm_layer.plain(self.conv3.out_channels)
        self.activation = norm_layer.activation()
        self.relu = norm_layer.after_sum()
        self.norm_act: NormAct = norm_layer
        self.width = self.conv2.out_channels

    def spatial(self, x: Tensor) -> Tensor:
        """The 3×3 convolution, its norm and activation."""
        return self.activation(self.bn2(self.conv2(x)))

    def residual_sum(self, x: Tensor) -> Tensor:
        """B×C×H×W → B×4P×H'×W', without the last activation."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.spatial(x)
        # Not in place: the in-place norms need their output in the backward pass.
        return self.bn3(self.conv3(x)) + shortcut

    def forward(self, x: Tensor) -> Tensor:
        """B×C×H×W → B×4P×H'×W'."""
        return self.relu(self.residual_sum(x))


class TwoBranchBlock(ResidualBlock, TwoBranches):
    """A bottleneck with a second 3×3 convolution and norm, ``conv2_new`` and ``bn2_new``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bn2 = self.norm_act.plain(self.width)
        self.add_branch("conv2", "bn2")

    def spatial(self, x: Tensor) -> Tensor:
        """Both branches, mixed and activated."""
        return self.relu(self.mixed(x))


class ResNetBackbone(ResNet):
    """ResNet without pooling and classifier; state dict keys are torchvision's.

    Stride 16 dilates the last stage by 2, stride 8 the last two by 2 and 4. With ``std`` and ``sync`` the
    first block of a dilated stage has the previous stage's dilation (torchvision's
    ``replace_stride_with_dilation``: the values of the undilated network at more positions); with the leaky
    kinds it has its stage's, as in MiB, PLOP and SDR.

    Args:
        backbone: ``resnet50`` or ``resnet101``.
        norm_act: norm layers and activations.
        output_stride: 16 or 8.
        released: as in SDR's program: the stage's dilation from its first block on, in ResNet-50's last
            stage 1, 2, 1 times 16 / stride, and a momentum of 3e-4 of the running statistics.
        two_branches: with :class:`TwoBranchBlock`.

    Attributes:
        checkpointing: keep activations between stages only and recompute the others in the backward pass.
    """

    widths = (256, 512, 1024, 2048)
    out_channels = 2048
    checkpointing = False

    def __init__(
        self,
        backbone: str,
        norm_act: NormAct,
        output_stride: int,
        *,
        released: bool = False,
        two_branches: bool = False,
    ) -> None:
        dilate = [False, output_stride == 8, True]
        super().__init__(
            TwoBranchBlock if two_branches else ResidualBlock,
            LAYERS[backbone],
            replace_stride_with_dilation=dilate,
            norm_layer=norm_act,
        )
        del self.avgpool, self.fc
        self.relu = norm_act.activation()
        if norm_act.leaky or released:
            for stage in (self.layer3, self.layer4):
                for name in ("conv2", "conv2_new") if two_branches else ("conv2",):
                    convolution = getattr(stage[0], name)
                    convolution.dilation = convolution.padding = stage[1].conv2.dilation
        if released:
            if backbone == "resnet50":
                for block, factor in zip(self.layer4, (1, 2, 1), strict=True):
                    block.conv2.dilation = block.conv2.padding = (factor * 16 // output_stride,) * 2
            for norm in norm_layers(self):
                norm.momentum = RELEASED_MOMENTUM  # type: ignore[assignment]

    def forward(
        self, images: Tensor, keep_stages: bool = False, keep_activated: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features of the last stage, and optionally of all four stages.

        Args:
            images: B×3×H×W.
            keep_stages: whether to return the stages' features before their last activation (for PLOP).
            keep_activated: whether to return those after it (for RCIL).

        Returns:
            B×2048×h×w, h = H / output stride, and two lists of four tensors (256, 512, 1024, 2048 channels)
            or empty ones.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        recompute = self.checkpointing and torch.is_grad_enabled()
        stages: list[Tensor] = []
        activated: list[Tensor] = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_stage(_residual_sum, stage, stage, x, recompute=recompute)
            if keep_stages:
                stages.append(x)
                x = x.clone()  # the activation overwrites its input
            x = stage[-1].relu(x)
            if keep_activated:
                activated.append(x)
        return x, stages, activated


def _residual_sum(stage: nn.Sequential, x: Tensor) -> Tensor:
    """A stage's features before their last activation."""
    *blocks, last = stage
    for block in blocks:
        x = block(x)
    return cast(ResidualBlock, last).residual_sum(x)
