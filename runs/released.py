"""Checkpoints of the released programs: told apart by the names of their weights, which become ours.

They have no manifest. What the names say about the network is compared with the options that are typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from modules.pretrained import Rename, rename
from modules.resnet import LAYERS
from modules.segformer import CONFIGS


@dataclass(frozen=True)
class Program:
    """Released programs whose weights have the same names.

    Attributes:
        sign: a weight that only their checkpoints have, and those of programs further down.
        renames: patterns in their names and what takes their place, in this order.
        network: what the weights belong to, by the fields of ``NetworkSpec``; ``model`` or ``backbone``
            follow from the number of blocks.
    """

    sign: str
    renames: tuple[Rename, ...]
    network: Mapping[str, str | bool]


_BODY: Rename = (r"^(?:body|backbone)\.(.+)", lambda found: f"network.body.{rename(found[1])}")
_NETWORK: tuple[Rename, ...] = ((r"^(body|head)\.", r"network.\1."),)  # a backbone that is not of a release
_HEAD: Rename = (r"^head\.", "network.head.")

_INDEX = re.compile(r"\.relative_position_index$")  # of Swin's windows: computed, no weight

_SWIN_B = "timm/swin_base_patch4_window12_384"
_IN_PLACE = {"model": "deeplab", "norm_act": "iabn_sync", "head": "mib"}

PROGRAMS = (
    # RCIL
    Program("body.mod2.block1.convs.conv2_new.weight", (_BODY, _HEAD), {**_IN_PLACE, "two_branches": True}),
    # MiB, PLOP and its forks EWF, LGKD, NeST and RevisitingCSS (DFT*); SDR with its default --where_to_sim
    Program("body.mod1.conv1.weight", (_BODY, _HEAD), _IN_PLACE),
    # SDR with another --where_to_sim
    Program(
        "body.layer1.0.conv1.weight",
        (_BODY, _HEAD),
        {"model": "deeplab", "norm_act": "std", "head": "mib", "released_resnet": True},
    ),
    # NeST and RevisitingCSS (DFT*) with Swin-B, whose stages end with what begins timm's next one
    Program(
        "body.layers.0.blocks.0.attn.qkv.weight",
        (
            (
                r"^body\.layers\.(\d)\.downsample\.",
                lambda found: f"network.body.model.layers.{int(found[1]) + 1}.downsample.",
            ),
            (r"^body\.(norm\d)\.", r"network.body.\1."),
            (r"^body\.", "network.body.model."),
            _HEAD,
        ),
        _IN_PLACE,
    ),
    # SATS
    Program(
        "body.mit.patch_embed1.proj.weight",
        (
            (r"^body\.mit\.", "network.body."),
            (r"^head\.to_fused\.(\d)\.0\.", r"network.head.project.\1."),
            (r"^head\.to_segmentation\.", "network.head.fuse."),
        ),
        {"decoder": "sats"},
    ),
    # DKD, whose first classifier is the auxiliary one, and STAR
    Program(
        "aspp.last_conv.0.weight",
        (_BODY, (r"^aspp\.", "network.head.")),
        {"model": "deeplab", "norm_act": "sync", "head": "dkd"},
    ),
    # SSUL: the unknown class's classifier, the background's, then each step's
    Program(
        "classifier.aspp.convs.0.0.weight",
        (
            _BODY,
            (r"^classifier\.aspp\.", "network.head."),
            (r"^classifier\.head\.0\.", "cls.unknown."),
            (r"^classifier\.head\.(\d+)\.", lambda found: f"cls.{int(found[1]) - 1}."),
        ),
        {"model": "deeplab", "norm_act": "sync", "head": "aspp"},
    ),
)


def our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under this program's names; others than a released program's keep theirs."""
    program = _program(weights)
    renames = _NETWORK if program is None else program.renames
    return {_renamed(name, renames): tensor for name, tensor in weights.items() if not _INDEX.search(name)}


def network_of(weights: Mapping[str, Tensor]) -> dict[str, str | bool]:
    """What weights of a released program belong to, by the fields of ``NetworkSpec``; empty for others'."""
    program = _program(weights)
    return {} if program is None else {**_size(our_names(weights)), **program.network}


def _renamed(name: str, renames: Sequence[Rename]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _program(weights: Mapping[str, Tensor]) -> Program | None:
    return next((program for program in PROGRAMS if program.sign in weights), None)


def _size(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Backbone or model, by the number of blocks in each of the four stages; empty for another number."""
    pattern = r"network\.body\.(?:layer|block|model\.layers\.)(\d)\.(?:blocks\.)?(\d+)\."
    blocks = {(int(found[1]), int(found[2])) for name in weights if (found := re.match(pattern, name))}
    depths = [sum(stage == number for stage, _ in blocks) for number in sorted({s for s, _ in blocks})]
    if (patches := weights.get("network.body.model.patch_embed.proj.weight")) is not None:
        return {"backbone": _SWIN_B} if (depths, len(patches)) == ([2, 2, 18, 2], 128) else {}
    if (norm := weights.get("network.body.patch_embed1.norm.weight")) is None:
        option, alike = "backbone", [name for name, layers in LAYERS.items() if layers == depths]
    else:
        sizes = (depths, len(norm))
        option = "model"
        alike = [name for name, c in CONFIGS.items() if (list(c.depths), c.widths[0]) == sizes]
    return {option: alike[0]} if alike else {}
