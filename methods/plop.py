"""PLOP: pooled output distillation at several scales (Douillard et al. 2021)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from methods.base import Batch, Method
from methods.presets import FAMILY_PLOP
from utils.errors import UserError
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight, positive_int

SEGFORMER_STRIDE = 32


def _json_object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except (json.JSONDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {word}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {word}")
    for number in _numbers(value):
        if number not in loss_weight:
            raise argparse.ArgumentTypeError(f"{number} is not {loss_weight.description}: {word}")
    return value


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value, NaN and Infinity included."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


class PooledOutputDistillation(Method):
    """Distance of the row and column means of all stages' maps, at several scales, from the teacher's."""

    needs_teacher = True

    def __init__(self, criterion: loss.LocalPODLoss, *, last: str | None) -> None:
        self.criterion = criterion
        self.last = last
        self.needs = frozenset({"attentions"} | ({"logits_small"} if last == "small" else set()))

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--pod``, ``--pod_*``, ``--spp_scales``."""
        group.choice("--pod", ("spatial", "local", "global"), None, help="pooling of the maps (PLOP: local)")
        group.value("--pod_factor", loss_weight, 5.0, metavar="W", help="weight")
        group.value(
            "--pod_options",
            _json_object,
            None,
            metavar="JSON",
            help='options of single maps, e.g. {"switch": {"after": {"factor": 0.0005}}}',
        )
        group.choice("--pod_prepro", ("pow", "abs", "relu", "none"), "pow", help="preprocessing of the maps")
        group.flag("--no_pod_schedule", help="do not multiply the weight by sqrt(seen classes / new classes)")
        group.choice("--pod_apply", ("all", "backbone", "deeplab"), "all", help="maps to compare")
        group.flag("--pod_logits", help="compare the small logits too")
        group.flag("--pod_large_logits", help="compare the logits of full size too")
        group.value("--spp_scales", positive_int, [1, 2, 4], nargs="+", help="grid sizes of local POD")

    @classmethod
    def from_options(cls, opts: Any) -> PooledOutputDistillation | None:
        """Enabled with ``--pod``."""
        if opts.pod is None:
            return None
        try:
            criterion = loss.LocalPODLoss(
                pod_factor=opts.pod_factor,
                pod_options=opts.pod_options,
                spp_scales=opts.spp_scales,
                use_pod_schedule=not opts.no_pod_schedule,
                pod=opts.pod,
                pod_prepro=opts.pod_prepro,
                pod_apply=opts.pod_apply,
            )
        except ValueError as error:
            raise UserError(f"--pod_options: {error}; LocalPODLoss in utils/loss.py lists them") from error
        segformer = opts.model.startswith("segformer_")
        # The stride of a timm backbone is known with the network only.
        if segformer or not opts.backbone.startswith("timm/"):
            side = opts.crop_size // (SEGFORMER_STRIDE if segformer else opts.output_stride)
            _check_grid(criterion, side, f"--crop_size {opts.crop_size}")
        last = "small" if opts.pod_logits else "large" if opts.pod_large_logits else None
        return cls(criterion, last=last)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Void and unseen labels of PLOP's program, if typed rather than set by a preset."""
        return FAMILY_PLOP if "pod" in opts.typed else {}

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The distance over all maps."""
        old, new = list(batch.features_old["attentions"]), list(batch.features["attentions"])
        if self.last == "small":
            old.append(batch.features_old["logits_small"])
            new.append(batch.features["logits_small"])
        elif self.last == "large":
            old.append(batch.outputs_old)
            new.append(batch.outputs)
        _check_grid(self.criterion, min(maps.shape[-1] for maps in new), "this network and --crop_size")
        distance = self.criterion(
            features_old=old,
            features=new,
            nb_current_classes=batch.classes_old + batch.classes_new,
            nb_new_classes=batch.classes_new,
            index_new_class=batch.classes_old,
        )
        return {"pod": distance}


def _check_grid(criterion: loss.LocalPODLoss, side: int, cause: str) -> None:
    """Raise UserError if the smallest map, of ``side`` positions, is smaller than the finest grid."""
    if side < criterion.finest_grid:
        raise UserError(
            f"--spp_scales {criterion.finest_grid}: the smallest map is {side}×{side} with {cause}; "
            "give smaller --spp_scales or a larger --crop_size"
        )
