"""Networks: backbones, heads, normalisation and pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.deeplab import DILATIONS, HEADS, ASPPHead, DeepLabHead, DeepLabV3
from modules.mobilenet import MobileNetV2Body
from modules.network import Network
from modules.norm import NormAct
from modules.pretrained import LoadReport, load_pretrained
from modules.resnet import LAYERS, ResNetBody
from modules.segformer import CONFIGS, SegFormer
from utils.errors import UserError

MODELS = ("deeplab", *CONFIGS)
BACKBONES = (*LAYERS, "mobilenet_v2")

__all__ = [
    "BACKBONES",
    "MODELS",
    "LoadReport",
    "Network",
    "build_network",
    "is_sdr_network",
    "load_pretrained",
]


def build_network(
    model: str | None,
    *,
    backbone: str = "resnet101",
    norm_act: str = "iabn_sync",
    output_stride: int = 16,
    pooling: int = 32,
    head: str = "mib",
    decoder: str = "sats",
    drop_path: float = 0.1,
    checkpointing: bool = False,
    sdr: bool = False,
) -> Network:
    """Make a network with random weights.

    Args:
        model: ``deeplab`` (or None), ``segformer_b0`` ... ``segformer_b5``.
        backbone: of DeepLab: ``resnet50``, ``resnet101`` or ``mobilenet_v2``.
        norm_act: of DeepLab, see :mod:`modules.norm`.
        output_stride: of DeepLab, 16 or 8.
        pooling: of DeepLab's ``mib`` head: window of the evaluation pooling in features, 0 for the whole map.
        head: of DeepLab: ``mib`` (MiB, PLOP, SDR) or ``aspp`` (SSUL, torchvision).
        decoder: of SegFormer: ``sats`` or ``segformer``.
        drop_path: of SegFormer: largest stochastic depth rate.
        checkpointing: compute the activations inside the body's stages anew in the backward pass.
        sdr: ResNet and head as in SDR's program.

    Raises:
        UserError: a value that is not among the choices, or inplace-abn is needed and not installed.
    """
    if model in CONFIGS:
        return SegFormer(CONFIGS[model], decoder, drop_path, checkpointing=checkpointing)
    if model not in (None, "deeplab"):
        raise UserError(f"--model {model}: unknown, choose one of {', '.join(MODELS)}")
    if backbone not in BACKBONES:
        raise UserError(f"--backbone {backbone}: unknown, choose one of {', '.join(BACKBONES)}")
    if output_stride not in DILATIONS:
        raise UserError(f"--output_stride {output_stride}: must be 8 or 16")
    if head not in HEADS:
        raise UserError(f"--head {head}: unknown, choose one of {', '.join(HEADS)}")
    if pooling < 0:
        raise UserError(f"--pooling {pooling}: must be a number of features, or 0 for the whole map")
    norms = NormAct(norm_act)
    body: ResNetBody | MobileNetV2Body
    if backbone == "mobilenet_v2":
        body = MobileNetV2Body(norms, output_stride)
    else:
        body = ResNetBody(backbone, norms, output_stride, sdr=sdr)
    if checkpointing and norms.fused:
        raise UserError(
            f"--grad_checkpointing does not go with --norm_act {norm_act}, whose layers overwrite what they "
            "would compute from: drop it, or take --norm_act abn"
        )
    body.checkpointing = checkpointing
    if head == "aspp":
        return DeepLabV3(body, ASPPHead(body.out_channels, norms, output_stride))
    return DeepLabV3(body, DeepLabHead(body.out_channels, norms, output_stride, pooling, sdr=sdr))


def is_sdr_network(options: Mapping[str, Any]) -> bool:
    """Whether options ask for the network of SDR's program, whose weights have the same names and shapes.

    It is what ``--fidelity released`` means for ResNet with BatchNorm and ReLU, but for SSUL's, which is
    torchvision's (docs/fidelity.md).
    """
    return (
        options.get("fidelity") == "released"
        and options["model"] == "deeplab"
        and options["backbone"].startswith("resnet")
        and options["norm_act"] in ("std", "sync")
        and not options["unknown"]
    )
