"""Layers with two branches, of which later steps keep one as it was learnt (RCIL).

Zhang et al., "Representation Compensation Networks for Continual Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from modules.network import freeze
from modules.norm import scales_by_magnitude
from utils.loss import branch_weights, fold_branches

SECOND = "_new"  # ends the names of the second branch


class TwoBranches(nn.Module):
    """Base of a layer with a second branch beside its convolutions and their norm.

    In training each channel of each batch is that of one branch or the mean of both, at random; in evaluation
    the mean. Norms are without activation, so that the mean of both branches is one convolution.

    Attributes:
        branch: names of the first branch's convolution (or list of parallel ones, concatenated) and norm.
        merged: whether the first branch is the previous step's two, merged: convolutions with a bias and a
            norm that is the identity, not trained.
    """

    branch: tuple[str, str]
    merged = False

    def add_branch(self, convolutions: str, norm: str) -> None:
        """Copy the first branch as the second."""
        self.branch = convolutions, norm
        for name in self.branch:
            self.add_module(name + SECOND, copy.deepcopy(getattr(self, name)))

    def keep_first(self) -> None:
        """Make the first branch that of a later step, for merged weights: with biases, frozen."""
        self.merged = True
        for convolution in self.convolutions().values():
            convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels))
        for name in self.branch:
            freeze(getattr(self, name))

    def mixed(self, features: Tensor) -> Tensor:
        """B×C×h×w → B×D×h'×w', not activated."""
        first, second = self._branch(features, ""), self._branch(features, SECOND)
        if not self.training:
            return (first + second) / 2
        draw = torch.rand(1, first.shape[1], 1, 1, device=first.device)
        weight, other = (w.to(first.dtype) for w in branch_weights(draw))
        return weight * first + other * second

    def _branch(self, features: Tensor, suffix: str) -> Tensor:
        norm = getattr(self, self.branch[1] + suffix)
        maps = [convolution(features) for convolution in self.convolutions(suffix).values()]
        return norm(maps[0] if len(maps) == 1 else torch.cat(maps, dim=1))

    def convolutions(self, suffix: str = "") -> dict[str, nn.Conv2d]:
        """A branch's convolutions, by the rest of their name after the branch's."""
        found = getattr(self, self.branch[0] + suffix)
        return {f".{name}": conv for name, conv in found.named_children()} or {"": found}

    def merge(self, state: dict[str, Tensor], prefix: str) -> None:
        """Merge both branches into the first, in place.

        Args:
            state: of the previous step's network.
            prefix: of this layer's weights.

        Raises:
            KeyError: a weight is missing.
        """
        convolutions, norm = self.branch
        layer = getattr(self, norm)
        parts = ("weight", "bias", "running_mean", "running_var")
        start = 0
        for number, convolution in self.convolutions().items():
            channels = slice(start, start := start + convolution.out_channels)
            names = [f"{prefix}{convolutions}{suffix}{number}" for suffix in ("", SECOND)]
            biases = [state.get(f"{name}.bias") for name in names]
            norms = [
                tuple(state[f"{prefix}{norm}{suffix}.{part}"][channels].double() for part in parts)
                for suffix in ("", SECOND)
            ]
            state[f"{names[0]}.weight"], state[f"{names[0]}.bias"] = fold_branches(
                [state[f"{name}.weight"].double() for name in names],
                [None if bias is None else bias.double() for bias in biases],
                norms,  # type: ignore[arg-type]
                eps=layer.eps,
                absolute=scales_by_magnitude(layer),
            )
        for part, value in zip(parts, (1.0, 0.0, 0.0, 1.0), strict=True):
            state[f"{prefix}{norm}.{part}"] = torch.full_like(state[f"{prefix}{norm}.{part}"], value)


def first_branch(weight: str) -> str:
    """Name of the weight of the first branch beside one of the second; other names stay."""
    return weight.replace(f"{SECOND}.", ".")


def two_branch_layers(network: nn.Module) -> Iterator[tuple[str, TwoBranches]]:
    """All layers with two branches, by name."""
    for name, module in network.named_modules():
        if isinstance(module, TwoBranches):
            yield name, module


def merge_branches(network: nn.Module, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state of the previous step's network with every two branches merged.

    Args:
        network: of this step; layers that are not ``merged`` keep their weights.
        state: its weights are named with ``prefix``; one without all weights of the branches is returned
            unchanged, for whoever loads it to refuse.
        prefix: of the network's weights.
    """
    merged = dict(state)
    try:
        for name, layer in two_branch_layers(network):
            if layer.merged:
                layer.merge(merged, f"{prefix}{name}.")
    except KeyError:
        return dict(state)
    return merged
