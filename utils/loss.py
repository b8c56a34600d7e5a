"""Loss functions of continual semantic segmentation: the formulas, on tensors only.

Contents, by method:
    shared parts        ``downsample_labels``
    classification      ``BCEWithLogitsLossWithIgnoreIndex``, ``FocalLoss``
    iCaRL               ``IcarlLoss``
    LwF                 ``KnowledgeDistillationLoss``
    ILT                 ``DistillationEncoderLoss``
    CIL                 ``CILDistillationLoss``
    MiB                 ``UnbiasedCrossEntropy``, ``UnbiasedKnowledgeDistillationLoss``
    SDR                 ``Prototypes``, ``FeaturesClusteringSeparationLoss``,
                        ``DistillationEncoderPrototypesLoss``, ``FeaturesSparsificationLoss``, ``SNNL``
    PLOP                ``LocalPODLoss``, ``entropy``, pseudo-labels and their thresholds
    SSUL                ``sigmoid_pseudo_labels``
    RCIL                ``fold_branches``, ``branch_weights``, ``PooledCubeDistillationLoss``
    DFT*                ``trainable_parts``
    SATS                ``AttentionTransferLoss``
    EWF                 ``fuse_weights``
    LGKD                ``LabelGuidedKnowledgeDistillationLoss``
    NeST                ``ImportanceMatrices``, ``ClassifierTransform``
    DKD                 ``MBCELoss``, ``SigmoidDistillationLoss``, ``DecomposedDistillationLoss``,
                        ``AuxiliaryLoss``, ``sigmoid_prediction``, exemplars' classes
    STAR                ``OldClassFeaturesMaintainingLoss``, ``SimilarityAwareDiscriminativeLoss``,
                        ``FeatureStatistics``, replayed features

The module imports only torch and ``loss_kernels``, so it can be copied into another code base. Where
``loss_kernels.gain`` is true (on the CPU), a faster implementation of the formula below it runs; without
these lines, ``loss_kernels`` is not needed.

Conventions
    * Tensors are batch first: logits and feature maps B×C×H×W, targets and labels B×H×W (integers).
    * ``255`` is void. A void pixel is ignored and has no gradient, unless a docstring says otherwise.
    * Labels may be larger than the feature maps: they are downsampled as ``F.interpolate(mode="nearest")``
      does.
    * ``reduction`` is ``"mean"``, ``"sum"`` or ``"none"``. A mean over an empty set is 0, with zero gradient.
    * Entropies and log-probabilities are in nats, unless a docstring says otherwise.
    * All computation is in float32, also under autocast, and without device-to-host synchronisation.
    * ``fidelity="paper"`` computes the published formula, ``fidelity="released"`` what the released code
      computes where that differs; each docstring names the differences.
    * An unknown choice raises ValueError and lists the choices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from utils import loss_kernels

VOID = 255
FIDELITIES = ("paper", "released")

# ── Shared parts ────────────────────────────────────────────────────────────────────────────────────────


def _check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}")
    return value


def _reduce(loss: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    """Reduce a loss map; ``count`` is the number of elements in the mean (default: all of them)."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (max(loss.numel(), 1) if count is None else count.clamp(min=1))


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Context that keeps matrix products in float32, which autocast would lower."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _classify(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution in float32, also under autocast: B×D×h×w, C×D, C → B×C×h×w.

    On CUDA it is a matrix product: cuDNN's convolutions, backward passes included, round float32 to TF32 by
    default.
    """
    with _without_autocast(features):
        if features.device.type == "cuda":
            scores = (weight @ features.flatten(2)).unflatten(2, features.shape[2:])
            return scores if bias is None else scores + bias[:, None, None]
        return F.conv2d(features, weight[:, :, None, None], bias)


def downsample_labels(labels: Tensor, size: Sequence[int], mode: str = "nearest") -> Tensor:
    """Downsample labels to the size of a feature map by nearest-neighbour interpolation.

    Args:
        labels: B×H×W, any integer type.
        size: (h, w).
        mode: ``"nearest"`` (as SDR's released code) or ``"nearest-exact"`` (Pillow's, as SATS's code).

    Returns:
        B×h×w int64.
    """
    height, width = labels.shape[-2:]
    if (height, width) != (size[0], size[1]):
        # Interpolates h + w indices with torch's own rounding instead of B·H·W labels.
        rows = torch.arange(height, dtype=torch.float64, device=labels.device).view(1, 1, -1, 1)
        columns = torch.arange(width, dtype=torch.float64, device=labels.device).view(1, 1, 1, -1)
        rows = F.interpolate(rows, size=(size[0], 1), mode=mode).long().view(-1, 1)
        columns = F.interpolate(columns, size=(1, size[1]), mode=mode).long().view(1, -1)
        labels = labels[:, rows, columns]
    return labels.long()


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """B×N labels → B×C×N float32; labels outside 0..C-1 (void) give a column of zeros."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1)
    return (labels[:, None, :] == classes).float()


def _at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """``values`` (C) indexed by labels of any shape; 0 for labels outside 0..C-1."""
    padded = torch.cat([values, values.new_zeros(1)])
    inside = (labels >= 0) & (labels < values.shape[0])
    return padded[torch.where(inside, labels, values.shape[0])]


def _class_sums(features: Tensor, one_hot: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of the feature vectors of each class: features B×D×N, one-hot B×C×N → C×D.

    ``dtype``: type of the sum over images; default: that of the features.
    """
    with _without_autocast(features):
        return torch.bmm(one_hot, features.transpose(1, 2)).sum(0, dtype=dtype)


# ── Classification ──────────────────────────────────────────────────────────────────────────────────────


def _one_hot_targets(inputs: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """One-hot targets shaped like ``inputs`` (zeros where void) and the B×H×W mask of non-void pixels."""
    valid = targets != ignore_index
    index = torch.where(valid, targets, 0).long()[:, None]
    one_hot = torch.zeros_like(inputs).scatter_(1, index, valid[:, None].to(inputs.dtype))
    return one_hot, valid


class BCEWithLogitsLossWithIgnoreIndex(nn.Module):
    """Binary cross-entropy against the one-hot target, summed over classes (MiB's code).

    −Σ_c [y_c·log σ(x_c) + (1 − y_c)·log(1 − σ(x_c))] at each pixel.

    Args:
        reduction: ``"mean"`` is over the non-void pixels.
        ignore_index: void.
    """

    def __init__(self, reduction: str = "mean", ignore_index: int = VOID) -> None:
        super().__init__()
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs B×C×H×W logits, targets B×H×W → scalar, or B×H×W with ``reduction="none"``."""
        inputs = inputs.float()
        one_hot, valid = _one_hot_targets(inputs, targets, self.ignore_index)
        loss = F.binary_cross_entropy_with_logits(inputs, one_hot, reduction="none").sum(dim=1) * valid
        return _reduce(loss, self.reduction, valid.sum())


class FocalLoss(nn.Module):
    """Focal loss (arXiv 1708.02002): −α·(1 − p)^γ·log p with p = softmax(x)_y.

    ``"mean"`` is over all pixels; void pixels count as zero.
    """

    def __init__(
        self, alpha: float = 1.0, gamma: float = 2.0, reduction: str = "mean", ignore_index: int = VOID
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs B×C×H×W logits, targets B×H×W → scalar, or B×H×W with ``reduction="none"``."""
        ce = F.cross_entropy(inputs.float(), targets.long(), reduction="none", ignore_index=self.ignore_index)
        # expm1 keeps 1 − p precise where p is close to 1.
        loss = self.alpha * (-torch.expm1(-ce)) ** self.gamma * ce
        return _reduce(loss, self.reduction)


# ── iCaRL (arXiv 1611.07725) ────────────────────────────────────────────────────────────────────────────


class IcarlLoss(nn.Module):
    """Binary cross-entropy in which the old channels' targets are the teacher's sigmoids (iCaRL 1611.07725).

    Void pixels are distilled too, with target 0 for the new channels, as in the released code.

    Args:
        reduction: ``"mean"`` is over all pixels.
        ignore_index: void.
        bkg: use the ground truth for the background channel.
    """

    def __init__(self, reduction: str = "mean", ignore_index: int = VOID, bkg: bool = False) -> None:
        super().__init__()
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index
        self.bkg = bkg

    def forward(self, inputs: Tensor, targets: Tensor, output_old: Tensor) -> Tensor:
        """inputs B×C×H×W logits, targets B×H×W, output_old B×C_old×H×W sigmoids of the teacher → scalar."""
        inputs = inputs.float()
        soft_targets, _ = _one_hot_targets(inputs, targets, self.ignore_index)
        first = 1 if self.bkg else 0
        soft_targets[:, first : output_old.shape[1]] = output_old[:, first:].detach()
        loss = F.binary_cross_entropy_with_logits(inputs, soft_targets, reduction="none").sum(dim=1)
        return _reduce(loss, self.reduction)


# ── LwF (arXiv 1606.09282) ──────────────────────────────────────────────────────────────────────────────


def _distillation(student: Tensor, teacher: Tensor, alpha: float, unbiased: bool) -> Tensor:
    """Map of −Σ_{c<C_old} softmax(α·teacher)_c · log q_c / C_old: B×C×H×W, B×C_old×H×W → B×H×W.

    q is the student's softmax over the old classes; ``unbiased``: over all classes, with the new classes'
    probability added to the background's.
    """
    if loss_kernels.gain(student):
        return loss_kernels.distillation(student, teacher, alpha, unbiased)
    old = teacher.shape[1]
    if unbiased:
        background = torch.cat([student[:, :1], student[:, old:]], dim=1).logsumexp(dim=1, keepdim=True)
        log_total = student.logsumexp(dim=1, keepdim=True)
        log_q = torch.cat([background, student[:, 1:old]], dim=1) - log_total
    else:
        log_q = F.log_softmax(student[:, :old], dim=1)
    return -(F.softmax(alpha * teacher, dim=1) * log_q).mean(dim=1)


class KnowledgeDistillationLoss(nn.Module):
    """Distillation of the teacher's output (LwF, arXiv 1606.09282, as implemented in MiB's code).

    −(1/C_old)·Σ_{c<C_old} softmax(αt)_c · log softmax(x_{<C_old})_c at each pixel.

    Args:
        reduction: ``"mean"`` is over all pixels; masked pixels count as zero.
        alpha: inverse temperature of the teacher's softmax.
    """

    unbiased = False

    def __init__(self, reduction: str = "mean", alpha: float = 1.0) -> None:
        super().__init__()
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.alpha = alpha

    def forward(self, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """inputs B×C×H×W, targets B×C_old×H×W (teacher's logits), mask B×H×W (pixels to keep) → scalar."""
        if inputs.shape[1] < targets.shape[1]:
            raise ValueError(f"the teacher has {targets.shape[1]} classes, the student {inputs.shape[1]}")
        loss = _distillation(inputs.float(), targets.detach().float(), self.alpha, self.unbiased)
        if mask is not None:
            loss = loss * mask
        return _reduce(loss, self.reduction)


# ── ILT (arXiv 1907.13372) ──────────────────────────────────────────────────────────────────────────────


class DistillationEncoderLoss(nn.Module):
    """Mean squared error between the student's and the teacher's features (ILT, arXiv 1907.13372).

    (1/D)·Σ_d (f_d − f_old,d)² at each position.

    Args:
        mask: use only positions whose label is an old class or background.
        loss_de_cosine: 1 − cosine similarity over channels instead of the squared error.
    """

    def __init__(self, mask: bool = False, loss_de_cosine: bool = False) -> None:
        super().__init__()
        self.mask = mask
        self.loss_de_cosine = loss_de_cosine

    def forward(self, features: Tensor, features_old: Tensor, labels: Tensor, classes_old: int) -> Tensor:
        """features, features_old B×D×h×w, labels B×H×W → scalar, the mean over the (masked) positions."""
        features, features_old = features.float(), features_old.detach().float()
        if self.loss_de_cosine:
            # Cloned: autograd saves this operand and refuses tensors of a teacher in inference mode.
            loss = 1.0 - F.cosine_similarity(features, features_old.clone(), dim=1)
        else:
            loss = (features - features_old).square().mean(dim=1)
        if not self.mask:
            return _reduce(loss, "mean")
        chosen = downsample_labels(labels, features.shape[-2:]) < classes_old
        return _reduce(loss * chosen, "mean", chosen.sum())


# ── CIL (arXiv 2005.06050) ──────────────────────────────────────────────────────────────────────────────


class CILDistillationLoss(nn.Module):
    """Distillation weighted by the teacher's entropy (CIL, arXiv 2005.06050).

    −temp²·w·Σ_c p_c·log q_c with w = 1 + gs·entropy₂(p), averaged over the pixels without a new class's label
    (void pixels included). p is the teacher's softmax over the old classes, q the student's over all classes.

    ``fidelity="released"``: the loss in SDR's code: no logarithm, no minus, the teacher's logits padded with
    zeros for the new classes, pixels labelled with an old class excluded, no temperature in the softmax.

    Args:
        gs: factor of the entropy.
        temp: temperature of both softmaxes.
    """

    def __init__(self, gs: float = 1.0, temp: float = 1.0, fidelity: str = "paper") -> None:
        super().__init__()
        self.gs = gs
        self.temp = temp
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)

    def forward(self, outputs: Tensor, outputs_old: Tensor, targets: Tensor) -> Tensor:
        """outputs B×C×H×W, outputs_old B×C_old×H×W logits, targets B×H×W → scalar."""
        outputs, outputs_old = outputs.float(), outputs_old.detach().float()
        old = outputs_old.shape[1]
        if self.fidelity == "released":
            outputs_old = F.pad(outputs_old, (0, 0, 0, 0, 0, outputs.shape[1] - old))
            teacher = F.softmax(outputs_old, dim=1)
            match = (teacher * F.softmax(outputs, dim=1)).sum(dim=1)
            unlabelled = targets == 0
        else:
            teacher = F.softmax(outputs_old / self.temp, dim=1)
            match = -(teacher * F.log_softmax(outputs / self.temp, dim=1)[:, :old]).sum(dim=1)
            unlabelled = targets < old
        unlabelled = unlabelled | (targets == VOID)
        entropy2 = -(teacher * torch.log2(teacher + 1e-8)).sum(dim=1)
        weight = (1.0 + self.gs * entropy2) * unlabelled
        return self.temp**2 * (weight * match).sum() / unlabelled.sum().clamp(min=1)


# ── MiB (arXiv 2002.00718) ──────────────────────────────────────────────────────────────────────────────


def _unbiased_cross_entropy(logits: Tensor, targets: Tensor, classes_old: int, ignore_index: int) -> Tensor:
    """Map of −log P(y): B×C×H×W, B×H×W → B×H×W, 0 where void.

    P(y) = softmax_y for a new class, Σ_{c<classes_old} softmax_c for an old one.
    """
    if loss_kernels.gain(logits):
        return loss_kernels.unbiased_cross_entropy(logits, targets, classes_old, ignore_index)
    log_old, log_new = logits[:, :classes_old].logsumexp(dim=1), logits[:, classes_old:].logsumexp(dim=1)
    is_new = (targets >= classes_old) & (targets != ignore_index)
    at_target = logits.gather(1, torch.where(is_new, targets, 0)[:, None])[:, 0]
    as_new = torch.logaddexp(log_old, log_new) - at_target
    as_old = F.softplus(log_new - log_old)  # precise where P(old) is close to 1
    return torch.where(is_new, as_new, as_old).masked_fill(targets == ignore_index, 0.0)


class UnbiasedCrossEntropy(nn.Module):
    """Cross-entropy in which the old classes count as background (MiB, arXiv 2002.00718).

    −log softmax(x)_y for a new class y, −log Σ_{c<old_cl} softmax(x)_c for any other target.

    Args:
        old_cl: number of old classes, background included; targets below it become background.
        reduction: ``"mean"`` is over the non-void pixels.
        ignore_index: void.
    """

    def __init__(self, old_cl: int, reduction: str = "mean", ignore_index: int = VOID) -> None:
        super().__init__()
        if old_cl < 1:
            raise ValueError(f"old_cl={old_cl}: must be at least 1 (the background)")
        self.old_cl = old_cl
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs B×C×H×W logits, targets B×H×W → scalar, or B×H×W with ``reduction="none"``."""
        targets = targets.long()
        loss = _unbiased_cross_entropy(inputs.float(), targets, self.old_cl, self.ignore_index)
        return _reduce(loss, self.reduction, (targets != self.ignore_index).sum())


class UnbiasedKnowledgeDistillationLoss(KnowledgeDistillationLoss):
    """Distillation in which the student's background includes the new classes (MiB, arXiv 2002.00718).

    −(1/C_old)·Σ_{c<C_old} softmax(αt)_c · log q_c with q = softmax(x) over all classes, but
    q_0 = softmax(x)_0 + Σ_{c≥C_old} softmax(x)_c. Arguments as for :class:`KnowledgeDistillationLoss`.
    """

    unbiased = True


# ── SDR: prototypes, attraction and repulsion, matching, sparsity (arXiv 2103.06342) ────────────────────


class _MixedClassFeatures:
    """Class features as SDR's released code reads them, without its loop over classes.

    The code selects the values of class c from B×D×h×w with a mask, which lists them by image, channel and
    position, and views that list as D×n (n: positions of the class). For B = 1 this is correct; for B > 1 it
    mixes images and channels. Value number s of the list is at row ``s // n`` and column ``s % n``; viewed as
    n×D, as in the matching loss, at column ``s % D``.

    Attributes:
        classes: B×1×N, class of each position, C for void.
        number: B×D×N, s.
        count: B×1×N, n (1 for void).
    """

    def __init__(self, labels: Tensor, one_hot: Tensor, depth: int) -> None:
        self.num_classes = one_hot.shape[1]
        self.depth = depth
        inside = (labels >= 0) & (labels < self.num_classes)
        self.inside = inside[:, None]
        self.classes = torch.where(inside, labels, self.num_classes)[:, None]
        hits = F.pad(one_hot.long(), (0, 0, 0, 1))  # one row of zeros for void
        per_image = hits.sum(dim=2)
        before = per_image.cumsum(dim=0) - per_image
        rank = (hits.cumsum(dim=2) - 1).gather(1, self.classes)
        channel = torch.arange(depth, device=labels.device).view(1, -1, 1)
        here = per_image.gather(1, self.classes[:, 0])[:, None]
        earlier = before.gather(1, self.classes[:, 0])[:, None]
        self.number = (depth * earlier + channel * here + rank).clamp(min=0)
        self.totals = per_image.sum(dim=0)
        self.count = self.totals[self.classes].clamp(min=1)

    def rows(self) -> Tensor:
        """B×D×N index into a flattened (C+1)×D table: class and row of the D×n view."""
        return self.classes * self.depth + self._inside(self.number // self.count)

    def columns_of_depth(self) -> Tensor:
        """B×D×N index into a flattened (C+1)×D table: class and column of the n×D view."""
        return self.classes * self.depth + self.number % self.depth

    def columns(self) -> Tensor:
        """B×D×N column of the D×n view, numbered through all classes; below B·N + 1."""
        first = (self.totals.cumsum(0) - self.totals)[self.classes]
        return self._inside(first + self.number % self.count)

    def _inside(self, index: Tensor) -> Tensor:
        return torch.where(self.inside, index, 0)

    def sums(self, features: Tensor, index: Tensor) -> Tensor:
        """Sum the values of B×D×N features by ``index`` into C×D."""
        table = features.new_zeros((self.num_classes + 1) * self.depth)
        table = table.index_add(0, index.flatten(), features.flatten())
        return table.view(-1, self.depth)[: self.num_classes]

    def look_up(self, table: Tensor, index: Tensor) -> Tensor:
        """Values of a C×D table at ``index`` → B×D×N, 0 where void."""
        return F.pad(table, (0, 0, 0, 1)).flatten()[index]


def _without_background(present: Tensor, fidelity: str) -> Tensor:
    """Mask (C) of the classes present, without class 0; the released code drops the lowest class present."""
    if fidelity == "released":
        return present & (present.cumsum(0) > 1)
    return present & (torch.arange(present.shape[0], device=present.device) != 0)


class Prototypes(nn.Module):
    """Running mean of the feature vectors of each class (SDR).

    ``fidelity="released"``: with more than one image the class's features are read through a mis-shaped view
    (``_MixedClassFeatures``), and ``skip_background`` drops the lowest class present.

    Attributes:
        prototypes: C×D float32, zeros for a class not yet seen.
        count_features: C int64, number of feature vectors averaged.
    """

    prototypes: Tensor
    count_features: Tensor

    def __init__(self, num_classes: int, feat_dim: int, fidelity: str = "paper") -> None:
        super().__init__()
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)
        self.register_buffer("prototypes", torch.zeros(num_classes, feat_dim))
        self.register_buffer("count_features", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        labels: Tensor,
        skip_background: bool = False,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Update the means with a batch.

        Args:
            features: B×D×h×w.
            labels: B×H×W, network class indices; void and indices from C on are ignored.
            skip_background: ignore class 0 (overlapped protocol; disjoint after the first step).
            reduce: sums a tensor over processes (C×(D+1): class sums and counts) and returns it.
        """
        num_classes, depth = self.prototypes.shape
        flat = features.float().flatten(2)
        classes = downsample_labels(labels, features.shape[-2:]).flatten(1)
        one_hot = _one_hot(classes, num_classes)
        if self.fidelity == "released":
            mixed = _MixedClassFeatures(classes, one_hot, depth)
            sums = mixed.sums(flat, mixed.rows())
        else:
            # Summed over images in float64: the mean does not depend on the number of processes.
            sums = _class_sums(flat, one_hot, torch.float64)
        counts = one_hot.sum(dim=(0, 2)).to(sums.dtype)
        if skip_background:
            kept = _without_background(counts > 0, self.fidelity)
            sums, counts = sums * kept[:, None], counts * kept
        if reduce is not None:
            both = reduce(torch.cat([sums, counts[:, None]], dim=1))
            sums, counts = both[:, :-1], both[:, -1]
        total = self.count_features + counts.long()
        step = (sums - counts[:, None] * self.prototypes) / total.clamp(min=1)[:, None]
        self.prototypes += step
        self.count_features.copy_(total)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a state of as many classes or fewer; further classes start at zero.

        Raises:
            ValueError: the state has more classes or another feature dimension.
        """
        saved, own = state_dict["prototypes"].shape, self.prototypes.shape
        if saved[0] > own[0] or saved[1] != own[1]:
            raise ValueError(f"prototypes of shape {tuple(saved)} do not fit into {tuple(own)}")
        grown = dict(state_dict)
        grown["prototypes"] = F.pad(state_dict["prototypes"], (0, 0, 0, own[0] - saved[0]))
        grown["count_features"] = F.pad(state_dict["count_features"], (0, own[0] - saved[0]))
        return super().load_state_dict(grown, strict=strict, assign=assign)


def _class_statistics(
    features: Tensor, prototypes: Tensor, one_hot: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ over positions of weight_c · |feature − prototype_c|², and the sum of each class's features.

    c is the class of the position. features B×D×N, prototypes C×D, one-hot B×C×N, weights C → scalar, C×D.
    """
    if loss_kernels.gain(features):
        return loss_kernels.class_statistics(features, prototypes, one_hot, weights)
    with _without_autocast(features):
        squares = (features - torch.matmul(prototypes.T, one_hot)).square().sum(dim=1)
        return (squares * torch.matmul(weights, one_hot)).sum(), _class_sums(features, one_hot)


class FeaturesClusteringSeparationLoss(nn.Module):
    """Attraction of features to their prototype and repulsion between class means (SDR).

    Attraction: (1/K)·Σ_c mean_{i: y_i=c} (1/D)·|f_i − p_c|² over the K classes present.
    Repulsion: mean of 1/|m_a − m_b| over pairs of distinct class means m in the batch.

    ``fidelity="released"``: with more than one image the class's features are read through a mis-shaped view;
    the attraction's running sum is divided by the number of classes inside the loop over them, so class i of
    K (from 0) has weight K^-(K-i); prototypes are L2-normalised over classes instead of channels;
    ``lfc_nobgr`` drops the lowest class present.

    Args:
        lfc_L2normalized: L2-normalise features and prototypes.
        lfc_nobgr: ignore the background.
        lfc_orth_sep: repulsion by orthogonality: mean product of class means and other classes' prototypes.
        lfc_orth_maxonly: its maximum (at least 0) instead of the mean.
        lfc_sep_clust: weight of the repulsion, applied by the caller; here 0 only gives a repulsion of 0.
        lfc_sep_clust_ison_proto: distances from class means to the prototypes of the classes present,
            including the class itself.
        orth_sep: ``lfc_orth_sep`` under its name in the released constructor.
    """

    def __init__(
        self,
        lfc_L2normalized: bool = False,
        lfc_nobgr: bool = False,
        lfc_orth_sep: bool = False,
        lfc_orth_maxonly: bool = False,
        lfc_sep_clust: float = 1.0,
        lfc_sep_clust_ison_proto: bool = False,
        fidelity: str = "paper",
        orth_sep: bool = False,
    ) -> None:
        super().__init__()
        self.l2_normalized = lfc_L2normalized
        self.no_background = lfc_nobgr
        self.orthogonal = lfc_orth_sep or orth_sep
        self.orthogonal_max = lfc_orth_maxonly
        self.separate = lfc_sep_clust > 0.0
        self.on_prototypes = lfc_sep_clust_ison_proto
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)

    def forward(self, features: Tensor, labels: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """features B×D×h×w, labels B×H×W, prototypes C×D → attraction, repulsion (scalars, unweighted)."""
        flat, prototypes = features.float().flatten(2), prototypes.detach().float()
        classes = downsample_labels(labels, features.shape[-2:]).flatten(1)
        one_hot = _one_hot(classes, prototypes.shape[0])
        counts = one_hot.sum(dim=(0, 2))
        present = counts > 0
        if self.no_background:
            present = _without_background(present, self.fidelity)
        weight = self._class_weights(present) / (counts.clamp(min=1) * prototypes.shape[1])
        if self.fidelity == "released":
            mixed = _MixedClassFeatures(classes, one_hot, flat.shape[1])
            if self.l2_normalized:
                flat = self._normalize_mixed(flat, mixed)
                prototypes = F.normalize(prototypes, dim=0)
            rows = mixed.rows()
            sums = mixed.sums(flat, rows)
            distance = (flat - mixed.look_up(prototypes, rows)).square().sum(dim=1)
            attraction = (distance * _at_labels(weight, classes)).sum()
        else:
            if self.l2_normalized:
                flat, prototypes = F.normalize(flat, dim=1), F.normalize(prototypes, dim=1)
            attraction, sums = _class_statistics(flat, prototypes, one_hot, weight)
        if not self.separate:
            return attraction, attraction.new_zeros(())
        return attraction, self._repulsion(sums / counts.clamp(min=1)[:, None], prototypes, present)

    def _class_weights(self, present: Tensor) -> Tensor:
        """Weight of each class's MSE: 1/K for each of the K classes present, 0 for the others."""
        number = present.sum().clamp(min=1).float()
        if self.fidelity == "paper":
            return present / number
        remaining = present.sum() - present.cumsum(0)
        return present * number ** -(remaining + 1.0)

    @staticmethod
    def _normalize_mixed(flat: Tensor, mixed: _MixedClassFeatures) -> Tensor:
        columns = mixed.columns()
        squares = flat.new_zeros(flat.shape[0] * flat.shape[2] + 1)
        squares = squares.index_add(0, columns.flatten(), (flat.square() * mixed.inside).flatten())
        # Clamped before the square root: finite gradient for an all-zero column (F.normalize: 1e-12).
        return flat / squares.clamp(min=1e-24).sqrt()[columns]

    def _repulsion(self, means: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
        if self.orthogonal:
            return self._orthogonality(means, prototypes, present)
        others = prototypes if self.on_prototypes else means
        with _without_autocast(means):
            distance = torch.cdist(
                means[None], others[None], compute_mode="donot_use_mm_for_euclid_dist"
            ).squeeze(0)
        # Excludes pairs of equal means, which include each mean with itself.
        pairs = present[:, None] & present[None, :] & (distance > 0)
        inverse = torch.where(pairs, 1.0 / torch.where(pairs, distance, 1.0), 0.0)
        return _reduce(inverse, "mean", pairs.sum())

    def _orthogonality(self, means: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
        with _without_autocast(means):
            products = prototypes @ means.T
        own = torch.eye(products.shape[0], dtype=torch.bool, device=products.device)
        products = products.masked_fill(own, 0.0)
        if self.orthogonal_max:
            products = products.masked_fill(~present[None, :], -math.inf)
            return torch.where(present.any(), products.max(), 0.0)
        return _reduce(products * present, "mean", present.sum() * (products.shape[0] - 1))


class DistillationEncoderPrototypesLoss(nn.Module):
    """Prototype matching: distance of an old class's features from its prototype (SDR).

    The classes are pseudo-labels: the teacher's argmax where the label is background; without a teacher
    (sequential protocol) the labels of the old classes. Background is ignored.

    ``fidelity="released"``: the class's features are read through a mis-shaped view, also for B = 1.

    Args:
        sumafter: MSE between the class's mean feature and its prototype, averaged over classes. Otherwise the
            mean over the class's features of their MSE to the prototype, summed over classes.
    """

    def __init__(self, sumafter: bool = False, fidelity: str = "paper") -> None:
        super().__init__()
        self.sumafter = sumafter
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        outputs_old: Tensor | None,
        prototypes: Tensor,
        classes_old: int,
    ) -> Tensor:
        """features B×D×h×w, labels B×H×W, outputs_old B×C_old×H×W or None, prototypes C×D → scalar."""
        flat = features.float().flatten(2)
        prototypes = prototypes.detach().float()[:classes_old]
        classes = self._pseudo_labels(labels, outputs_old, classes_old, features.shape[-2:]).flatten(1)
        one_hot = _one_hot(classes, prototypes.shape[0])
        counts = one_hot.sum(dim=(0, 2))
        present = counts > 0
        weight = present / (counts.clamp(min=1) * prototypes.shape[1])
        if self.fidelity == "released":
            mixed = _MixedClassFeatures(classes, one_hot, flat.shape[1])
            index = mixed.columns_of_depth()
            if not self.sumafter:
                distance = (flat - mixed.look_up(prototypes, index)).square().sum(dim=1)
                return (distance * _at_labels(weight, classes)).sum()
            sums = mixed.sums(flat, index)
        elif self.sumafter:
            sums = _class_sums(flat, one_hot)
        else:
            return _class_statistics(flat, prototypes, one_hot, weight)[0]
        errors = (sums / counts.clamp(min=1)[:, None] - prototypes).square().mean(dim=1)
        return _reduce(errors * present, "mean", present.sum())

    @staticmethod
    def _pseudo_labels(
        labels: Tensor, outputs_old: Tensor | None, classes_old: int, size: Sequence[int]
    ) -> Tensor:
        """B×h×w: old classes without the background, void elsewhere."""
        small = downsample_labels(labels, size)
        if outputs_old is None:
            return torch.where((small > 0) & (small < classes_old), small, VOID)
        # Argmax of the sampled pixels only: equal to sampling the argmax, and cheaper.
        height, width = outputs_old.shape[-2:]
        pixels = torch.arange(height * width, device=labels.device).view(1, height, width)
        picked = outputs_old.detach().flatten(2)[:, :, downsample_labels(pixels, size).flatten()]
        guess = picked.argmax(dim=1).view(small.shape)
        return torch.where((small == 0) & (guess > 0), guess, VOID)


NORMALIZATIONS = ("L1", "L2", "max_foreachfeature", "max_maskedforclass", "max_overall", "softmax")
_SHRINK: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": torch.square,
    "power3": lambda values: values**3,
    "exponential": torch.exp,
}


def _by_group_maximum(features: Tensor, groups: Tensor, number: int, eps: float) -> Tensor:
    """Features B×D×h×w divided by the maximum of their position's group; groups B×h×w in 0..number-1."""
    table = features.new_full((number,), -math.inf)
    highest = table.scatter_reduce(0, groups.flatten(), features.amax(dim=1).flatten(), "amax")
    return features / (highest[groups] + eps)[:, None]


def _max_ratio(
    features: Tensor, groups: Tensor, number: int, shrinking: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Σ_d shrink(g_d) / (Σ_d g_d + ε) with g = f / (maximum of the position's group + ε), and Σ_d g_d.

    Two maps B×h×w, the second without gradient. Arguments as in ``_by_group_maximum``.
    """
    if loss_kernels.gain(features):
        return loss_kernels.max_ratio(features, groups, number, shrinking, eps)
    normalized = _by_group_maximum(features, groups, number, eps)
    summed = normalized.sum(dim=1)
    return _SHRINK[shrinking](normalized).sum(dim=1) / (summed + eps), summed.detach()


class FeaturesSparsificationLoss(nn.Module):
    """Sparsity of the features over channels (SDR): mean of Σ_d shrink(f_d) / Σ_d f_d.

    Args:
        lfs_normalization: ``L1``, ``L2``, ``softmax`` over channels; ``max_foreachfeature``: divide by the
            position's maximum, ``max_maskedforclass``: by the maximum over the position's class,
            ``max_overall``: by the batch's maximum.
        lfs_shrinkingfn: ``squared``, ``power3`` or ``exponential``.
        lfs_loss_fn_touse: ``ratio`` as above; ``lasso``: half the sum of |f| over the batch, before the
            normalisation; ``entropy``: Σ_d −f·log f, for L1 and softmax; ``max_minus_ratio``: 0, as the
            released code names it without computing anything.
        reduction: ``"mean"`` or ``"sum"`` over positions.
        fidelity: ``"released"``: under ``max_maskedforclass`` a batch of background only has loss 0.

    The labels only group positions by class for ``max_maskedforclass``. Void is a group of its own and counts
    in the mean.
    """

    _EPS = 1e-15

    def __init__(
        self,
        lfs_normalization: str = "max_foreachfeature",
        lfs_shrinkingfn: str = "squared",
        lfs_loss_fn_touse: str = "ratio",
        reduction: str = "mean",
        fidelity: str = "paper",
    ) -> None:
        super().__init__()
        self.normalization = _check_choice("lfs_normalization", lfs_normalization, NORMALIZATIONS)
        self.shrinking = _check_choice("lfs_shrinkingfn", lfs_shrinkingfn, tuple(_SHRINK))
        self.function = _check_choice(
            "lfs_loss_fn_touse", lfs_loss_fn_touse, ("ratio", "max_minus_ratio", "lasso", "entropy")
        )
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum"))
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features B×D×h×w, labels B×H×W → scalar."""
        features = features.float()
        if self.function == "max_minus_ratio":
            return features.sum() * 0.0
        classes = downsample_labels(labels, features.shape[-2:])
        if self.function == "ratio" and self.normalization.startswith("max_"):
            groups, number = self._groups(classes)
            loss, summed = _max_ratio(features, groups, number, self.shrinking, self._EPS)
        else:
            normalized = self._normalize(features, classes)
            summed = normalized.detach().sum(dim=1)
            if self.function == "ratio":
                loss = _SHRINK[self.shrinking](normalized).sum(dim=1) / (normalized.sum(dim=1) + self._EPS)
            elif self.function == "lasso":
                loss = features.abs().sum() / 2
            else:
                loss = -(normalized * torch.log(normalized + 1e-10)).sum(dim=1)
        nonzero = summed.sum() > 0
        if self.fidelity == "released" and self.normalization == "max_maskedforclass":
            nonzero = nonzero & (classes != 0).any()
        return _reduce(torch.where(nonzero, loss, 0.0), self.reduction)

    def _groups(self, classes: Tensor) -> tuple[Tensor, int]:
        """Group index of each position (B×h×w), and the number of groups; a group shares one maximum."""
        if self.normalization == "max_foreachfeature":
            return torch.arange(classes.numel(), device=classes.device).view_as(classes), classes.numel()
        if self.normalization == "max_overall":
            return torch.zeros_like(classes), 1
        return classes, VOID + 1

    def _normalize(self, features: Tensor, classes: Tensor) -> Tensor:
        if self.normalization == "L1":
            return F.normalize(features, p=1.0, dim=1)
        if self.normalization == "L2":
            return F.normalize(features, p=2.0, dim=1)
        if self.normalization == "softmax":
            return F.softmax(features, dim=1)
        return _by_group_maximum(features, *self._groups(classes), self._EPS)


class SNNL(nn.Module):
    """Soft nearest neighbour loss over the positions of a batch (arXiv 1902.01889).

    −mean_i log( Σ_{j≠i, y_j=y_i} exp(−|x_i−x_j|²/T) / Σ_{j≠i} exp(−|x_i−x_j|²/T) ). Void positions, and those
    without another of their class, are ignored. Pairs are computed in chunks and recomputed in the backward
    pass, so memory is linear in the number of positions.

    ``fidelity="released"``: SDR's code views B×D×h×w as (B·h·w)×D without permuting axes.

    Args:
        temperature: T.
        chunk: number of positions i per chunk.
    """

    def __init__(self, temperature: float = 1.0, chunk: int = 512, fidelity: str = "paper") -> None:
        super().__init__()
        self.temperature = temperature
        self.chunk = chunk
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features B×D×h×w, labels B×H×W → scalar."""
        features = features.float()
        classes = downsample_labels(labels, features.shape[-2:]).flatten()
        if self.fidelity == "released":
            vectors = features.reshape(-1, features.shape[1])
        else:
            vectors = features.permute(0, 2, 3, 1).flatten(0, 2)
        # Centred: distances stay the same, and |x|² − 2xy + |y|² loses less precision for short vectors.
        vectors = vectors - vectors.detach().mean(dim=0)
        total, number = vectors.sum() * 0.0, vectors.new_zeros(())
        for start in range(0, vectors.shape[0], self.chunk):
            loss, used = checkpoint(self._rows, vectors, classes, start, use_reentrant=False)
            total, number = total + loss, number + used
        return total / number.clamp(min=1)

    def _rows(self, vectors: Tensor, classes: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the rows of one chunk, and their number."""
        rows = vectors[start : start + self.chunk]
        squares = vectors.square().sum(dim=1)
        with _without_autocast(vectors):
            products = rows @ vectors.T
        distance = (squares[start : start + self.chunk, None] + squares - 2.0 * products).clamp(min=0.0)
        index = torch.arange(vectors.shape[0], device=vectors.device)
        mine = index[start : start + self.chunk, None]
        others = (mine != index) & (classes != VOID)
        same = others & (classes[start : start + self.chunk, None] == classes)
        usable = same.any(dim=1)
        # Rows without a pair are not masked: −inf − −inf would make the gradient NaN.
        scores = -distance / self.temperature
        log_all = scores.masked_fill(~others & usable[:, None], -math.inf).logsumexp(dim=1)
        log_same = scores.masked_fill(~same & usable[:, None], -math.inf).logsumexp(dim=1)
        return ((log_all - log_same) * usable).sum(), usable.sum()


# ── PLOP: local POD and pseudo-labels (arXiv 2011.11390) ────────────────────────────────────────────────


_POD_PREPROS: dict[str, Callable[[Tensor], Tensor]] = {
    "pow": torch.square,
    "abs": torch.abs,
    "relu": torch.relu,
    "none": lambda maps: maps,
}
_POD_TYPES = ("spatial", "local", "global")
_POD_SWITCH = frozenset({"type", "factor", "norm", "prepro"})
_POD_SWITCH_AFTER = _POD_SWITCH | {"extra_channels", "spp_scales", "use_pod_schedule"}


class LocalPODLoss(nn.Module):
    """Distance between pooled feature maps of teacher and student (PLOP).

    Each map is preprocessed (squared) and averaged over the rows and the columns of the cells of an s×s grid,
    for each scale s. Loss: L2 norm of the difference over all these values of an image, mean over the batch,
    times a factor, times sqrt(classes now / new classes), mean over maps. If the last map of the student has
    more channels, the new classes' are added to the background's, or cut off. Cells are squares of side
    width // s, as in the released code: pixels right of the grid or below it are ignored, and in maps wider
    than high the lower cells are cut off at the edge.

    Args:
        pod_factor: factor of every map.
        pod_options: PLOP's ``--pod_options``: ``{"switch": {"before": {...}, "after": {...},
            "normalize_per_scale": False | True | "spm"}, "difference_function": "frobenius" | "l1",
            "difference_function_all": ...}``. ``before`` sets options of all maps (of the last unless
            ``after`` does), ``after`` those of the last: ``type``, ``factor``, ``norm``, ``prepro``, and in
            ``after`` also ``extra_channels`` (``sum`` or ``trim``), ``spp_scales``, ``use_pod_schedule``.
            ``difference_function`` is for the last map, ``..._all`` for the others.
        spp_scales: grid sizes.
        use_pod_schedule: multiply by sqrt(classes now / new classes).
        pod: ``local``; ``spatial``: sums over whole rows and columns; ``global``: sums over rows and columns
            of the average-pooled map.
        pod_prepro: ``pow`` (square), ``abs``, ``relu`` or ``none``.
        pod_apply: ``all`` maps; ``backbone``: the first ``backbone_maps``; ``deeplab``: the rest. (The
            released code accepts the option and uses all maps.)
        backbone_maps: number of maps that come from the backbone.

    Raises:
        ValueError: an unknown choice; in ``pod_options`` an unknown key, a factor that is not a number or
            scales that are not positive integers.
    """

    def __init__(
        self,
        pod_factor: float = 1.0,
        pod_options: dict[str, Any] | None = None,
        spp_scales: Sequence[int] = (1, 2, 4),
        use_pod_schedule: bool = True,
        pod: str = "local",
        pod_prepro: str = "pow",
        pod_apply: str = "all",
        backbone_maps: int = 4,
    ) -> None:
        super().__init__()
        self.pod_apply = _check_choice("pod_apply", pod_apply, ("all", "backbone", "deeplab"))
        self.backbone_maps = backbone_maps
        options = dict(pod_options or {})
        switch = dict(options.pop("switch", None) or {})
        before, after = dict(switch.pop("before", {})), dict(switch.pop("after", {}))
        common: dict[str, Any] = {
            "type": pod,
            "factor": pod_factor,
            "prepro": pod_prepro,
            "norm": False,
            "spp_scales": spp_scales,
            "use_pod_schedule": use_pod_schedule,
            "extra_channels": "sum",
            "normalize_per_scale": switch.pop("normalize_per_scale", False),
        }
        last_difference = options.pop("difference_function", "frobenius")
        difference = options.pop("difference_function_all", "frobenius")
        unknown = {*options, *switch, *(before.keys() - _POD_SWITCH), *(after.keys() - _POD_SWITCH_AFTER)}
        if unknown:
            raise ValueError(f"pod_options has unknown keys: {', '.join(sorted(unknown))}")
        self.others = {**common, **before, "difference": difference}
        # As in the released loop, "before" also applies to the last map, except for the normalisation.
        self.last = {**common, **before, "norm": False, **after, "difference": last_difference}
        for choice in (self.others, self.last):
            _check_choice("pod", choice["type"], _POD_TYPES)
            _check_choice("pod_prepro", choice["prepro"], tuple(_POD_PREPROS))
            _check_choice("extra_channels", choice["extra_channels"], ("sum", "trim"))
            _check_choice("difference_function", choice["difference"], ("frobenius", "l1"))
            if not isinstance(choice["factor"], (int, float)):
                raise ValueError(f"factor {choice['factor']!r} is not a number")
            if not _are_grids(choice["spp_scales"]):
                raise ValueError(f"spp_scales {choice['spp_scales']!r} is not a list of positive integers")

    @property
    def finest_grid(self) -> int:
        """Cells per side of the finest grid of local pooling; 1 without local pooling."""
        local = (choice["spp_scales"] for choice in (self.others, self.last) if choice["type"] == "local")
        return max((max(scales) for scales in local), default=1)

    def forward(
        self,
        features_old: Sequence[Tensor],
        features: Sequence[Tensor],
        nb_current_classes: int,
        nb_new_classes: int,
        index_new_class: int,
    ) -> Tensor:
        """Lists of B×D_i×h_i×w_i maps; index_new_class: channel of the first new class → scalar."""
        if len(features_old) != len(features) or not features:
            raise ValueError(f"{len(features_old)} maps of the teacher, {len(features)} of the student")
        schedule = math.sqrt(nb_current_classes / nb_new_classes)
        chosen = self._chosen(len(features))
        loss = features[0].new_zeros((), dtype=torch.float32)
        for position in chosen:
            options = self.last if position == len(features) - 1 else self.others
            old, new = features_old[position].detach().float(), features[position].float()
            if old.shape[1] != new.shape[1]:
                new = _fold_new_channels(new, index_new_class, options["extra_channels"])
            if old.shape != new.shape:
                raise ValueError(f"map {position}: {tuple(old.shape)} against {tuple(new.shape)}")
            weight = options["factor"] * (schedule if options["use_pod_schedule"] else 1.0)
            if options["factor"] > 0.0:
                loss = loss + weight * _reduce(_pod_distance(old, new, options), "mean")
        return loss / max(len(chosen), 1)

    def _chosen(self, number: int) -> range:
        if self.pod_apply == "backbone":
            return range(min(self.backbone_maps, number))
        return range(self.backbone_maps if self.pod_apply == "deeplab" else 0, number)


def _are_grids(scales: object) -> bool:
    if not isinstance(scales, Sequence) or isinstance(scales, str) or not scales:
        return False
    return all(type(scale) is int and scale > 0 for scale in scales)


def _fold_new_channels(logits: Tensor, first_new: int, how: str) -> Tensor:
    """Student logits B×C×h×w → B×first_new×h×w: new channels added to the background, or cut off."""
    if how == "trim":
        return logits[:, :first_new]
    background = logits[:, :1] + logits[:, first_new:].sum(dim=1, keepdim=True)
    return torch.cat([background, logits[:, 1:first_new]], dim=1)


def _pod_distance(old: Tensor, new: Tensor, options: dict[str, Any]) -> Tensor:
    """‖pooled(prepro(new)) − pooled(prepro(old))‖ over all pooled values of an image: B×D×h×w twice → B.

    ``norm``: each side is first divided by its own L2 norm.
    """
    prepro, order = _POD_PREPROS[options["prepro"]], 2 if options["difference"] == "frobenius" else 1
    if options["norm"]:
        pooled_old, pooled_new = (
            F.normalize(torch.cat([part.flatten(1) for part in _pool(prepro(maps), options)], dim=1), dim=1)
            for maps in (old, new)
        )
        return torch.linalg.vector_norm(pooled_new - pooled_old, ord=order, dim=1)

    def per_channel(old: Tensor, new: Tensor) -> Tensor:
        # Pooling is linear: pool the difference once.
        parts = _pool(prepro(new) - prepro(old), options)
        norms = [torch.linalg.vector_norm(part, ord=order, dim=(2, 3)) for part in parts]
        return torch.linalg.vector_norm(torch.stack(norms), ord=order, dim=0)

    if loss_kernels.gain(new):
        if options["type"] == "local" and loss_kernels.nested(new, options["spp_scales"]):
            levels = _local_levels(options)
            return loss_kernels.local_pod_distance(old, new, options["prepro"], order, levels)
        distances = loss_kernels.channel_by_channel(old, new, per_channel)
    else:
        distances = per_channel(old, new)
    return torch.linalg.vector_norm(distances, ord=order, dim=1)


def _pool(maps: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Pooled values of B×D×h×w maps, a list of B×D×·×· parts."""
    if options["type"] == "spatial":
        return [maps.sum(dim=3, keepdim=True), maps.sum(dim=2, keepdim=True)]
    if options["type"] == "global":
        pools = [F.avg_pool2d(maps, kernel_size=maps.shape[-1] // s) for s in options["spp_scales"]]
        return [pool.sum(dim=axis, keepdim=True) for pool in pools for axis in (2, 3)]
    return [part / divisor for s, divisor in _local_levels(options) for part in _cell_means(maps, s)]


def _cell_means(maps: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Means over the rows and over the columns of each cell of an s×s grid on B×D×h×w maps.

    The released code derives the side of the square cells from the width and ignores pixels beyond the grid.
    In maps wider than high, lower cells are cut off at the edge, and cells that begin below it are left out
    (means over no row, which are NaN in the released code).
    """
    side = maps.shape[-1] // scale
    if side == 0:
        raise ValueError(f"a {scale}×{scale} grid does not fit maps of width {maps.shape[-1]}")
    cells = maps[..., : side * scale, : side * scale]
    return F.avg_pool2d(cells, (1, side)), F.avg_pool2d(cells, (side, 1), ceil_mode=True)


def _local_levels(options: dict[str, Any]) -> list[tuple[int, float]]:
    """(scale, divisor of its values) of every grid of local POD."""
    scales, per_scale = options["spp_scales"], options["normalize_per_scale"]
    if per_scale == "spm":
        return [(scale, 2.0 ** (len(scales) - max(level, 1))) for level, scale in enumerate(scales)]
    return [(scale, float(scale**2) if per_scale else 1.0) for scale in scales]


def entropy(probabilities: Tensor, fidelity: str = "paper") -> Tensor:
    """Entropy per pixel: B×C×H×W probabilities → B×H×W.

    ``"paper"``: Shannon entropy divided by log C, from 0 (certain) to 1 (uniform). ``"released"``: the mean
    over classes instead of the sum, which is C times smaller.
    """
    _check_choice("fidelity", fidelity, FIDELITIES)
    probabilities = probabilities.float()
    classes = probabilities.shape[1]
    if fidelity == "released":
        factor = 1.0 / math.log(classes + 1e-8)
        return -factor * (probabilities * torch.log(probabilities + 1e-8)).mean(dim=1)
    total = torch.special.entr(probabilities).sum(dim=1)
    return total / math.log(classes) if classes > 1 else total


def _predict(outputs_old: Tensor, certainty: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The teacher's classes and ``certainty(probabilities)``: B×C×H×W logits → two B×H×W maps."""
    logits = outputs_old.float()
    return logits.argmax(dim=1), certainty(F.softmax(logits, dim=1))


def _highest(probabilities: Tensor) -> Tensor:
    return probabilities.amax(dim=1)


def _scaled_entropy(nb_current_classes: int, fidelity: str) -> Callable[[Tensor], Tensor]:
    """Entropy function of the histogram and the labels; the released code divides by log C once more."""
    divisor = math.log(nb_current_classes) if fidelity == "released" else 1.0
    return lambda probabilities: entropy(probabilities, fidelity) / divisor


@torch.no_grad()
def pseudo_label_histogram(
    outputs_old: Tensor,
    labels: Tensor,
    *,
    nb_current_classes: int,
    nb_bins: int = 100,
    mode: str = "entropy",
    fidelity: str = "paper",
) -> Tensor:
    """Histogram per predicted class of the teacher's entropy or probability on background pixels.

    Sum it over the batches and processes of a step, then call :func:`class_median_thresholds`.

    Args:
        outputs_old: B×C_old×H×W logits of the teacher.
        labels: B×H×W; pixels with label 0 are counted.
        nb_current_classes: number of classes after this step.
        nb_bins: bins over [0, 1]; PLOP uses 100 for the entropy and 20 for the probability.
        mode: ``"entropy"``, or ``"probability"``: the largest probability.
        fidelity: which :func:`entropy`; the released one is divided by log(nb_current_classes) again.

    Returns:
        nb_current_classes×nb_bins int64.
    """
    _check_choice("mode", mode, ("entropy", "probability"))
    measure = _scaled_entropy(nb_current_classes, fidelity) if mode == "entropy" else _highest
    predicted, values = _predict(outputs_old, measure)
    bins = (values * nb_bins).long().clamp(max=nb_bins - 1)
    histogram = bins.new_zeros(nb_current_classes * nb_bins)
    histogram.index_add_(0, (predicted * nb_bins + bins).flatten(), (labels == 0).long().flatten())
    return histogram.view(nb_current_classes, nb_bins)


@torch.no_grad()
def class_median_thresholds(
    histogram: Tensor,
    threshold: float = 1e-3,
    *,
    mode: str = "entropy",
    fidelity: str = "paper",
    infinite_threshold: float | None = None,
) -> Tensor:
    """Median per class from a histogram over [0, 1], bounded by ``threshold``.

    Entropy: max(median, threshold). Probability: min(median, threshold). A class without pixels has median 0.

    ``fidelity="released"``: PLOP's code adds the bin's index instead of its count to the cumulative sum, and
    computes bin numbers by a truncated product; the median can be infinite. SATS's code replaces it by 0.005.

    Args:
        histogram: C×bins counts, see :func:`pseudo_label_histogram`.
        threshold: ``--threshold`` (plus step × ``--step_threshold``).
        infinite_threshold: replaces an infinite median.

    Returns:
        C float32.
    """
    _check_choice("mode", mode, ("entropy", "probability"))
    if _check_choice("fidelity", fidelity, FIDELITIES) == "released":
        median = _released_median(histogram)
    else:
        counts = histogram.double()
        upper = counts.cumsum(dim=1)
        half = counts.sum(dim=1, keepdim=True) / 2
        index = (upper >= half).int().argmax(dim=1, keepdim=True)
        inside = counts.gather(1, index)
        share = (half - upper.gather(1, index) + inside) / inside.clamp(min=1)
        median = ((index + share) / counts.shape[1]).squeeze(1).float()
    median = torch.where(histogram.sum(dim=1) > 0, median, 0.0)
    bounds = median < threshold if mode == "entropy" else median > threshold
    median = torch.where(bounds, threshold, median)
    if infinite_threshold is not None:
        median = torch.where(torch.isinf(median), infinite_threshold, median)
    return median


def _released_median(histogram: Tensor) -> Tensor:
    """PLOP's released median in closed form instead of its loop: C×bins → C."""
    bins = histogram.shape[1]
    borders = [lower / bins for lower in range(bins)]
    steps = torch.tensor([border * bins for border in borders], dtype=torch.float64)
    before = torch.cat([steps.new_zeros(1), steps.cumsum(0)]).to(histogram.device, torch.float32)
    read = torch.tensor([int(border * bins) for border in borders], device=histogram.device)
    counts = histogram[:, read].float()
    half = histogram.sum(dim=1, keepdim=True).float() / 2
    hit = (half >= before[:-1]) & (half <= before[:-1] + counts)
    found = hit.any(dim=1, keepdim=True)
    index = torch.where(found, hit.int().argmax(dim=1, keepdim=True), bins - 1)
    running = torch.where(found, before[index], before[-1])
    border = torch.tensor(borders, device=histogram.device)[index]
    return (border + (half - running) / counts.gather(1, index) * (1 / bins)).squeeze(1)


@torch.no_grad()
def entropy_pseudo_labels(
    outputs_old: Tensor,
    labels: Tensor,
    thresholds: Tensor,
    *,
    nb_current_classes: int,
    classes_old: int | None = None,
    min_factor: float = 0.0,
    fidelity: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Replace old and background labels by the teacher's argmax where its entropy is low enough, else void.

    Args:
        outputs_old: B×C_old×H×W logits of the teacher.
        labels: B×H×W.
        thresholds: nb_current_classes; entropies below it are accepted, per class.
        nb_current_classes: number of classes after this step.
        classes_old: labels below it are old or background; default C_old.
        min_factor: smallest adaptive factor (``--classif_adaptive_min_factor``).
        fidelity: which :func:`entropy`; the released one is divided by log(nb_current_classes) again.

    Returns:
        The new labels (B×H×W int64) and the adaptive factor (B): the fraction of old and background pixels
        that were accepted, 1 for an image without any.
    """
    predicted, uncertainty = _predict(outputs_old, _scaled_entropy(nb_current_classes, fidelity))
    sure = uncertainty < thresholds[predicted]
    candidates = labels < (outputs_old.shape[1] if classes_old is None else classes_old)
    result = torch.where(candidates, torch.where(sure, predicted, VOID), labels.long())
    number = candidates.flatten(1).sum(dim=1)
    accepted = (sure & candidates).flatten(1).sum(dim=1)
    factor = torch.where(number > 0, accepted / number.clamp(min=1), 1.0)
    return result, factor.clamp(min=min_factor)


@torch.no_grad()
def probability_pseudo_labels(
    outputs_old: Tensor,
    labels: Tensor,
    threshold: Tensor | float = 0.0,
    *,
    classes_old: int | None = None,
) -> Tensor:
    """Replace old and background labels by the teacher's argmax, void where its probability is too low.

    ``--pseudo naive``: threshold 0. ``--pseudo threshold_0.8``: a number. ``--pseudo median``: the tensor of
    :func:`class_median_thresholds` with ``mode="probability"``.

    Args:
        outputs_old: B×C_old×H×W logits of the teacher.
        labels: B×H×W.
        threshold: smallest probability accepted, a number or one per class.
        classes_old: labels below it are old or background; default C_old.

    Returns:
        B×H×W int64.
    """
    predicted, highest = _predict(outputs_old, _highest)
    limit = threshold[predicted] if isinstance(threshold, Tensor) else threshold
    candidates = labels < (outputs_old.shape[1] if classes_old is None else classes_old)
    return torch.where(candidates, torch.where(highest < limit, VOID, predicted), labels.long())


@torch.no_grad()
def confidence_pseudo_labels(
    outputs_old: Tensor, labels: Tensor, *, classes_old: int | None = None
) -> tuple[Tensor, Tensor]:
    """``--pseudo confidence``: the teacher's argmax on old and background pixels, and its probability.

    Returns:
        Labels (B×H×W int64) and weights of the classification loss (B×H×W float32, 1 on new pixels).
    """
    predicted, highest = _predict(outputs_old, _highest)
    candidates = labels < (outputs_old.shape[1] if classes_old is None else classes_old)
    return torch.where(candidates, predicted, labels.long()), torch.where(candidates, highest, 1.0)


# ── SSUL (arXiv 2106.11562) ─────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def sigmoid_pseudo_labels(
    outputs_old: Tensor, labels: Tensor, threshold: float = 0.7, *, reserved: int = 1, end: int | None = None
) -> Tensor:
    """SSUL's pseudo-labels: the teacher's class where its sigmoid is high enough.

    Only labels background and unknown are replaced, and only by a class that is neither.

    Args:
        outputs_old: B×C_old×H×W logits of the teacher.
        labels: B×H×W.
        threshold: smallest sigmoid accepted.
        reserved: number of first indices that are not classes: 1 (background) or 2 (background, unknown).
        end: index after the last class, if an "unknown" channel follows; None: all channels are classes.

    Returns:
        B×H×W int64.
    """
    score, predicted = outputs_old.float().sigmoid().max(dim=1)
    classes = predicted >= reserved if end is None else (predicted >= reserved) & (predicted < end)
    accepted = (labels < reserved) & classes & (score >= threshold)
    return torch.where(accepted, predicted, labels.long())


# ── RCIL: two branches that become one, and pooled cube distillation (CVPR 2022) ────────────────────────


def fold_branches(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    eps: float = 1e-5,
    absolute: bool = True,
) -> tuple[Tensor, Tensor]:
    """The convolution that equals the mean of convolutions, each followed by a norm in evaluation mode.

    Args:
        weights: of the convolutions, D×C×k×k.
        biases: of the convolutions, D; None: none.
        norms: γ, β, running mean and running variance of each norm, D.
        eps: of the norms.
        absolute: the norms scale by |γ| + eps (in-place ABN) instead of γ (batch norm).

    Returns:
        Weight D×C×k×k and bias D.
    """
    folded_weights, folded_biases = [], []
    for weight, bias, (gamma, beta, mean, var) in zip(weights, biases, norms, strict=True):
        scale = (gamma.abs() + eps if absolute else gamma) / (var + eps).sqrt()
        folded_weights.append(weight * scale.view(-1, 1, 1, 1))
        folded_biases.append(beta + scale * (-mean if bias is None else bias - mean))
    return torch.stack(folded_weights).mean(0), torch.stack(folded_biases).mean(0)


def branch_weights(draw: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of two branches by a uniform draw: below 0.33 the first, below 0.66 the second, else both half.

    Args:
        draw: of any shape.

    Returns:
        Two tensors of the same shape, with sum 1.
    """
    first = torch.where(draw < 0.33, 1.0, torch.where(draw < 0.66, 0.0, 0.5))
    return first, 1.0 - first


class PooledCubeDistillationLoss(nn.Module):
    """Distance between squared maps of teacher and student, averaged over windows and over channels (RCIL).

    Spatial part: means over square windows of 4, 8, ..., 24 positions at every position, zeros around the
    map. Channel part: means over three neighbouring channels, zeros beyond the first and last. Each is the L2
    norm of the difference over an image, mean over the batch and over the windows, times a factor and
    sqrt(classes now / new classes), mean over maps. The channel part leaves out the last map, the small
    logits, so that the factor of the last map is that of the map before it.

    Args:
        factors: of all maps but the last, and of the last.
    """

    def __init__(self, factors: Sequence[float] = (0.01, 0.0005)) -> None:
        super().__init__()
        self.others, self.last = factors

    def forward(
        self,
        old: Sequence[Tensor],
        new: Sequence[Tensor],
        nb_current_classes: int,
        nb_new_classes: int,
        index_new_class: int,
    ) -> tuple[Tensor, Tensor]:
        """Lists of B×D_i×h_i×w_i maps; index_new_class: channel of the first new class.

        New channels of the student are added to the background's.

        Returns:
            The spatial and the channel part, scalars.
        """
        if len(old) != len(new) or not new:
            raise ValueError(f"{len(old)} maps of the teacher, {len(new)} of the student")
        differences = []
        for position, (before, now) in enumerate(zip(old, new, strict=True)):
            before, now = before.detach().float(), now.float()
            if before.shape[1] != now.shape[1]:
                now = _fold_new_channels(now, index_new_class, "sum")
            if before.shape != now.shape:
                raise ValueError(f"map {position}: {tuple(before.shape)} against {tuple(now.shape)}")
            # Pooling is linear, so the difference is pooled.
            differences.append((now.square() - before.square()).permute(0, 2, 3, 1).contiguous())
        weight = math.sqrt(nb_current_classes / nb_new_classes)
        spatial = self._mean(self._spatial, differences)
        channel = self._mean(self._channel, differences[:-1]) if len(new) > 1 else spatial.new_zeros(())
        return weight * spatial, weight * channel

    def _mean(self, distance: Callable[[Tensor], Tensor], differences: Sequence[Tensor]) -> Tensor:
        """Mean over maps of factor times distance."""
        factors = [self.others] * (len(differences) - 1) + [self.last]
        return torch.stack([f * distance(d) for f, d in zip(factors, differences, strict=True)]).mean()

    @staticmethod
    def _spatial(difference: Tensor) -> Tensor:
        """Mean over images and windows."""
        # Means over rows, then over columns, as products with matrices: on all devices faster than pooling.
        sides = (_window_means(length, difference) for length in difference.shape[1:3])
        pairs = list(zip(*sides, strict=True))
        means = [functools.partial(_multiplied, row, column) for row, column in pairs]
        adjoints = [functools.partial(_multiplied, row.T, column.T) for row, column in pairs]
        return cast(Tensor, _MeanNorm.apply(difference, means, adjoints))

    @staticmethod
    def _channel(difference: Tensor) -> Tensor:
        """Mean over images."""
        means = [_neighbour_means]
        return cast(Tensor, _MeanNorm.apply(difference, means, means))  # a symmetric matrix


_Linear = Callable[[Tensor], Tensor]


class _MeanNorm(torch.autograd.Function):
    """Mean over images and linear functions of ‖f(x)‖, 0 without gradient where it is 0.

    Autograd would keep and write several tensors of the size of x for each f; here one has the gradient.

    Args:
        inputs: B×..., x.
        functions, adjoints: each f, and the product with its transposed matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, functions: Sequence[_Linear], adjoints: Sequence[_Linear]
    ) -> Tensor:
        count = len(functions) * max(len(inputs), 1)
        total, gradient = inputs.new_zeros(()), torch.zeros_like(inputs)
        with _without_autocast(inputs):
            for function, adjoint in zip(functions, adjoints, strict=True):
                found = function(inputs)
                norm = torch.linalg.vector_norm(found.flatten(1), dim=1)
                total += norm.sum() / count
                if ctx.needs_input_grad[0]:
                    factor = torch.where(norm > 0, 1 / (count * norm), 0)
                    gradient += adjoint(found.mul_(factor[:, None, None, None]))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _multiplied(row: Tensor, column: Tensor, maps: Tensor) -> Tensor:
    """B×h×w×D, multiplied by a matrix over h and one over w."""
    return column @ (row @ maps.flatten(2)).unflatten(2, maps.shape[2:])


def _neighbour_means(maps: Tensor) -> Tensor:
    """Means over three neighbours on the last axis, zeros beyond its ends."""
    means = maps / 3
    means[..., 1:].add_(maps[..., :-1], alpha=1 / 3)
    means[..., :-1].add_(maps[..., 1:], alpha=1 / 3)
    return means


def _window_means(length: int, like: Tensor) -> Tensor:
    """Matrices of the means over windows of 4, 8, ..., 24 around each of n positions: 6×(n+1)×n."""
    size = torch.arange(4, 25, 4, device=like.device)[:, None, None]
    start = torch.arange(length + 1, device=like.device)[:, None] - size // 2
    position = torch.arange(length, device=like.device)
    return ((start <= position) & (position < start + size)).to(like.dtype) / size


# ── DFT*: what each step trains, with the classifiers of all steps (arXiv 2508.04267) ───────────────────


def trainable_parts(step: int, steps: int) -> dict[str, Any]:
    """What DFT* trains at a step.

    Args:
        step: from 0.
        steps: number of steps of the task.

    Returns:
        ``body`` and ``head``: whether they are trained (else they are in evaluation mode); ``classifiers``:
        whether each step's classifier is.
    """
    first = step == 0
    return {"body": first, "head": first, "classifiers": [number >= step for number in range(steps)]}


# ── SATS: transfer of self-attention (arXiv 2203.07667) ─────────────────────────────────────────────────


DISTILL_OBJECTS = ("sats-selfattn", "sats-selfattn-GP", "sats-selfattn-NP", "sats-feature-CNN")


class AttentionTransferLoss(nn.Module):
    """Distance between student's and teacher's attention, averaged over class regions (SATS).

    For each stage, image and class (not background, not void), the attention rows of the class's query
    positions are averaged; the L2 distance between student and teacher is averaged over heads, the classes of
    the image, the batch and the stages. An image without a class counts as zero.

    ``fidelity="released"``: B×heads×L×S is reshaped to B×√L×√L×heads×S without permuting axes, which mixes
    heads and positions if there is more than one head; the sum over stages is divided by 4 whatever their
    number.

    Args:
        distill_object: ``sats-selfattn`` as above; ``sats-selfattn-GP``: one region, all positions;
            ``sats-selfattn-NP``: each position separately, no labels; ``sats-feature-CNN``: class means of
            feature maps instead of attention.
        fidelity: see above.
        num_classes: upper bound of the labels except void; if given, a GPU computes fewer regions.
    """

    def __init__(
        self,
        distill_object: str = "sats-selfattn",
        fidelity: str = "paper",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.distill_object = _check_choice("distill_object", distill_object, DISTILL_OBJECTS)
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)
        self.num_classes = num_classes

    def forward(
        self, attentions_old: Sequence[Tensor], attentions: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Lists of B×heads×L×S attention (``sats-feature-CNN``: B×D×h×w maps), labels B×H×W → scalar."""
        if len(attentions_old) != len(attentions) or not attentions:
            raise ValueError(f"{len(attentions_old)} maps of the teacher, {len(attentions)} of the student")
        loss = attentions[0].new_zeros((), dtype=torch.float32)
        for old, new in zip(attentions_old, attentions, strict=True):
            loss = loss + self._stage(old.detach(), new, labels)
        return loss / (4 if self.fidelity == "released" else len(attentions))

    def _stage(self, old: Tensor, new: Tensor, labels: Tensor) -> Tensor:
        """Loss of one stage."""
        size: Sequence[int]
        if self.distill_object == "sats-feature-CNN":
            size = new.shape[-2:]
            old, new = (maps.flatten(2).transpose(1, 2)[:, None] for maps in (old, new))
        else:
            size = _query_grid(new.shape[2], labels.shape[-2:])
            if self.fidelity == "released":
                batch, heads, length, keys = new.shape
                old, new = (maps.reshape(batch, length, heads, keys).transpose(1, 2) for maps in (old, new))
        if self.distill_object == "sats-selfattn-NP":
            return _reduce(torch.linalg.vector_norm(new.float() - old.float(), dim=-1), "mean")
        if self.distill_object == "sats-selfattn-GP":
            region = new.new_ones(new.shape[0], 1, new.shape[2], dtype=torch.float32)
        else:
            region = self._class_regions(downsample_labels(labels, size, "nearest-exact").flatten(1))
        positions = region.sum(dim=2)
        weight = region / positions.clamp(min=1)[:, :, None]
        with _without_autocast(new):
            # The mean is linear: average the difference once. B×heads×K×S
            means = torch.matmul(weight[:, None], new.float() - old.float())
        distance = torch.linalg.vector_norm(means, dim=-1).mean(dim=1)
        present = positions > 0
        return _reduce((distance * present).sum(dim=1) / present.sum(dim=1).clamp(min=1), "mean")

    def _class_regions(self, classes: Tensor) -> Tensor:
        """B×L labels → B×K×L float32 masks, one for each class that may be present."""
        if self.num_classes is None and classes.device.type == "cpu":
            ids = classes.unique()  # no device synchronisation here; keeps K small
            ids = torch.where((ids == 0) | (ids == VOID), -1, ids)
            return (classes[:, None] == ids[:, None]).float() * (ids >= 0)[:, None]
        return _one_hot(classes, self.num_classes or VOID)[:, 1:]


def _query_grid(length: int, label_size: Sequence[int]) -> tuple[int, int]:
    """Height and width of the grid of ``length`` query positions, with the aspect ratio of the labels."""
    height = round(math.sqrt(length * label_size[0] / label_size[1]))
    if height < 1 or length % height:
        raise ValueError(f"{length} query positions do not fit labels of {label_size[0]}×{label_size[1]}")
    return height, length // height


# ── EWF: fusion of old and new weights (Xiao et al., CVPR 2023) ─────────────────────────────────────────


@torch.no_grad()
def fuse_weights(
    old_state: Mapping[str, Tensor],
    new_state: Mapping[str, Tensor],
    new_classes: int,
    old_classes: int,
    share: float | None = None,
) -> dict[str, Tensor]:
    """The new network's state averaged with the old one's: θ = (1 − α)·θ_old + α·θ_new.

    α = sqrt(new_classes / (new_classes + old_classes)). Running statistics are averaged too. Entries that
    only the new state has (the new classifier) and integers (counters of batches) stay as they are.

    Args:
        old_state: state dict of the network before the step.
        new_state: state dict of the network after it, with at least the same entries.
        new_classes: number of classes that the step added.
        old_classes: number of classes before it, background included.
        share: fuse only this share of all numbers, those that changed most; the others keep the new value (an
            option of the released code that the paper does not have; its share is 0.45).
    """
    alpha = math.sqrt(new_classes / (new_classes + old_classes))
    fused = dict(new_state)
    for name, old in old_state.items():
        if old.is_floating_point():
            new, wide = new_state[name], torch.promote_types(old.dtype, torch.float32)
            fused[name] = torch.lerp(old.to(wide), new.to(wide), alpha).to(new.dtype)
    if share is None:
        return fused
    changes = {n: (old - new_state[n]).abs() for n, old in old_state.items() if old.is_floating_point()}
    together = torch.cat([change.flatten() for change in changes.values()])
    least = together.topk(max(int(share * len(together)), 1)).values[-1]
    return fused | {n: torch.where(c >= least, fused[n], new_state[n]) for n, c in changes.items()}


# ── LGKD: label-guided distillation (Yang et al., ICCV 2023) ────────────────────────────────────────────


class LabelGuidedKnowledgeDistillationLoss(nn.Module):
    """Distillation in which a new class's label gets the teacher's probability of the background (LGKD).

    −Σ_{0<c<C_old} q_c·log p_c − q_0·log p_b at each pixel, with q = softmax(α·teacher), p = softmax(student)
    over all classes, and b the label if it is a new class, else the background.

    Args:
        prev_kd: factor on pixels with an old class's or the background's label.
        novel_kd: factor on pixels with a new class's label.
        alpha: inverse temperature of the teacher's softmax.
        reduction: ``"mean"`` is over the non-void pixels.
    """

    def __init__(
        self, prev_kd: float = 1.0, novel_kd: float = 1.0, alpha: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.prev_kd, self.novel_kd, self.alpha = prev_kd, novel_kd, alpha
        self.reduction = _check_choice("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, logits: Tensor, logits_old: Tensor, labels: Tensor) -> Tensor:
        """logits B×C×h×w, logits_old B×C_old×h×w, labels B×H×W → scalar, or B×h×w with ``"none"``."""
        old = logits_old.shape[1]
        labels = downsample_labels(labels, logits.shape[-2:])
        valid = labels != VOID
        is_new = valid & (labels >= old)
        teacher = F.softmax(self.alpha * logits_old.detach().float(), dim=1)
        log_p = F.log_softmax(logits.float(), dim=1)
        log_background = log_p.gather(1, torch.where(is_new, labels, 0)[:, None])
        loss = -(teacher * torch.cat([log_background, log_p[:, 1:old]], dim=1)).sum(dim=1)
        loss = loss * torch.where(is_new, self.novel_kd, self.prev_kd) * valid
        return _reduce(loss, self.reduction, valid.sum())


# ── NeST: new classifiers as a learnt transformation of the old ones (arXiv 2407.14142) ─────────────────


class ImportanceMatrices:
    """Initial M and P of :class:`ClassifierTransform`, from the teacher's output on the step's images (NeST).

    M_ckd is the mean over the pixels of new class c of p_k·[f_d·w_kd > 0], with p the teacher's softmax and
    f its features, both brought to size×size pixels, and w_k its classifiers. P_c is the softmax over k of
    Σ_d M_ckd.

    Args:
        old_classes: number of classes before the step, background included.
        new_classes: number of classes that the step adds.
        feat_dim: channels of the features.
        size: side of the maps, in pixels.

    Attributes:
        sums: new_classes×old_classes×feat_dim, float64; sum it and ``counts`` over all processes before
            :meth:`compute`.
        counts: number of pixels of each new class, float64.
    """

    def __init__(self, old_classes: int, new_classes: int, feat_dim: int, size: int = 128) -> None:
        self.old_classes, self.size = old_classes, (size, size)
        self.sums = torch.zeros(new_classes, old_classes, feat_dim, dtype=torch.float64)
        self.counts = torch.zeros(new_classes, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor, logits_old: Tensor, labels: Tensor, weight_old: Tensor) -> None:
        """Add images; synchronises with the device.

        Args:
            features: B×D×h×w, the teacher's.
            logits_old: B×C_old×H×W, the teacher's, at the size of the images.
            labels: B×H×W.
            weight_old: C_old×D, the teacher's classifiers.
        """
        self.sums, self.counts = self.sums.to(features.device), self.counts.to(features.device)
        features, logits_old = (
            F.interpolate(maps.float(), size=self.size, mode="bilinear", align_corners=False)
            for maps in (features, logits_old)
        )
        labels = downsample_labels(labels, self.size).flatten()
        teacher = F.softmax(logits_old, dim=1).transpose(0, 1).flatten(1)
        features = features.transpose(0, 1).flatten(1)
        with _without_autocast(features):
            for number in range(len(self.counts)):
                chosen = labels == self.old_classes + number
                here, shares = features[:, chosen], teacher[:, chosen]
                # f·w > 0 where both are positive or both are negative.
                for sign in (1, -1):
                    self.sums[number] += (shares @ (sign * here > 0).float().T) * (sign * weight_old > 0)
                self.counts[number] += here.shape[1]

    def compute(self) -> tuple[Tensor, Tensor]:
        """M (new_classes×old_classes×feat_dim) and P (new_classes×old_classes), float32.

        A class without a pixel has M = 0 and equal P; both are NaN in the released code.
        """
        matrices = self.sums / self.counts.clamp(min=1)[:, None, None]
        return matrices.float(), F.softmax(matrices.sum(dim=2), dim=1).float()


class ClassifierTransform(nn.Module):
    """Classifiers whose new part is a transformation of the old ones: w_c = Σ_k P_ck·(M_ck ⊙ w_k) (NeST).

    The background's is transformed as well, ŵ_0 = P_bg·(M_bg ⊙ w_0). Other old weights and all old biases are
    fixed; each new class has a bias.

    Args:
        weight_old: C_old×D, of all old classifiers, background first.
        bias_old: C_old.
        M: N×C_old×D, trained.
        P: N×C_old, trained.
        bias: N, trained.
        M_bg: D, trained; default: ones.
        P_bg: 1, trained; default: one.
    """

    weight_old: Tensor
    bias_old: Tensor

    def __init__(
        self,
        weight_old: Tensor,
        bias_old: Tensor,
        M: Tensor,
        P: Tensor,
        bias: Tensor,
        M_bg: Tensor | None = None,
        P_bg: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_old", weight_old.detach().float())
        self.register_buffer("bias_old", bias_old.detach().float())
        M_bg = torch.ones_like(self.weight_old[0]) if M_bg is None else M_bg
        P_bg = torch.ones_like(self.weight_old[0, :1]) if P_bg is None else P_bg
        self.M, self.P, self.bias, self.M_bg, self.P_bg = (
            nn.Parameter(start.detach().float().clone()) for start in (M, P, bias, M_bg, P_bg)
        )

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The background's weight (D) and the new ones (N×D)."""
        new = (self.P[:, :, None] * self.M * self.weight_old).sum(dim=1)
        return self.P_bg * self.M_bg * self.weight_old[0], new

    def forward(self, features: Tensor) -> Tensor:
        """Features B×D×h×w → logits B×(C_old + N)×h×w, float32."""
        background, new = self._weights()
        weight = torch.cat([background[None], self.weight_old[1:], new])
        return _classify(features.float(), weight, torch.cat([self.bias_old, self.bias]))

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """The classifiers to train: ``weight_new`` (N×D), ``bias_new`` (N), ``weight_background`` (D).

        The background's weight gets its old length. One factor gives the new weights the mean length of the
        old ones; another makes the vector of the new biases as long as that of the old ones.
        """
        background, new = self._weights()
        lengths = torch.linalg.vector_norm(self.weight_old, dim=1)
        return {
            "weight_new": new * _ratio(lengths.mean(), torch.linalg.vector_norm(new, dim=1).mean()),
            "bias_new": self.bias * _ratio(self.bias_old.norm(), self.bias.norm()),
            "weight_background": background * _ratio(lengths[0], background.norm()),
        }


def _ratio(length: Tensor, divisor: Tensor) -> Tensor:
    """``length / divisor``; 0 for a divisor of 0."""
    return torch.where(divisor > 0, length / divisor, 0.0)


# ── DKD: decomposed knowledge distillation (Baek et al., NeurIPS 2022) ──────────────────────────────────
# One sigmoid per foreground class. Channel 0 of the logits is no class (the auxiliary channel), so that a
# class's channel is its index; a pixel is background where no sigmoid is above 0.5.


class MBCELoss(nn.Module):
    """Binary cross-entropy of the new classes (DKD, STAR).

    Σ_c mean of −γ·q·log σ(x_c) − (1 − q)·log(1 − σ(x_c)) with q = [y = c]: every other pixel is a negative of
    class c, void included.

    Args:
        old_classes: number of old classes, background included: the first channel's class.
        pos_weight: γ.
        reduction: ``"mean"``: over images and pixels, summed over classes; ``"classes"``: not summed.
    """

    def __init__(self, old_classes: int, pos_weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.old_classes = old_classes
        self.pos_weight = pos_weight
        self.reduction = _check_choice("reduction", reduction, ("mean", "classes", "none"))

    def forward(self, logits_new: Tensor, labels: Tensor) -> Tensor:
        """logits_new B×N×H×W of the new classes, labels B×H×W → scalar, N (``"classes"``) or B×N×H×W."""
        logits_new = logits_new.float()
        classes = self.old_classes + torch.arange(logits_new.shape[1], device=labels.device)
        positive = (labels[:, None] == classes[:, None, None]).float()
        weight = logits_new.new_full((), self.pos_weight)
        loss = F.binary_cross_entropy_with_logits(logits_new, positive, reduction="none", pos_weight=weight)
        return _reduce_classes(loss, self.reduction)


def _reduce_classes(loss: Tensor, reduction: str) -> Tensor:
    """B×C×h×w → the same (``"none"``), means over images and pixels C (``"classes"``), or their sum."""
    if reduction == "none":
        return loss
    means = loss.sum((0, 2, 3)) / max(loss[:, :1].numel(), 1)
    return means if reduction == "classes" else means.sum()


class SigmoidDistillationLoss(nn.Module):
    """Distillation of the old classes' sigmoids (DKD): Σ_c mean BCE(x_c, σ(t_c)) over old foreground classes.

    Args:
        reduction: ``"mean"``: over images and pixels, summed over classes.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = _check_choice("reduction", reduction, ("mean", "none"))

    def forward(self, logits: Tensor, logits_old: Tensor) -> Tensor:
        """logits B×C×H×W, logits_old B×C_old×H×W, channel 0 is no class → scalar or B×(C_old−1)×H×W."""
        old = logits_old.shape[1]
        return _reduce_classes(_sigmoid_distillation(logits[:, 1:old], logits_old[:, 1:]), self.reduction)


def _sigmoid_distillation(logits: Tensor, logits_old: Tensor) -> Tensor:
    """Map of BCE(x_c, σ(t_c)), shaped like both."""
    target = logits_old.detach().float().sigmoid()
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")


def reasoning_scores(
    features: Tensor, weight: Tensor, sign: str = "positive", fidelity: str = "paper"
) -> Tensor:
    """Sum of the positive, or of the negative, products w_cd·f_d of each class (DKD).

    ``fidelity="released"``: split by the sign of w_cd alone: equal where f ≥ 0 (behind a ReLU).

    Args:
        features: B×D×h×w.
        weight: C×D, classifiers of foreground classes.
        sign: ``"positive"`` or ``"negative"``.

    Returns:
        B×C×h×w; its sum over both signs are the logits without biases.
    """
    which = ("positive", "negative").index(_check_choice("sign", sign, ("positive", "negative")))
    return _reasoning_scores(features, weight, fidelity).chunk(2, dim=1)[which]


def _reasoning_scores(features: Tensor, weight: Tensor, fidelity: str) -> Tensor:
    """B×2C×h×w: the scores of the positive, then of the negative products."""
    features, weight = features.float(), weight.float()
    above, below = weight.clamp(min=0), weight.clamp(max=0)
    scores = _classify(features, torch.cat([above, below]))
    if _check_choice("fidelity", fidelity, FIDELITIES) == "released":
        return scores
    # Products of a negative feature have the other sign than their weight: they change sides. relu has no
    # gradient at 0: a feature of 0 counts as positive.
    moved = _classify(F.relu(-features), above - below)
    return scores + torch.cat([moved, -moved], dim=1)


class DecomposedDistillationLoss(nn.Module):
    """Distillation of the reasoning scores of one sign (DKD): Σ_c mean BCE(s_c, σ(s'_c)) over old classes.

    Args:
        sign: as for :func:`reasoning_scores`, or ``"both"``: the two losses, computed together.
        fidelity: as for :func:`reasoning_scores`.
    """

    def __init__(self, sign: str = "positive", fidelity: str = "paper") -> None:
        super().__init__()
        self.sign = _check_choice("sign", sign, ("positive", "negative", "both"))
        self.fidelity = fidelity

    def forward(self, features: Tensor, features_old: Tensor, weight: Tensor, weight_old: Tensor) -> Tensor:
        """features, features_old B×D×h×w, weight C×D, weight_old K×D of the first K → scalar or two."""
        student = _reasoning_scores(features, weight[: len(weight_old)], self.fidelity)
        teacher = _reasoning_scores(features_old, weight_old, self.fidelity)
        losses = _reduce_classes(_sigmoid_distillation(student, teacher), "classes").view(2, -1).sum(dim=1)
        return losses if self.sign == "both" else losses[int(self.sign == "negative")]


def negatives_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy where every position is a negative of every class: Σ_c mean −log(1 − σ(x_c)).

    Args:
        logits: B×C×h×w.
        mask: B×h×w bool: positions that count; None: all.
    """
    loss = F.softplus(logits.float()).sum(dim=1)
    return _reduce(loss, "mean") if mask is None else _reduce(loss * mask, "mean", mask.sum())


class AuxiliaryLoss(nn.Module):
    """Loss of the auxiliary channel, for which every pixel is a negative (DKD): mean −log(1 − σ(x_0))."""

    def forward(self, logits: Tensor) -> Tensor:
        """logits B×C×H×W → scalar."""
        return negatives_loss(logits[:, :1])


@torch.no_grad()
def sigmoid_prediction(
    logits: Tensor, first: int = 0, threshold: float = 0.5, fidelity: str = "paper"
) -> Tensor:
    """The class with the largest sigmoid where that is above a threshold, else the background, 0 (DKD).

    ``fidelity="released"``: decided on float32 sigmoids: those of small positive logits are 0.5, those of
    large logits are equal, and the first of equal ones wins.

    Args:
        logits: B×C×H×W.
        first: number of first channels that are no class (DKD 1, STAR 0); the next is class 1.
        threshold: of the sigmoid.

    Returns:
        B×H×W int64.
    """
    if _check_choice("fidelity", fidelity, FIDELITIES) == "released":
        largest, index = logits[:, first:].float().sigmoid().max(dim=1)
    else:
        largest, index = logits[:, first:].float().max(dim=1)
        threshold = math.log(threshold / (1 - threshold))
    return torch.where(largest > threshold, index + 1, 0)


def initialise_from_auxiliary(weight: Tensor, bias: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights and biases of new classes: the auxiliary classifier's (DKD).

    Args:
        weight, bias: of the auxiliary classifier, D and 1 numbers.
        classes: number of new classes N.

    Returns:
        N×D and N.
    """
    return weight.detach().reshape(1, -1).repeat(classes, 1), bias.detach().reshape(1).repeat(classes)


@torch.no_grad()
def exemplar_labels(
    labels: Tensor, logits: Tensor, first: int = 0, threshold: float = 0.9, fidelity: str = "paper"
) -> Tensor:
    """Labels whose background is the old network's class where its sigmoid is high enough (DKD-M, STAR-M).

    ``fidelity="released"``: channel 0 is left out whatever ``first`` is. So STAR-M, which has no auxiliary
    channel, never finds class 1 and takes class c + 1 for class c.

    Args:
        labels: B×H×W.
        logits: B×C_old×H×W of the old network.
        first: number of first channels that are no class.
        threshold: smallest sigmoid accepted.

    Returns:
        B×H×W int64.
    """
    first = 1 if _check_choice("fidelity", fidelity, FIDELITIES) == "released" else first
    largest, index = logits[:, first:].float().sigmoid().max(dim=1)
    return torch.where((labels == 0) & (largest >= threshold), index + 1, labels.long())


# ── STAR: replay of features from statistics (Chen et al., NeurIPS 2023) ────────────────────────────────
# One sigmoid per foreground class, as in DKD; channel c of the logits is class c + 1.


class FeatureStatistics:
    """Statistics of the new classes' features, for later replay (STAR).

    With u = f/‖f‖ at the positions of a class: prototype r = normalise(Σ u), mean and standard deviation of
    ‖f‖, noise ν_d = sqrt(mean (u_d − r_d)²). A class without a position has zeros. Sums in float64, of which
    ``sums`` may be added over processes before :meth:`compute`.

    Args:
        old_classes: number of old classes, background included.
        new_classes: number of new classes N.
        feat_dim: D.
        previous: statistics of the old classes (K = old_classes − 1), as :meth:`compute` returns them.
    """

    def __init__(
        self,
        old_classes: int,
        new_classes: int,
        feat_dim: int,
        previous: dict[str, Tensor] | None = None,
    ) -> None:
        self.old_classes = old_classes
        self.feat_dim = feat_dim
        self.previous = previous
        # Of background and new classes: number, Σ‖f‖, Σ‖f‖², Σu, Σu².
        self.sums = torch.zeros(1 + new_classes, 3 + 2 * feat_dim, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features B×D×h×w, labels B×H×W (of the middle of each position's pixels)."""
        labels = downsample_labels(labels, features.shape[-2:], "nearest-exact").flatten(1)
        features = features.double().flatten(2)
        new = self.old_classes + torch.arange(len(self.sums) - 1, device=labels.device)
        norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        units = features / norms.clamp(min=1e-12)
        summands = torch.cat([torch.ones_like(norms), norms, norms.square(), units, units.square()], dim=1)
        one_hot = (labels[:, None] == torch.cat([new.new_zeros(1), new])[:, None]).double()
        self.sums = self.sums.to(features.device) + _class_sums(summands, one_hot)

    def compute(self, fidelity: str = "paper") -> dict[str, Tensor]:
        """The statistics, float32.

        ``fidelity="released"``: the noise of new class j is taken around the j-th prototype of all classes,
        from the second step on an old class's.

        Returns:
            ``numbers`` 1 + N (positions of background and new classes in this step); of old and new classes
            together ``prototypes`` (K+N)×D, ``norm_mean_and_std`` 2×(K+N), ``noise`` (K+N)×D.
        """
        sizes = [1, 1, 1, self.feat_dim, self.feat_dim]
        found, norms, norms_squared, units, squares = self.sums[1:].split(sizes, dim=1)
        n = found.clamp(min=1)
        mean = norms / n
        variance = (norms_squared - n * mean.square()).clamp(min=0) / (n - 1).clamp(min=1)
        own = F.normalize(units, dim=1)
        around = own
        if self.previous is not None and _check_choice("fidelity", fidelity, FIDELITIES) == "released":
            around = torch.cat([self.previous["prototypes"].to(own), own])[: len(own)]
        noise = (squares - 2 * around * units + found * around.square()).clamp(min=0) / n
        statistics = {
            "prototypes": own,
            "norm_mean_and_std": torch.cat([mean, variance.sqrt()], dim=1).T,
            "noise": noise.sqrt(),
        }
        for name, values in (self.previous or {}).items():
            if name in statistics:
                of_classes = 1 if name == "norm_mean_and_std" else 0
                statistics[name] = torch.cat([values.to(own), statistics[name]], dim=of_classes)
        statistics["numbers"] = self.sums[:, 0]
        return {name: values.float().contiguous() for name, values in statistics.items()}


def old_prediction(logits_old: Tensor, fidelity: str = "paper") -> Tensor:
    """The old network's class where its sigmoid is above 0.5, else 0 (STAR): B×K×H×W → B×H×W int64.

    ``fidelity="released"``: where its *logit* is above 0.5 (a sigmoid of 0.62).
    """
    if _check_choice("fidelity", fidelity, FIDELITIES) == "paper":
        return sigmoid_prediction(logits_old)
    largest, index = logits_old.detach().float().max(dim=1)
    return torch.where(largest > 0.5, index + 1, 0)


@torch.no_grad()
def predicted_numbers(prediction_old: Tensor, labels: Tensor, old_classes: int, stride: int = 16) -> Tensor:
    """Positions labelled background, by the class that the old network predicts there (STAR).

    Args:
        prediction_old: B×H×W, of :func:`old_prediction`.
        labels: B×H×W.
        old_classes: number of old classes, background included.
        stride: pixels per position, in both directions; the middle one counts.

    Returns:
        ``old_classes`` numbers, float32.
    """
    middle = slice(stride // 2, None, stride)
    predicted = torch.where(labels == 0, prediction_old, VOID)[:, middle, middle]
    return _one_hot(predicted.flatten(1), old_classes).sum((0, 2))


def replay_schedule(
    prev_numbers: Tensor,
    pred_numbers: Tensor,
    numbers: Tensor,
    iterations: int,
    setting: str = "overlap",
    new_classes: int = 1,
) -> dict[str, Tensor]:
    """How many features of each old class an iteration replays (STAR).

    An epoch is to show an old class as often as its own step did; in the overlapped setting its images show
    old classes already (``pred_numbers``).

    Args:
        prev_numbers: positions of background and the K old classes that the step before kept, 1 + K.
        pred_numbers: of :func:`predicted_numbers` over one epoch, 1 + K.
        numbers: positions labelled background and each new class in one epoch, 1 + N.
        iterations: of an epoch.
        setting: ``"overlap"`` or ``"disjoint"``.
        new_classes: N.

    Returns:
        ``per_iteration`` K (whole numbers, float32), ``extra_background_ratio`` (scalar, 0 where no position
        is predicted background), ``numbers`` 1 + K + N for the next step.
    """
    overlap = _check_choice("setting", setting, ("overlap", "disjoint")) == "overlap"
    prev, pred, numbers = (values.float() for values in (prev_numbers, pred_numbers, numbers))
    missing = (prev - pred).clamp(min=0) if overlap else prev
    background = prev[0] * (1 - 0.01 * new_classes if overlap else 1.0)
    share = 0.5 if overlap else 0.0
    ratio = (background / pred[0].clamp(min=1) - share).clamp(min=0) * (pred[0] > 0)
    kept = (1 - share) * pred[:1] + background
    old = prev[1:] if overlap else prev[1:] + pred[1:]
    return {
        "per_iteration": (missing[1:] / max(iterations, 1)).trunc(),
        "extra_background_ratio": ratio,
        "numbers": torch.cat([kept, old, numbers[1:]]),
    }


def replay_features(
    prototypes: Tensor,
    noise: Tensor,
    norms: Tensor,
    counts: Sequence[int] | Tensor,
    eps: Tensor | None = None,
    eta: Tensor | None = None,
    fidelity: str = "paper",
) -> Tensor:
    """Features of old classes drawn from their statistics (STAR): (r_c + ν_c ⊙ ε)·(m_c + s_c·η).

    ``fidelity="released"``: η is drawn for each channel instead of each feature.

    Args:
        prototypes, noise: K×D.
        norms: 2×K, mean and standard deviation.
        counts: number of features of each class; on the CPU, since the result's size depends on it.
        eps: normal noise n×D, drawn if None.
        eta: normal noise, n×1 (paper) or n×D, drawn if None.

    Returns:
        n×D float32, class by class.
    """
    released = _check_choice("fidelity", fidelity, FIDELITIES) == "released"
    counts = torch.as_tensor(counts).long()
    classes = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    classes = classes.to(prototypes.device, non_blocking=True)
    shape = (len(classes), prototypes.shape[1])
    if eps is None:
        eps = torch.randn(shape, device=prototypes.device)
    if eta is None:
        eta = torch.randn(shape if released else (len(classes), 1), device=prototypes.device)
    direction = prototypes.float()[classes] + noise.float()[classes] * eps
    mean, deviation = norms.float()[:, classes, None]
    return direction * (mean + deviation * eta)


def replay_mbce(
    real: Tensor,
    fake: Tensor | float,
    extra: Tensor,
    weight_fake: Tensor | float,
    weight_extra: Tensor | float,
) -> Tensor:
    """Weighted mean of the losses of real, replayed and extra background positions (STAR)."""
    return (real + weight_fake * fake + weight_extra * extra) / (1.0 + weight_fake + weight_extra)


class OldClassFeaturesMaintainingLoss(nn.Module):
    """Distance of the features where the old network sees an old class in the background (STAR's OCFM).

    Σ m·‖f − f'‖²/(D·Σ m) with the mask m = [label 0 and old prediction > 0], bilinearly reduced to h×w.
    """

    def forward(
        self, features: Tensor, features_old: Tensor, labels: Tensor, prediction_old: Tensor
    ) -> Tensor:
        """features, features_old B×D×h×w, labels, prediction_old B×H×W → scalar, 0 if the mask is empty."""
        mask = ((labels == 0) & (prediction_old > 0)).float()[:, None]
        mask = F.interpolate(mask, size=features.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        distance = (features.float() - features_old.detach().float()).square().mean(dim=1)
        total = mask.sum()
        return (distance * mask).sum() / torch.where(total > 0, total, 1.0)


class SimilarityAwareDiscriminativeLoss(nn.Module):
    """Mean over the new classes of 1/distance from the nearest old prototype (STAR's SAD).

    A class's centre is normalise(Σ m_c·f/‖f‖), m_c = [y = c] bilinearly reduced to h×w.

    ``fidelity="released"``: the mean is over all new classes; one without a pixel in the batch counts as 1.

    Args:
        old_classes: number of old classes, background included.
        new_classes: number of new classes.
    """

    def __init__(self, old_classes: int, new_classes: int, fidelity: str = "paper") -> None:
        super().__init__()
        self.old_classes = old_classes
        self.new_classes = new_classes
        self.fidelity = _check_choice("fidelity", fidelity, FIDELITIES)

    def forward(self, features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        """features B×D×h×w, labels B×H×W, prototypes K×D of the old classes → scalar."""
        units = F.normalize(features.float(), dim=1).flatten(2)
        labels = labels.long() - self.old_classes
        masks = _bilinear_one_hot(labels, features.shape[-2:], self.new_classes).flatten(2)
        centres = F.normalize(_class_sums(units, masks), dim=1)
        prototypes = prototypes.float()
        distances = torch.linalg.vector_norm(centres[:, None] - prototypes, dim=2)
        # A class that no step showed has no prototype.
        distances = distances.masked_fill((prototypes == 0).all(dim=1), math.inf)
        present = masks.sum((0, 2)) > 0
        inverse = 1.0 / distances.amin(dim=1).clamp(min=1e-6)
        if self.fidelity == "released":
            return torch.where(present, inverse, 1.0).mean()
        return torch.where(present, inverse, 0.0).sum() / present.sum().clamp(min=1)


def _bilinear_one_hot(labels: Tensor, size: Sequence[int], num_classes: int) -> Tensor:
    """Each class's mask, bilinearly reduced as by ``F.interpolate``: B×H×W → B×C×h×w.

    Reads the four labels around each position instead of C masks of H×W.
    """
    masks = torch.zeros((), device=labels.device)
    taps = []
    for length, positions in zip(labels.shape[-2:], size, strict=True):
        at = (torch.arange(positions, device=labels.device) + 0.5) * (length / positions) - 0.5
        at = at.clamp(0, length - 1)
        low = at.long()
        taps.append([(low, 1 - (at - low)), ((low + 1).clamp(max=length - 1), at - low)])
    for rows, row_weight in taps[0]:
        for columns, column_weight in taps[1]:
            weight = row_weight[:, None] * column_weight
            one_hot = _one_hot(labels[:, rows[:, None], columns].flatten(1), num_classes)
            masks = masks + one_hot.unflatten(2, weight.shape) * weight
    return masks
