"""Checkpoints with the names, shapes and entries of the released ones, and the networks that they belong to.

The networks are functions of the weights under their released names, in evaluation mode; nothing is shared
with the code under test. ``golden/released_checkpoints.json.gz`` has the names, as built by the released
programs for VOC 15-5, step 1.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from golden_files import GOLDEN
from torch import Tensor
from torch.nn import functional as F


@cache
def _file() -> dict[str, Any]:
    return dict(json.loads(gzip.decompress((GOLDEN / "released_checkpoints.json.gz").read_bytes())))


def programs() -> list[str]:
    return list(_file()["programs"])


def shapes(program: str) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and type of each weight of a program's checkpoint."""
    state = _file()["states"][_file()["programs"][program]["state"]]
    return {name: (shape, getattr(torch, kind)) for name, (shape, kind) in state.items()}


def checkpoint(program: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Content of a program's file around the weights; of the rest only what may be in the way is filled."""
    entries = _file()["programs"][program]
    return {name: 29 if name == "epoch" else {} for name in entries["top_level"]} | {
        entries["state_under"]: state
    }


def draw(program: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that keep the size of the features about the same from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (shape, kind) in shapes(program).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            values = 1 + 0.1 * values.abs()
        elif len(shape) > 1:
            values /= (values.numel() / shape[0]) ** 0.5
        elif name.endswith("weight"):
            values = 0.8 + 0.2 * values
        else:
            values *= 0.1
        state[name] = values.to(kind)
    return state


def centre(state: dict[str, Tensor], logits: Tensor) -> None:
    """Change the classifiers' biases by the means of their logits, so that several classes win somewhere."""
    names = [
        name
        for name in state
        if re.fullmatch(r"(?:module\.)?cls\.\d+\.bias|classifier\.head\.\d+\.3\.bias", name)
    ]
    means = logits.mean((0, 2, 3)).split([len(state[name]) for name in names])
    for name, mean in zip(names, means, strict=True):
        summed = name in ("classifier.head.0.3.bias", "classifier.head.1.3.bias")  # two sigmoids
        state[name] = state[name] - mean - float(summed)


@dataclass
class Released:
    """Layers by their names in a checkpoint; the prefix ``module.`` may be left out."""

    weights: Mapping[str, Tensor]
    in_place: bool = False  # in-place ABN: scales by |weight| + eps; leaky ReLU

    def get(self, name: str) -> Tensor | None:
        return self.weights.get(name, self.weights.get(f"module.{name}"))

    def __getitem__(self, name: str) -> Tensor:
        found = self.get(name)
        assert found is not None, name
        return found

    def conv(self, name: str, x: Tensor, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> Tensor:
        weight = self[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.get(f"{name}.bias"), stride, padding, dilation, groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            self[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight.abs() + 1e-5 if self.in_place else weight
        return (x - mean) / (var + 1e-5).sqrt() * scale + bias

    def act(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.01) if self.in_place else F.relu(x)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def classifiers(self, x: Tensor) -> Tensor:
        count = next(k for k in range(99) if self.get(f"cls.{k}.weight") is None)
        return torch.cat([self.conv(f"cls.{k}", x) for k in range(count)], dim=1)


def resnet101(net: Released, x: Tensor, body: str, *, first_dilation: int = 2) -> Tensor:
    """B×3×H×W → B×2048×H/16×W/16, with one branch or RCIL's two, whose mean counts.

    ``first_dilation``: of the last stage's first block.
    """
    mods = net.get(f"{body}.mod1.conv1.weight") is not None
    stem = f"{body}.mod1" if mods else body
    x = net.act(net.norm(f"{stem}.bn1", net.conv(f"{stem}.conv1", x, stride=2)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 4, 23, 3)):
        for number in range(blocks):
            block = (
                f"{body}.mod{stage + 2}.block{number + 1}" if mods else f"{body}.layer{stage + 1}.{number}"
            )
            layers = f"{block}.convs" if mods else block
            shortcut = ("proj_conv", "proj_bn") if mods else ("downsample.0", "downsample.1")
            stride = 2 if stage in (1, 2) and number == 0 else 1
            dilation = (2 if number else first_dilation) if stage == 3 else 1
            y = net.act(net.norm(f"{layers}.bn1", net.conv(f"{layers}.conv1", x)))
            branches = [s for s in ("", "_new") if net.get(f"{layers}.conv2{s}.weight") is not None]
            maps = [net.conv(f"{layers}.conv2{s}", y, stride=stride, dilation=dilation) for s in branches]
            y = sum(net.norm(f"{layers}.bn2{s}", m) for s, m in zip(branches, maps, strict=True)) / len(maps)
            y = net.norm(f"{layers}.bn3", net.conv(f"{layers}.conv3", net.act(y)))
            if number == 0:
                x = net.norm(f"{block}.{shortcut[1]}", net.conv(f"{block}.{shortcut[0]}", x, stride=stride))
            x = net.act(x + y)
    return x


def mib_head(net: Released, x: Tensor, *, activated: bool = True) -> Tensor:
    """On maps of at most 32×32, whose pooling window is the whole map."""
    act = net.act if activated else torch.clone
    branches = [s for s in ("", "_new") if net.get(f"head.map_bn{s}.weight") is not None]
    maps = [
        [net.conv(f"head.map_convs{s}.{i}", x, dilation=d) for i, d in enumerate((1, 6, 12, 18))]
        for s in branches
    ]
    normed = [net.norm(f"head.map_bn{s}", torch.cat(m, dim=1)) for s, m in zip(branches, maps, strict=True)]
    y = net.conv("head.red_conv", act(sum(normed) / len(normed)))
    pooled = net.conv("head.global_pooling_conv", x.mean((2, 3), keepdim=True))
    y = y + net.conv("head.pool_red_conv", act(net.norm("head.global_pooling_bn", pooled)))
    return act(net.norm("head.red_bn", y))


def aspp_head(net: Released, x: Tensor, name: str) -> Tensor:
    maps = [
        net.act(net.norm(f"{name}.convs.{i}.1", net.conv(f"{name}.convs.{i}.0", x, dilation=d)))
        for i, d in enumerate((1, 6, 12, 18))
    ]
    pooled = net.conv(f"{name}.convs.4.1", x.mean((2, 3), keepdim=True))
    maps.append(net.act(net.norm(f"{name}.convs.4.2", pooled)).expand_as(maps[0]))
    return net.act(net.norm(f"{name}.project.1", net.conv(f"{name}.project.0", torch.cat(maps, dim=1))))


def segformer_b2(net: Released, x: Tensor) -> Tensor:
    """Mix Transformer and the linear decoder: B×3×H×W → B×256×H/4×W/4."""
    stages = []
    for stage, (depth, heads, reduction) in enumerate(((3, 1, 8), (4, 2, 4), (6, 5, 2), (3, 8, 1)), start=1):
        x = net.conv(f"body.mit.patch_embed{stage}.proj", x, stride=2 if stage > 1 else 4)
        height, width = x.shape[2:]

        def to_map(tokens: Tensor, size: tuple[int, int] = (height, width)) -> Tensor:
            return tokens.transpose(1, 2).unflatten(2, size)

        def to_tokens(features: Tensor) -> Tensor:
            return features.flatten(2).transpose(1, 2)

        tokens = net.layer_norm(f"body.mit.patch_embed{stage}.norm", to_tokens(x))
        for number in range(depth):
            block = f"body.mit.block{stage}.{number}"
            y = source = net.layer_norm(f"{block}.norm1", tokens)
            if reduction > 1:
                weight, bias = net[f"{block}.attn.sr.weight"], net[f"{block}.attn.sr.bias"]
                reduced = F.conv2d(to_map(y), weight, bias, stride=reduction)
                source = net.layer_norm(f"{block}.attn.norm", to_tokens(reduced))
            key, value = net.linear(f"{block}.attn.kv", source).chunk(2, dim=2)
            query, key, value = (
                part.unflatten(2, (heads, -1)).transpose(1, 2)
                for part in (net.linear(f"{block}.attn.q", y), key, value)
            )
            attention = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3)
            tokens = tokens + net.linear(f"{block}.attn.proj", (attention @ value).transpose(1, 2).flatten(2))
            y = net.linear(f"{block}.mlp.fc1", net.layer_norm(f"{block}.norm2", tokens))
            y = to_tokens(net.conv(f"{block}.mlp.dwconv.dwconv", to_map(y), groups=y.shape[2]))
            tokens = tokens + net.linear(f"{block}.mlp.fc2", F.gelu(y))
        x = to_map(net.layer_norm(f"body.mit.norm{stage}", tokens))
        stages.append(net.conv(f"head.to_fused.{stage - 1}.0", x))
    large = [F.interpolate(maps, size=stages[0].shape[2:]) for maps in stages]
    return net.conv("head.to_segmentation", torch.cat(large, dim=1))


def in_place_logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """MiB, PLOP and its forks; SDR on a server."""
    net = Released(state, in_place=True)
    return net.classifiers(mib_head(net, resnet101(net, images, "body")))


def sdr_logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """SDR with PyTorch's ResNet."""
    net = Released(state)
    return net.classifiers(mib_head(net, resnet101(net, images, "body"), activated=False))


def sats_logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    net = Released(state)
    return net.classifiers(segformer_b2(net, images))


def ssul_logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Unknown, background, then the classes, as in the released program."""
    net = Released(state)
    x = aspp_head(net, resnet101(net, images, "backbone", first_dilation=1), "classifier.aspp")
    heads = [f"classifier.head.{k}" for k in range(4)]
    hidden = [net.act(net.norm(f"{head}.1", net.conv(f"{head}.0", x))) for head in heads]
    return torch.cat([net.conv(f"{head}.3", maps) for head, maps in zip(heads, hidden, strict=True)], dim=1)


def dkd_logits(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """DKD: the auxiliary channel, then the classes without the background; STAR: the latter alone."""
    net = Released(state)
    x = aspp_head(net, resnet101(net, images, "backbone", first_dilation=1), "aspp")
    return net.classifiers(net.act(net.norm("aspp.last_conv.1", net.conv("aspp.last_conv.0", x))))


def decide(logits: Tensor) -> Tensor:
    """Scores whose argmax is the prediction: the logits."""
    return logits


def decide_ssul(logits: Tensor) -> Tensor:
    """Sigmoids; the unknown class's is added to the background's."""
    unknown, rest = logits.sigmoid().split([1, logits.shape[1] - 1], dim=1)
    return torch.cat([rest[:, :1] + unknown, rest[:, 1:]], dim=1)


def decide_dkd(logits: Tensor) -> Tensor:
    """The background where no logit of a class, from channel 1 on, is above 0."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, 1:]], dim=1)


def decide_star(logits: Tensor) -> Tensor:
    """The background where no logit is above 0."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)


# How a user names each network, and what it computes: small logits, and scores of the resized logits.
_IN_PLACE = "--norm_act iabn_sync_test"
NETWORKS: dict[str, tuple[str, Any, Any]] = {
    "DFT": (f"--method DFT {_IN_PLACE}", in_place_logits, decide),
    "EWF": (f"--method PLOP {_IN_PLACE}", in_place_logits, decide),
    "LGKD": (f"--method PLOP {_IN_PLACE}", in_place_logits, decide),
    "MiB": (f"--method MIB {_IN_PLACE}", in_place_logits, decide),
    "NeST": (f"--method PLOP {_IN_PLACE}", in_place_logits, decide),
    "PLOP": (f"--method PLOP {_IN_PLACE}", in_place_logits, decide),
    "SDR": (f"--method SDR {_IN_PLACE}", in_place_logits, decide),
    "SDR_net_pytorch": ("--method SDR --fidelity released", sdr_logits, decide),
    "SATS": ("--method SATS --model segformer_b2", sats_logits, decide),
    "RCIL": (f"--method RCIL {_IN_PLACE}", in_place_logits, decide),
    "DKD": ("--method DKD", dkd_logits, decide_dkd),
    "STAR": ("--method STAR", dkd_logits, decide_star),
    "SSUL": ("--method SSUL --fidelity released", ssul_logits, decide_ssul),
}
