"""Networks: backbones, heads, normalisation and pretrained weights."""

from __future__ import annotations

import torch
from torch import nn

from modules.branches import two_branch_layers
from modules.deeplab import (
    ASPP_DILATIONS,
    DILATIONS,
    HEADS,
    ASPPHead,
    DeepLabHead,
    DeepLabV3,
    TwoBranchHead,
)
from modules.dkd_head import DKDHead
from modules.mobilenet import MobileNetV2Backbone
from modules.network import Network
from modules.norm import NormAct
from modules.pretrained import LoadReport, load_pretrained
from modules.resnet import LAYERS, ResNetBackbone
from modules.segformer import CONFIGS, AllMLPHead, SegFormer
from modules.spec import NetworkSpec
from modules.timm_backbone import PREFIX, TimmBackbone, pretrained_repository
from utils.errors import UserError

MODELS = ("deeplab", "mlp", *CONFIGS)
BACKBONES = (*LAYERS, "mobilenet_v2")

__all__ = [
    "BACKBONES",
    "MODELS",
    "LoadReport",
    "Network",
    "NetworkSpec",
    "build_network",
    "check_buildable",
    "load_pretrained",
    "network_class",
    "pretrained_repository",
]


def build_network(spec: NetworkSpec, *, later_step: bool = False) -> Network:
    """Build a network with random weights.

    Args:
        spec: its architecture.
        later_step: whether it is that of a step after the first, whose first branches are merged.

    Raises:
        UserError: a value that is not among the choices, or inplace-abn is needed and not installed.
    """
    if spec.two_branches and (spec.model, spec.head) != ("deeplab", HEADS[0]):
        raise UserError(f"--two_branches needs --model deeplab and --head {HEADS[0]}")
    if spec.model in CONFIGS:
        rate = {} if spec.drop_path is None else {"drop_path": spec.drop_path}
        return SegFormer(CONFIGS[spec.model], spec.decoder, checkpointing=spec.checkpointing, **rate)
    for name, choices in {"model": MODELS, "head": HEADS}.items():
        if (value := getattr(spec, name)) not in choices:
            raise UserError(f"--{name} {value}: unknown, choose one of {', '.join(choices)}")
    if spec.output_stride not in DILATIONS:
        raise UserError(f"--output_stride {spec.output_stride}: must be 8 or 16")
    if spec.pooling < 0:
        raise UserError(f"--pooling {spec.pooling}: must be a number of features, or 0 for the whole map")
    norms = NormAct(spec.norm_act)
    backbone = _timm(spec) if spec.backbone.startswith(PREFIX) else _dilated(spec, norms)
    if spec.model == "mlp":
        return DeepLabV3(backbone, AllMLPHead(backbone.widths), over_stages=True)
    # timm's networks may have another stride than the option's.
    stride = 8 if getattr(backbone, "stride", spec.output_stride) <= 8 else 16
    channels, rates = backbone.out_channels, ASPP_DILATIONS[stride]
    head: nn.Module
    if spec.head == "aspp":
        head = ASPPHead(channels, norms, rates)
    elif spec.head == "dkd":
        head = DKDHead(channels, rates=rates, norm_act=norms)
    elif spec.two_branches:
        head = TwoBranchHead(channels, norms, stride, spec.pooling)
    else:
        head = DeepLabHead(channels, norms, stride, spec.pooling, released=spec.released_resnet)
    network = DeepLabV3(backbone, head)
    for _, layer in two_branch_layers(network) if later_step else ():
        layer.keep_first()
    return network


def check_buildable(spec: NetworkSpec) -> None:
    """Raise the UserError of :func:`build_network`, without drawing weights."""
    with torch.device("meta"):
        build_network(spec)


def network_class(model: str) -> type[Network]:
    """Class of the networks of ``--model``."""
    return SegFormer if model in CONFIGS else DeepLabV3


def _timm(spec: NetworkSpec) -> TimmBackbone:
    if spec.two_branches:
        raise UserError(f"--two_branches needs --backbone {' or '.join(BACKBONES)}, not {spec.backbone}")
    return TimmBackbone(
        spec.backbone,
        spec.norm_act,
        spec.output_stride,
        checkpointing=spec.checkpointing,
        drop_path=spec.drop_path,
    )


def _dilated(spec: NetworkSpec, norms: NormAct) -> ResNetBackbone | MobileNetV2Backbone:
    if spec.backbone not in BACKBONES:
        raise UserError(
            f"--backbone {spec.backbone}: unknown, choose one of {', '.join(BACKBONES)}, or {PREFIX}NAME"
        )
    backbone: ResNetBackbone | MobileNetV2Backbone
    if spec.backbone == "mobilenet_v2":
        backbone = MobileNetV2Backbone(norms, spec.output_stride, two_branches=spec.two_branches)
    else:
        backbone = ResNetBackbone(
            spec.backbone,
            norms,
            spec.output_stride,
            released=spec.released_resnet,
            two_branches=spec.two_branches,
        )
    if spec.checkpointing and norms.fused:
        raise UserError(
            f"--grad_checkpointing cannot be used with --norm_act {spec.norm_act}, whose layers overwrite "
            "their inputs: drop it, or use --norm_act abn"
        )
    backbone.checkpointing = spec.checkpointing
    return backbone
