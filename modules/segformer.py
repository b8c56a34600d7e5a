"""SegFormer: the Mix Transformer (MiT) b0–b5 with SATS's decoder or the paper's.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS
2021 (arXiv 2105.15203); decoder of SATS: arXiv 2203.07667.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from modules.checkpointing import run_stage
from modules.network import Features, Network
from modules.norm import NormAct
from utils.errors import UserError

HIDDEN_CHANNELS = 256
MIN_SIZE = 32
"""Pixels per side below which the last stage has no features."""


@dataclass(frozen=True)
class MiTConfig:
    """Sizes of a Mix Transformer, per stage."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: int = 4


CONFIGS = {
    "segformer_b0": MiTConfig((2, 2, 2, 2), widths=(32, 64, 160, 256)),
    "segformer_b1": MiTConfig((2, 2, 2, 2)),
    "segformer_b2": MiTConfig((3, 4, 6, 3)),
    "segformer_b3": MiTConfig((3, 4, 18, 3)),
    "segformer_b4": MiTConfig((3, 8, 27, 3)),
    "segformer_b5": MiTConfig((3, 6, 40, 3)),
}


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """B×N×C → B×C×h×w, a view in channels-last memory."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def _to_tokens(features: Tensor) -> Tensor:
    """B×C×h×w → B×N×C, a view of channels-last memory."""
    return features.flatten(2).transpose(1, 2)


class PatchEmbedding(nn.Module):
    """Overlapping patch embedding: a strided convolution and a norm."""

    def __init__(self, in_channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """B×C×H×W → tokens B×N×C' and their grid (h, w)."""
        x = self.proj(x)
        return self.norm(_to_tokens(x)), (x.shape[2], x.shape[3])


class Attention(nn.Module):
    """Multi-head self-attention with spatially reduced keys and values (SegFormer, eq. 2)."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr: nn.Conv2d | None = None
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, size: tuple[int, int], keep_map: bool) -> tuple[Tensor, Tensor | None]:
        """Attention over tokens.

        Args:
            x: tokens B×L×C of a grid ``size``.
            size: (h, w), h·w = L.
            keep_map: return the attention map (slower and larger than the fused kernel).

        Returns:
            Tokens B×L×C, and the map B×heads×L×S after the softmax or None.
        """
        q = self._split_heads(self.q(x))
        if self.sr is not None:
            x = self.norm(_to_tokens(self.sr(_to_map(x, size))))
        k, v = (self._split_heads(part) for part in self.kv(x).chunk(2, dim=-1))
        if keep_map:
            attention = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)
            out = attention.to(v.dtype) @ v
        else:
            attention = None
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2)), attention

    def _split_heads(self, x: Tensor) -> Tensor:
        """B×N×C → B×heads×N×C/heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """3×3 depth-wise convolution over tokens; its zero padding provides positional information."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens B×N×C of a grid ``size`` → B×N×C."""
        return _to_tokens(self.dwconv(_to_map(x, size)))


class MixMLP(nn.Module):
    """Mix-FFN (SegFormer, eq. 3): linear, depth-wise convolution, GELU, linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.dwconv = DepthwiseConv(ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens B×N×C of a grid ``size`` → B×N×C."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), size)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth per image."""

    def __init__(self, width: int, heads: int, reduction: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MixMLP(width, mlp_ratio)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, size: tuple[int, int], keep_map: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens B×L×C of a grid ``size`` → B×L×C, and the attention map B×heads×L×S or None."""
        attended, attention = self.attn(self.norm1(x), size, keep_map)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x), size)), attention


class MixTransformer(nn.Module):
    """Hierarchical transformer encoder with features at strides 4, 8, 16 and 32.

    Parameters are named as in NVlabs' ``mit_b*.pth``. All layer norms have eps 1e-5, as in ``transformers``
    (in NVlabs' code some have 1e-6).

    Args:
        config: sizes.
        drop_path: drop probability of the last block's branches; decreases linearly to the first block.

    Attributes:
        checkpointing: keep activations between stages only and recompute the others in the backward pass.
    """

    checkpointing = False

    def __init__(self, config: MiTConfig, drop_path: float = 0.1) -> None:
        super().__init__()
        self.widths = config.widths
        self.out_channels = config.widths[-1]
        last = max(sum(config.depths) - 1, 1)
        rates = (drop_path * index / last for index in range(sum(config.depths)))
        in_channels = 3
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            blocks = [
                Block(width, config.heads[i], config.reductions[i], config.mlp_ratio, next(rates))
                for _ in range(depth)
            ]
            self.add_module(f"patch_embed{i + 1}", PatchEmbedding(in_channels, width, kernel, stride))
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(width))
            in_channels = width
        self.apply(_init_weights)

    def forward(self, images: Tensor, keep_maps: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the features of all stages.

        Args:
            images: B×3×H×W, at least 32×32.
            keep_maps: whether to return the attention maps of each stage's last block (SATS).

        Returns:
            Four feature maps B×C_i×h_i×w_i, and four maps B×heads×L×S after the softmax or none.
        """
        recompute = self.checkpointing and torch.is_grad_enabled()
        x = images
        features: list[Tensor] = []
        maps: list[Tensor] = []
        for i in range(1, len(self.widths) + 1):
            x, attention = run_stage(self._stage, self, i, x, keep_maps, recompute=recompute)
            if attention is not None:
                maps.append(attention)
            features.append(x)
        return features, maps

    def _stage(self, i: int, x: Tensor, keep_map: bool) -> tuple[Tensor, Tensor | None]:
        """Features B×C×h×w of stage ``i`` (from 1), and the attention map of its last block or None."""
        tokens, size = self.get_submodule(f"patch_embed{i}")(x)
        *blocks, last = self.get_submodule(f"block{i}").children()
        for block in blocks:
            tokens, _ = block(tokens, size, keep_map=False)
        tokens, attention = last(tokens, size, keep_map=keep_map)
        return _to_map(self.get_submodule(f"norm{i}")(tokens), size), attention


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Decoder(nn.Module):
    """Per stage a 1×1 projection to 256 channels and upsampling to stride 4; concatenation; 1×1 fusion.

    Args:
        widths: channels of the stages.
        mode: of the upsampling, ``nearest`` or ``bilinear``.
        fuse_bias: whether the fusion has a bias.
    """

    out_channels = HIDDEN_CHANNELS

    def __init__(self, widths: tuple[int, ...], mode: str, fuse_bias: bool) -> None:
        super().__init__()
        self.mode = mode
        self.project = nn.ModuleList(nn.Conv2d(width, HIDDEN_CHANNELS, 1) for width in widths)
        self.fuse = nn.Conv2d(HIDDEN_CHANNELS * len(widths), HIDDEN_CHANNELS, 1, bias=fuse_bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Four maps B×C_i×h_i×w_i → B×256×h_1×w_1.

        The fusion is linear per position, so each stage's part of it runs before the upsampling: the same sum
        without 1024 channels at stride 4.
        """
        size = features[0].shape[2:]
        shares = self.fuse.weight.chunk(len(self.project), dim=1)
        fused = None
        for feature, project, share in zip(features, self.project, shares, strict=True):
            bias = self.fuse.bias if fused is None else None
            part = F.conv2d(project(feature), share, bias)
            if part.shape[2:] != size:
                align = False if self.mode == "bilinear" else None
                part = F.interpolate(part, size=size, mode=self.mode, align_corners=align)
            fused = part if fused is None else fused + part
        assert fused is not None
        return fused


class LinearDecoder(Decoder):
    """Decoder of SATS: linear throughout, nearest-neighbour upsampling."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(widths, mode="nearest", fuse_bias=True)


class AllMLPHead(Decoder):
    """Decoder of the SegFormer paper: bilinear upsampling; norm, ReLU and dropout 0.1 after the fusion.

    The norm is batch norm, synchronised if possible, independent of ``--norm_act``.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(widths, mode="bilinear", fuse_bias=False)
        norm_act = NormAct("sync")
        self.norm = norm_act(HIDDEN_CHANNELS)
        self.activation = norm_act.activation()
        self.dropout = nn.Dropout2d(0.1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Four maps B×C_i×h_i×w_i → B×256×h_1×w_1."""
        return self.dropout(self.activation(self.norm(super().forward(features))))


DECODERS: dict[str, type[LinearDecoder] | type[AllMLPHead]] = {"sats": LinearDecoder, "segformer": AllMLPHead}


class SegFormer(Network):
    """Mix Transformer and a decoder at stride 4.

    Args:
        config: sizes of the Mix Transformer.
        decoder: ``sats`` or ``segformer``.
        drop_path: largest stochastic depth rate.
        checkpointing: see :class:`MixTransformer`.

    Raises:
        UserError: unknown decoder.
    """

    intermediates = frozenset({"body", "pre_logits", "attentions", "self_attention"})

    def __init__(
        self,
        config: MiTConfig,
        decoder: str = "sats",
        drop_path: float = 0.1,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise UserError(f"--decoder {decoder}: unknown, choose one of {', '.join(DECODERS)}")
        self.body = MixTransformer(config, drop_path)
        self.body.checkpointing = checkpointing
        self.head = DECODERS[decoder](config.widths)
        self.out_channels = HIDDEN_CHANNELS
        self.backbone_channels = config.widths[-1]

    def forward(self, images: Tensor, needs: frozenset[str] = frozenset()) -> tuple[Tensor, Features]:
        """Run backbone and head.

        Args:
            images: B×3×H×W, normalised, at least 32×32.
            needs: from ``body`` (the last stage's feature map), ``pre_logits``, ``attentions`` (the four
                stages' feature maps, then ``pre_logits``) and ``self_attention`` (of each stage's last
                block, after the softmax, B×heads×L×S).

        Returns:
            ``pre_logits`` B×256×H/4×W/4 and the intermediates named in ``needs``.

        Raises:
            UserError: ``needs`` contains another name, or the images are too small.
        """
        self.check_needs(needs)
        if min(images.shape[2:]) < MIN_SIZE:
            height, width = images.shape[2:]
            raise UserError(
                f"SegFormer needs images of {MIN_SIZE}×{MIN_SIZE} pixels at least, got {height}×{width}: "
                "enlarge or pad them"
            )
        features, maps = self.body(images, keep_maps="self_attention" in needs)
        pre_logits = self.head(features)
        found: Features = {
            "body": features[-1],
            "pre_logits": pre_logits,
            "attentions": [*features, pre_logits],
            "self_attention": maps,
        }
        return pre_logits, {name: found[name] for name in needs}
