"""Any backbone of timm with feature maps, by its name: ``--backbone timm/NAME``.

timm takes a second to import, so only the functions that use it import it.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.norm import has_nccl_group, norm_layers
from utils.errors import UserError

PREFIX = "timm/"
STAGES = 4
# Options with which networks of a fixed image size take any, where their class has them.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
# Swin's last stage otherwise has unshifted windows if its map at the pretraining size is one window.
_SHIFTED = {"always_partition": True}


def check_name(backbone: str) -> None:
    """Check that timm has a network.

    Args:
        backbone: ``timm/NAME``, with timm's tag of pretrained weights or without.

    Raises:
        UserError: it has not; with similar names.
    """
    from timm.models import is_model, is_model_pretrained, list_models

    name = backbone.removeprefix(PREFIX)
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        near = difflib.get_close_matches(architecture, list_models(), n=3)
        hint = f"did you mean {' or '.join(PREFIX + other for other in near)}?" if near else "check the name"
        raise UserError(f"--backbone {backbone}: timm has no such network; {hint}")
    if tag and not is_model_pretrained(name):
        raise UserError(f"--backbone {backbone}: timm has no weights '{tag}' of {architecture}; drop the tag")


def pretrained_repository(backbone: str) -> str:
    """Repository of a backbone's pretrained weights on the Hugging Face hub.

    Args:
        backbone: of :func:`check_name`; without a tag timm's default weights.

    Raises:
        UserError: timm has none on the hub.
    """
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(backbone.removeprefix(PREFIX))
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"--backbone {backbone}: timm has no weights of it on the hub; give a file with "
            "--pretrained_path, or start from random weights with --no_pretrained"
        )
    return str(config.hf_hub_id)


class TimmBackbone(nn.Module):
    """A network of timm without its classifier, as a backbone.

    Weights have timm's names below ``model``. The stages are the network's last four; of a network whose maps
    all have one size (ViT), the ends of four equal parts of its blocks, with its last norm. Swin's stages
    have a layer norm each, ``norm0`` ... ``norm3``, as in its authors' code for dense prediction and in
    NeST's.

    Args:
        backbone: ``timm/NAME``; a tag of weights after a dot changes nothing but the normalisation of images.
        norm_act: ``sync``: batch norms are synchronised if possible; other kinds leave the network as it is.
        output_stride: 16 or 8, by dilation; networks that cannot be dilated keep their own.
        checkpointing: keep activations between timm's blocks only, recompute the others in the backward pass.
        drop_path: largest rate of stochastic depth; None: timm's default.

    Attributes:
        widths: channels of the stages.
        out_channels: channels of the last stage.
        stride: pixels per position of the last stage.

    Raises:
        UserError: timm has no such network, or it cannot be used with these options.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: str,
        norm_act: str,
        output_stride: int,
        *,
        checkpointing: bool = False,
        drop_path: float | None = None,
    ) -> None:
        super().__init__()
        check_name(backbone)
        self.name = backbone
        model = self.model = self._created(output_stride, drop_path)
        family, config, info = type(model).__name__, model.pretrained_cfg, list(model.feature_info)
        last = range(len(info))[-STAGES:]
        if len({stage["reduction"] for stage in info}) == 1:
            last = range(len(info) // STAGES - 1, len(info), len(info) // STAGES)[-STAGES:]
        self.widths = tuple(int(info[index]["num_chs"]) for index in last)
        self.out_channels, self.stride = self.widths[-1], int(info[last[-1]]["reduction"])
        self.own_norms = family.startswith("SwinTransformer")
        self.indices = model.prune_intermediate_layers(list(last), prune_norm=self.own_norms, prune_head=True)
        for number, width in enumerate(self.widths if self.own_norms else ()):
            self.add_module(f"norm{number}", nn.LayerNorm(width))
        if family == "SwinTransformer":
            for block in (block for layer in model.layers for block in layer.blocks):
                block.__class__ = _padded_block()
        # What the sides of images are padded to multiples of; HRNet adds maps of all strides.
        self.patch: tuple[int, int] = (1, 1)
        if config["fixed_input_size"] or family == "HighResolutionNet":
            whole = (self.stride, self.stride)
            self.patch = tuple(getattr(getattr(model, "patch_embed", None), "patch_size", whole))
        if norm_act == "sync" and has_nccl_group():
            from timm.layers import convert_sync_batchnorm

            self.model = model = convert_sync_batchnorm(model)
        self._counting: list[Any] = []
        if checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                raise UserError(
                    f"--grad_checkpointing: timm cannot do it with --backbone {backbone}; drop it"
                ) from error
            self._counting = list(norm_layers(model))
        self._silenced: list[tuple[Any, float]] = []
        self._normalise_by(config["mean"], config["std"])

    def _normalise_by(self, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        """Images come normalised by ImageNet's mean and deviation; change that to the network's."""
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        self.renormalises = (*mean, *deviation) != (*IMAGENET_DEFAULT_MEAN, *IMAGENET_DEFAULT_STD)
        usual, own = (
            torch.tensor(values)[:, :, None, None]
            for values in ((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), (mean, deviation))
        )
        self.register_buffer("scale", usual[1] / own[1], persistent=False)
        self.register_buffer("shift", (usual[0] - own[0]) / own[1], persistent=False)

    def _created(self, output_stride: int, drop_path: float | None) -> Any:
        """timm's network, with those of the wanted options that its class has."""
        import timm

        options: dict[str, Any] = {"output_stride": output_stride, **_ANY_SIZE, **_SHIFTED}
        name = self.name.removeprefix(PREFIX)
        while True:
            try:
                model = timm.create_model(name, num_classes=0, drop_path_rate=drop_path, **options)
                break
            except (TypeError, AssertionError, NotImplementedError) as error:
                refused = [option for option in options if option in str(error)]
                if "drop_path_rate" in str(error):
                    raise UserError(
                        f"--drop_path {drop_path}: {self.name} has no stochastic depth; drop it"
                    ) from error
                if not refused and not isinstance(error, TypeError) and "output_stride" in options:
                    refused = ["output_stride"]  # timm's assertions have no text
                if not refused:
                    raise
                for option in refused:
                    del options[option]
        config: Any = model.pretrained_cfg
        if not (hasattr(model, "forward_intermediates") and hasattr(model, "feature_info")):
            raise UserError(f"--backbone {self.name}: timm has no feature maps of it; choose another")
        if config["fixed_input_size"] and not options.keys() & _ANY_SIZE.keys():
            raise UserError(f"--backbone {self.name}: takes images of one size only; choose another")
        return model

    def forward(
        self, images: Tensor, keep_stages: bool = False, keep_activated: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features of the last stage, and optionally of all stages.

        Args:
            images: B×3×H×W, normalised; padded right and below to whole patches where the network needs it.
            keep_stages: whether to return the stages' features (for PLOP): as timm gives them, which for most
                convolutional networks is after the last activation.
            keep_activated: the same (for RCIL and ``--model mlp``).

        Returns:
            B×C×h×w, h = H / ``stride``, rounded up, and two lists of the stages' features or empty ones.
        """
        if self.renormalises:
            images = images * self.scale + self.shift
        height, width = images.shape[2:]
        padding = 0, -width % self.patch[1], 0, -height % self.patch[0]
        images = F.pad(images, padding) if any(padding) else images
        recomputes = bool(self._silenced) or torch.is_grad_enabled()
        for norm, momentum in self._silenced:
            norm.momentum = momentum
        stages = self.model.forward_intermediates(
            images, indices=self.indices, norm=not self.own_norms, intermediates_only=True
        )
        self._silenced = [(norm, norm.momentum) for norm in self._counting] if recomputes else []
        for norm, _ in self._silenced:
            norm.momentum = 0.0  # recomputed in the backward pass, the batch does not count again
        if self.own_norms:
            norms = (self.get_submodule(f"norm{number}") for number in range(len(stages)))
            stages = [_normed(norm, stage) for norm, stage in zip(norms, stages, strict=True)]
        return stages[-1], stages if keep_stages else [], stages if keep_activated else []

    def from_file(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, of timm or of a network's authors, under this module's names.

        Raises:
            ValueError, KeyError, ...: timm cannot read them as this network's.
        """
        # timm's own function of the network's family, with which it reads its authors' files.
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        found = convert(dict(state), self.model) if convert is not None else state
        return {f"model.{name}": tensor for name, tensor in found.items()}


def _normed(norm: nn.Module, features: Tensor) -> Tensor:
    """B×C×h×w, normalised over C."""
    return norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@functools.cache
def _padded_block() -> type[nn.Module]:
    """Swin's block as its authors' for dense prediction: a map is padded to whole windows, then shifted.

    timm shifts it first, which puts the padding between the map's rows and columns.
    """
    from timm.models.swin_transformer import SwinTransformerBlock

    class PaddedBlock(SwinTransformerBlock):
        def _attn(self, features: Tensor) -> Tensor:
            height, width = features.shape[1:3]
            rows, columns = self.window_size
            padded = F.pad(features, (0, 0, 0, -width % columns, 0, -height % rows))
            return super()._attn(padded)[:, :height, :width]

    return PaddedBlock
