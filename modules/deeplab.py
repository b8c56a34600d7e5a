"""DeepLabV3: a dilated backbone and the ASPP head of MiB, SDR and PLOP, or of SSUL.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017 (arXiv 1706.05587).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.branches import SECOND, TwoBranches, merge_branches
from modules.network import Features, Network
from modules.norm import NormAct

HIDDEN_CHANNELS = 256
DILATIONS = {16: (6, 12, 18), 8: (12, 24, 32)}  # of DeepLabHead
ASPP_DILATIONS = {16: (6, 12, 18), 8: (12, 24, 36)}
ASPP_DROPOUT = 0.1


class AtrousConv2d(nn.Conv2d):
    """3×3 atrous convolution, padded by its dilation, without taps that only see padding.

    On maps no larger than the dilation (small crops) the outer taps only multiply zeros: without them values
    and gradients are the same, for as little as a ninth of the work.
    """

    def forward(self, features: Tensor) -> Tensor:
        """B×C×h×w → B×D×h×w."""
        taps, padding = [], []
        for size, dilation in zip(features.shape[2:], self.dilation, strict=True):
            inner = size <= dilation
            taps.append(slice(1, 2) if inner else slice(None))
            padding.append(0 if inner else dilation)
        weight = self.weight[:, :, taps[0], taps[1]]
        return F.conv2d(features, weight, self.bias, self.stride, padding, self.dilation)


class DeepLabHead(nn.Module):
    """Atrous spatial pyramid pooling with one norm over all branches and an added global pooling branch.

    Global average pooling in training. In evaluation an average over a window of ``pooling``×``pooling``
    features around each position (stride 1, replicated border), so that large images are pooled over the
    size of a training crop; with ``pooling`` 0 the global average.

    Parameters are named as in the released code of MiB and PLOP.

    Args:
        in_channels: channels of the backbone's features.
        norm_act: norm layers and activations.
        output_stride: of the backbone, 16 or 8; sets the dilations (6, 12, 18) or (12, 24, 32).
        pooling: window of the evaluation pooling, in features; 0 for all.
        released: as in SDR's program: torch's initialisation, and no activations after the norms.
    """

    out_channels = HIDDEN_CHANNELS

    def __init__(
        self,
        in_channels: int,
        norm_act: NormAct,
        output_stride: int = 16,
        pooling: int = 32,
        *,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        width = HIDDEN_CHANNELS
        branches = [nn.Conv2d(in_channels, width, 1, bias=False)]
        for d in DILATIONS[output_stride]:
            branches.append(AtrousConv2d(in_channels, width, 3, padding=d, dilation=d, bias=False))
        self.map_convs = nn.ModuleList(branches)
        self.map_bn = norm_act(width * len(branches))
        self.red_conv = nn.Conv2d(width * len(branches), width, 1, bias=False)
        self.global_pooling_conv = nn.Conv2d(in_channels, width, 1, bias=False)
        self.global_pooling_bn = norm_act(width)
        self.pool_red_conv = nn.Conv2d(width, width, 1, bias=False)
        self.red_bn = norm_act(width)
        self.activation = nn.Identity() if released else norm_act.activation()
        for module in () if released else self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, norm_act.gain)

    def maps(self, features: Tensor) -> Tensor:
        """The four branches, B×D×h×w → B×1024×h×w, activated (unless ``released``)."""
        maps = torch.cat([conv(features) for conv in self.map_convs], dim=1)
        return self.activation(self.map_bn(maps))

    def forward(self, features: Tensor) -> Tensor:
        """B×D×h×w → B×256×h×w, activated (unless ``released``)."""
        maps = self.red_conv(self.maps(features))
        pooled, padding = self._pool(features)
        pooled = self.activation(self.global_pooling_bn(self.global_pooling_conv(pooled)))
        pooled = self.pool_red_conv(pooled)
        if padding is not None:
            # After the 1×1 layers instead of before: the same values from fewer positions.
            pooled = F.pad(pooled, padding, mode="replicate")
            if (lowered := self.pool_red_conv.weight.dtype) != torch.float32:
                pooled = pooled.to(lowered)  # O3: autocast on the CPU pads in float32, which the norm refuses
        return self.activation(self.red_bn(maps + pooled))

    def _pool(self, features: Tensor) -> tuple[Tensor, list[int] | None]:
        """Pooled features, and the padding (left, right, top, bottom) that restores their size."""
        if self.training or self.pooling == 0:
            return features.mean((2, 3), keepdim=True), None
        height, width = (min(self.pooling, size) for size in features.shape[2:])
        padding = [(width - 1) // 2, width // 2, (height - 1) // 2, height // 2]
        return F.avg_pool2d(features, (height, width), stride=1), padding


class TwoBranchHead(DeepLabHead, TwoBranches):
    """:class:`DeepLabHead` with second maps and a second norm, ``map_convs_new`` and ``map_bn_new``."""

    def __init__(self, in_channels: int, norm_act: NormAct, *args: Any) -> None:
        super().__init__(in_channels, norm_act, *args)
        self.map_bn = norm_act.plain(self.red_conv.in_channels)
        self.add_branch("map_convs", "map_bn")
        for convolution in self.convolutions(SECOND).values():
            nn.init.xavier_normal_(convolution.weight, norm_act.gain)
        self.after_mix = norm_act.after_sum()

    def maps(self, features: Tensor) -> Tensor:
        """Both branches, mixed and activated, B×D×h×w → B×1024×h×w."""
        return self.after_mix(self.mixed(features))


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling as in the DeepLabV3 paper, in SSUL and in torchvision.

    Five branches (1×1, three 3×3 atrous, global average pooling), each with a norm, concatenated, then 1×1,
    norm and dropout. The pooling is global in evaluation too.

    Parameters are named as in the released code of SSUL and in torchvision.

    Args:
        in_channels: channels of the backbone's features.
        norm_act: norm layers and activations.
        dilations: of the three 3×3 branches (``ASPP_DILATIONS`` by output stride).
        width: output channels of every branch and of the head.
    """

    def __init__(
        self,
        in_channels: int,
        norm_act: NormAct,
        dilations: Sequence[int] = ASPP_DILATIONS[16],
        width: int = HIDDEN_CHANNELS,
    ) -> None:
        super().__init__()
        self.out_channels = width

        def normed(*layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(*layers, norm_act(width), norm_act.activation())

        branches = [normed(nn.Conv2d(in_channels, width, 1, bias=False))]
        for d in dilations:
            branches.append(normed(AtrousConv2d(in_channels, width, 3, padding=d, dilation=d, bias=False)))
        branches.append(normed(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, width, 1, bias=False)))
        self.convs = nn.ModuleList(branches)
        self.project = normed(nn.Conv2d(width * len(branches), width, 1, bias=False))
        self.project.append(nn.Dropout(ASPP_DROPOUT))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, features: Tensor) -> Tensor:
        """B×D×h×w → B×256×h×w, activated."""
        *maps, pooled = (branch(features) for branch in self.convs)
        return self.project(torch.cat([*maps, pooled.expand_as(maps[0])], dim=1))


HEADS = ("mib", "aspp", "dkd")


class DeepLabV3(Network):
    """A dilated backbone and one of the ``HEADS``, or a head over all stages (``--model mlp``).

    Args:
        body: the backbone; returns features B×D×h×w and lists of its stages', with ``keep_stages`` before
            their last activation and with ``keep_activated`` after it; has ``out_channels``.
        head: B×D×h×w → B×256×h×w; has ``out_channels``.
        over_stages: the head maps the list of the activated stages' features instead.
    """

    intermediates = frozenset({"body", "pre_logits", "attentions", "stages"})

    def __init__(self, body: Any, head: Any, *, over_stages: bool = False) -> None:
        super().__init__()
        self.over_stages = over_stages
        self.body = body
        self.head = head
        self.out_channels = int(head.out_channels)
        self.backbone_channels = int(body.out_channels)

    def forward(self, images: Tensor, needs: frozenset[str] = frozenset()) -> tuple[Tensor, Features]:
        """Run backbone and head.

        Args:
            images: B×3×H×W, normalised.
            needs: from ``body`` (last stage's features, activated), ``pre_logits`` and ``attentions`` (PLOP's
                layers: the four stages' features before their last activation, then ``pre_logits``) and
                ``stages`` (RCIL's: the four stages' features after it).

        Returns:
            ``pre_logits`` B×256×h×w and the intermediates named in ``needs``.

        Raises:
            UserError: ``needs`` contains another name.
        """
        self.check_needs(needs)
        features, stages, activated = self.body(
            images,
            keep_stages="attentions" in needs,
            keep_activated="stages" in needs or self.over_stages,
        )
        pre_logits = self.head(activated if self.over_stages else features)
        found: Features = {
            "body": features,
            "pre_logits": pre_logits,
            "attentions": [*stages, pre_logits],
            "stages": activated,
        }
        return pre_logits, {name: found[name] for name in needs}

    def from_previous(self, state: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
        """The previous step's weights, two branches merged."""
        return merge_branches(self, state, prefix)
