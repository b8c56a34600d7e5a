"""Norm layers with their activations: the kinds of ``--norm_act``.

| kind | norm | activation |
|---|---|---|
| ``std`` | BatchNorm | ReLU |
| ``sync`` | SyncBatchNorm where an NCCL process group exists, else BatchNorm | ReLU |
| ``abn`` | BatchNorm | leaky ReLU 0.01 |
| ``iabn`` | inplace-abn's ``InPlaceABN`` | leaky ReLU 0.01, fused |
| ``iabn_sync`` | ``InPlaceABNSync`` over all processes of an NCCL group | leaky ReLU 0.01, fused |
| ``iabn_sync_test`` | the arithmetic of ``iabn_sync`` in plain torch, not synchronised | leaky ReLU 0.01 |

SyncBatchNorm and ``InPlaceABNSync`` synchronise statistics on CUDA only; on the CPU each process has its own.
``iabn_sync_test`` runs weights of ``iabn_sync`` on a machine without inplace-abn. (The released PLOP code
builds a plain BatchNorm for it, which its residual block cannot run.)

In-place activated batch norm: Rota Bulò et al., "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import UserError

NORM_KINDS = ("std", "sync", "abn", "iabn", "iabn_sync", "iabn_sync_test")
LEAKY_SLOPE = 0.01


class NormAct:
    """Builds the norm layers and activations of one ``--norm_act`` kind.

    Calling it with a number of channels returns a norm to be followed by :meth:`activation` (the identity for
    the in-place kinds, whose layer includes the activation); :meth:`plain` returns a norm without activation,
    :meth:`after_sum` the activation of a residual sum.

    Raises:
        UserError: unknown kind, or an in-place kind without the package inplace-abn.
    """

    def __init__(self, kind: str) -> None:
        if kind not in NORM_KINDS:
            raise UserError(f"--norm_act {kind}: unknown, choose one of {', '.join(NORM_KINDS)}")
        self.kind = kind
        self.fused = kind in ("iabn", "iabn_sync")
        self.leaky = kind not in ("std", "sync")
        if self.fused:
            _in_place_layers()

    def __call__(self, channels: int) -> nn.Module:
        """Norm over ``channels``, to be followed by :meth:`activation`."""
        return self._layer(channels, activation="leaky_relu")

    def plain(self, channels: int) -> nn.Module:
        """Norm over ``channels`` without activation."""
        return self._layer(channels, activation="identity")

    def activation(self) -> nn.Module:
        """Activation after a norm that calling this object returned."""
        return nn.Identity() if self.fused else self.after_sum()

    def after_sum(self) -> nn.Module:
        """Activation of a residual sum; works in place."""
        return nn.LeakyReLU(LEAKY_SLOPE, inplace=True) if self.leaky else nn.ReLU(inplace=True)

    @property
    def gain(self) -> float:
        """Gain of the activation, for weight initialisation."""
        return nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE if self.leaky else 0.0)

    def _layer(self, channels: int, activation: str) -> nn.Module:
        if self.kind == "iabn_sync_test":
            return AbsWeightBatchNorm2d(channels)
        if self.kind == "sync" and has_nccl_group():
            return nn.SyncBatchNorm(channels)
        if not self.fused:
            return nn.BatchNorm2d(channels)
        layers = _in_place_layers()
        if self.kind == "iabn":
            return layers["iabn"](channels, activation=activation, activation_param=LEAKY_SLOPE)
        # The package reads its default group at import, before any group exists, and would then not
        # synchronise: pass the group.
        group = dist.group.WORLD if has_nccl_group() else None
        return layers["iabn_sync"](channels, activation=activation, activation_param=LEAKY_SLOPE, group=group)


class AbsWeightBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that scales by ``|weight| + eps``, as the (invertible) in-place layers do."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise B×C×H×W with batch statistics in training, running ones in evaluation."""
        self._check_input_dim(input)
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight.abs() + self.eps,
            self.bias,
            self.training,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


def norm_layers(module: nn.Module) -> Iterator[nn.Module]:
    """All batch norm layers in ``module``, of any kind."""
    for layer in module.modules():
        # inplace-abn's layers are no subclasses of torch's; only they have ``activation_param``.
        if isinstance(layer, _BatchNorm) or hasattr(layer, "activation_param"):
            yield layer


def scales_by_magnitude(norm: nn.Module) -> bool:
    """Whether a norm layer scales by ``|weight| + eps``, as the in-place layers do."""
    return isinstance(norm, AbsWeightBatchNorm2d) or hasattr(norm, "activation_param")


def has_nccl_group() -> bool:
    """Whether statistics can be synchronised: the kernels need CUDA tensors and an NCCL group."""
    return dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend()


def _supported_dtype(x: Tensor) -> Tensor:
    """``x`` in a type that inplace-abn's kernels support: no bfloat16, float16 only on CUDA."""
    if x.dtype in (torch.float32, torch.float64) or (x.is_cuda and x.dtype == torch.float16):
        return x
    return x.float()


@cache
def _in_place_layers() -> dict[str, Any]:
    """The in-place layer classes, extended to accept autocast's types."""
    package = _import_inplace_abn()

    class InPlaceABN(package.InPlaceABN):  # type: ignore[name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(_supported_dtype(x))

    class InPlaceABNSync(package.InPlaceABNSync):  # type: ignore[name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(_supported_dtype(x))

        def __deepcopy__(self, memo: dict[int, Any]) -> InPlaceABNSync:
            # The copy shares the process group, which cannot be copied.
            memo[id(self.group)] = self.group
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return copied

    return {"iabn": InPlaceABN, "iabn_sync": InPlaceABNSync}


def _import_inplace_abn() -> ModuleType:
    try:
        import inplace_abn
    except ImportError as error:
        raise UserError(
            "--norm_act iabn and iabn_sync need the package inplace-abn: "
            "`pip install --no-build-isolation inplace-abn`, or use --norm_act std, sync or abn; for a "
            "checkpoint that was trained with them iabn_sync_test"
        ) from error
    return inplace_abn
