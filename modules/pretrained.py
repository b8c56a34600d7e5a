"""Pretrained backbone weights: from a file, from torchvision or from the Hugging Face hub.

Supported: state dicts of torchvision, the ``<backbone>_<norm>.pth.tar`` files of inplace-abn that MiB and
PLOP use, NVlabs' ``mit_b*.pth`` and the ``nvidia/mit-b*`` checkpoints of the hub, plain or under
``state_dict``, with or without the prefix ``module.``. Only tensors are read; no code in a file is executed.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision.models import get_weight

from modules.branches import first_branch
from modules.network import Network
from modules.norm import NormAct
from modules.timm_backbone import PREFIX, TimmBackbone, pretrained_repository
from utils.errors import UserError
from utils.hub import download, local_file

TORCHVISION_WEIGHTS = {
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
    "mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V1",
}
"""The weights that the papers' code uses, by backbone."""
REMEDY = "give a file with --pretrained_path, or start from random weights with --no_pretrained"


@dataclass
class LoadReport:
    """Which tensors of a pretrained file were loaded.

    ``loaded`` and ``missing`` are names in the backbone, ``left_over`` names in the file (usually of the
    classifier).
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"pretrained weights from {self.source}: {len(self.loaded)} tensors loaded, "
            f"{_count(self.missing)} missing, {_count(self.left_over)} left over"
        )


def _count(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "0"


def load_pretrained(
    network: Network, *, path: Path | None = None, name: str | None = None, hub: str | None = None
) -> LoadReport:
    """Load weights into ``network.body`` from exactly one source.

    Args:
        network: result of :func:`modules.build_network`.
        path: a file.
        name: torchvision weights, e.g. ``ResNet101_Weights.IMAGENET1K_V1``; downloaded once, with
            torchvision's checksum.
        hub: a repository of the Hugging Face hub, e.g. ``nvidia/mit-b2``; downloaded once.

    Raises:
        UserError: the source cannot be downloaded or read, or belongs to another network.
    """
    if sum(source is not None for source in (path, name, hub)) != 1:
        raise TypeError("load_pretrained needs exactly one of path, name and hub")
    if name is not None:
        state = _download_torchvision(name)
    elif hub is not None:
        state = read_state_dict(_download_hub(hub))
    else:
        assert path is not None
        state = read_state_dict(path)
    return _load_into_backbone(network, state, str(path or name or hub))


def load_default_pretrained(
    network: Network, *, model: str | None, backbone: str, norm_act: str, folder: Path = Path("pretrained")
) -> LoadReport:
    """Load the weights that the published code uses.

    SegFormer: ``mit_b*.pth`` in ``folder`` if it exists, else the hub's. timm's networks: the hub's. DeepLab
    with ``std`` or ``sync``, or with MobileNetV2: torchvision's. ResNet with a leaky kind of norm:
    inplace-abn's ``<backbone>_<norm>.pth.tar`` in ``folder``.

    Raises:
        UserError: the file is missing, or as :func:`load_pretrained`.
    """
    if model is not None and model.startswith("segformer_"):
        size = model.removeprefix("segformer_")
        file = folder / f"mit_{size}.pth"
        if file.is_file():
            return load_pretrained(network, path=file)
        return load_pretrained(network, hub=f"nvidia/mit-{size}")
    if backbone.startswith(PREFIX):
        return load_pretrained(network, hub=pretrained_repository(backbone))
    if not NormAct(norm_act).leaky or backbone == "mobilenet_v2":
        return load_pretrained(network, name=TORCHVISION_WEIGHTS[backbone])
    file = folder / f"{backbone}_{norm_act.removesuffix('_test')}.pth.tar"
    if not file.is_file():
        raise UserError(
            f"{file}: not found; download it from the links in github.com/mapillary/inplace_abn, use "
            f"torchvision's weights with --norm_act std, {REMEDY}"
        )
    return load_pretrained(network, path=file)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, ``.pth.tar``, ``.bin`` or ``.safetensors`` file, by name, on the CPU.

    Raises:
        UserError: the file is missing, of another format, or contains more than tensors and plain values.
    """
    path = local_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {REMEDY}")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it is not a file of torch.save or contains Python objects, which could run "
            "code; save its state dict only"
        ) from error
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as weights (broken or cut short?); {REMEDY}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = content if isinstance(content, dict) else {}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: contains no named tensors; {REMEDY}")
    return tensors


def _download_torchvision(name: str) -> dict[str, Tensor]:
    try:
        weights = get_weight(name)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name}: torchvision has no such weights; {REMEDY}") from error
    try:
        return weights.get_state_dict(map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{weights.url}: cannot be downloaded (no network, or a wrong checksum); {REMEDY}"
        ) from error


def _download_hub(repository: str) -> Path:
    failure: Exception | None = None
    for filename in ("model.safetensors", "pytorch_model.bin"):
        try:
            return download(repository, filename)
        except FileNotFoundError as error:
            failure = error
    raise UserError(f"huggingface.co/{repository}: cannot be downloaded (no network?); {REMEDY}") from failure


Rename = tuple[str, "str | Callable[[re.Match[str]], str]"]


def _stage(pattern: str, ours: str) -> Rename:
    """A rename with the stage number plus 1; further groups (block numbers) are not changed."""
    return pattern, lambda found: ours.format(int(found[1]) + 1, *found.groups()[1:])


RENAMES: list[Rename] = [
    (r"^(?:module\.|backbone\.|segformer\.|encoder\.)+", ""),
    # inplace-abn's ResNet → torchvision's
    (r"^mod1\.", ""),
    (
        r"^mod(\d)\.block(\d+)\.(?:convs\.)?",
        lambda found: f"layer{int(found[1]) - 1}.{int(found[2]) - 1}.",
    ),
    (r"\.proj_conv\.", ".downsample.0."),
    (r"\.proj_bn\.", ".downsample.1."),
    # transformers' SegFormer, its names on the hub and those of transformers 5 → NVlabs'
    _stage(r"^patch_embeddings\.(\d)\.", "patch_embed{}."),
    _stage(r"^stages\.(\d)\.patch_embeddings\.", "patch_embed{}."),
    _stage(r"^block\.(\d)\.(\d+)\.", "block{}.{}."),
    _stage(r"^stages\.(\d)\.blocks\.(\d+)\.", "block{}.{}."),
    _stage(r"^layer_norm\.(\d)\.", "norm{}."),
    _stage(r"^stages\.(\d)\.layer_norm\.", "norm{}."),
    (r"^(patch_embed\d)\.layer_norm\.", r"\1.norm."),
    (r"\.(?:layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(?:self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:self\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(?:self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
]


def rename(key: str) -> str:
    """Name in the backbone of the tensor ``key`` of a pretrained file."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _load_into_backbone(network: Network, state: dict[str, Tensor], source: str) -> LoadReport:
    wanted = network.body.state_dict()
    if isinstance(network.body, TimmBackbone):
        try:
            tensors = network.body.from_file(state)
        except (LookupError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise UserError(
                f"{source}: has no weights of this network; check --backbone, or {REMEDY}"
            ) from error
        names = {key: key.removeprefix("model.") for key in tensors}
    else:
        tensors, names = _renamed(state, wanted)
    fitting = {key: tensor for key, tensor in tensors.items() if key in wanted}
    if not fitting:
        raise UserError(
            f"{source}: has no weights of this network (it has {next(iter(state))}, ..., "
            f"the network {next(iter(wanted))}, ...); check --model and --backbone, or {REMEDY}"
        )
    for key, tensor in fitting.items():
        if tensor.shape != wanted[key].shape:
            raise UserError(
                f"{source}: for another network, {names[key]} is {_shape(tensor)} and not "
                f"{_shape(wanted[key])}; check --model and --backbone, or {REMEDY}"
            )
    network.body.load_state_dict(fitting, strict=False)
    # Files of old torch releases lack num_batches_tracked, which is not used.
    missing = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
    left_over = [names[key] for key in tensors if key not in wanted]
    return LoadReport(source, loaded=list(fitting), missing=missing, left_over=left_over)


def _renamed(state: dict[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors under the names in the backbone, and their names in the file."""
    names = {rename(key): key for key in state}
    tensors = {ours: state[key] for ours, key in names.items()}
    for key in [ours for ours in tensors if ".attn.k." in ours]:
        value = key.replace(".attn.k.", ".attn.v.")
        if value in tensors:  # keys and values are one layer in NVlabs' code
            joined = key.replace(".attn.k.", ".attn.kv.")
            tensors[joined] = torch.cat([tensors.pop(key), tensors.pop(value)])
            names[joined] = names[key]
    for key in wanted:  # both branches of a layer start from the same weights
        if key not in tensors and (first := first_branch(key)) in tensors:
            tensors[key], names[key] = tensors[first], names[first]
    return tensors, names


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"
