"""Training steps of the released trainers in their slow, literal form, and a toy network to run them on.

Nothing here is shared with the code under test: losses are loops over classes and images with boolean
selections, the optimiser is written out, and the regularisers keep a dict per weight. What is computed was
read off the trainers of MiB, SDR, PLOP, SATS and SSUL; the words are our own.

A "terms" function takes a :class:`Sight` of one batch and returns the loss terms in the order in which the
trainer adds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

VOID = 255
HEADS = 2


class Toy(nn.Module):
    """A segmentation network of a few convolutions: B×3×H×W → logits B×C×H×W and all intermediates."""

    def __init__(self, classes: Sequence[int], *, attention: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.body = nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Conv2d(6, 10, 1)
        self.cls = nn.ModuleList(nn.Conv2d(10, n, 1) for n in classes)
        widths = (8, 6, 6, 6) if attention else ()
        self.queries = nn.ModuleList(nn.Conv2d(width, 4 * HEADS, 1) for width in widths)
        self.keys = nn.ModuleList(nn.Conv2d(width, 4 * HEADS, 1) for width in widths)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        stem = self.stem(images)
        raw = self.body(F.relu(stem))
        body = F.softplus(raw)
        pre_logits = self.head(body)
        small = torch.cat([classifier(pre_logits) for classifier in self.cls], dim=1)
        logits = F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
        maps = [stem, body, F.avg_pool2d(body, 2), F.avg_pool2d(body, 4)]
        attention = [self._attention(i, values) for i, values in enumerate(maps[: len(self.queries)])]
        return logits, {
            "body": body,
            "pre_logits": pre_logits,
            "attentions": [stem, raw, pre_logits],
            "logits_small": small,
            "self_attention": attention,
        }

    def _attention(self, stage: int, values: Tensor) -> Tensor:
        """B×heads×L×S after the softmax; the keys are pooled to a 2×2 grid."""
        queries = self.queries[stage](values).flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3)
        keys = self.keys[stage](F.adaptive_avg_pool2d(values, 2)).flatten(2).unflatten(1, (HEADS, -1))
        return torch.softmax(queries @ keys, dim=-1)


@dataclass
class Sight:
    """What a released trainer looks at in one batch."""

    images: Tensor
    labels: Tensor
    out: Tensor
    maps: dict[str, Any]
    out_old: Tensor
    maps_old: dict[str, Any]
    saliency: Tensor | None
    exemplar: Tensor | None = None


Terms = Callable[[Sight], list[Tensor]]


def run_released(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[tuple[Any, ...]],
    terms: Terms,
    *,
    lr: float,
    iterations: int,
    lr_factor: Callable[[str], float] = lambda name: 1.0,
    floor: float = 0.0,
    train_mode: Callable[[nn.Module], Any] = lambda student: student.train(),
    regulariser: Any = None,
    importance: float = 0.0,
) -> list[float]:
    """Train the student in place; SGD with Nesterov momentum 0.9, weight decay 1e-4, poly 0.9 per iteration.

    No weight's rate falls below ``floor``.

    Returns:
        The sum of the terms at each step.
    """
    velocity: dict[str, Tensor] = {}
    totals = []
    train_mode(student)
    for iteration, (images, labels, *more) in enumerate(batches):
        out_old, maps_old = torch.empty(0), {}
        if teacher is not None:
            with torch.no_grad():
                out_old, maps_old = teacher(images)
        out, maps = student(images)
        extras = [more[0].get(name) if more else None for name in ("saliency", "exemplar")]
        loss = sum(terms(Sight(images, labels.clone(), out, maps, out_old, maps_old, *extras)))
        for parameter in student.parameters():
            parameter.grad = None
        loss.backward()
        if regulariser is not None:
            regulariser.update()
            penalty = importance * regulariser.penalty()
            if penalty != 0:
                penalty.backward()
        curve = (1 - iteration / iterations) ** 0.9
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if parameter.grad is None:
                    continue
                slope = parameter.grad + 1e-4 * parameter
                velocity[name] = 0.9 * velocity.get(name, torch.zeros_like(slope)) + slope
                rate = max(lr * lr_factor(name) * curve, floor)
                parameter -= rate * (slope + 0.9 * velocity[name])
        totals.append(loss.item())
    return totals


# ── classification ───────────────────────────────────────────────────────────────────────────────


def cross_entropy(out: Tensor, labels: Tensor) -> Tensor:
    """Map B×H×W; void is zero."""
    loss = torch.zeros(labels.shape, dtype=out.dtype)
    for c in range(out.shape[1]):
        here = labels == c
        loss[here] = -torch.log_softmax(out, dim=1)[:, c][here]
    return loss


def unbiased_cross_entropy(out: Tensor, labels: Tensor, old: int) -> Tensor:
    """Map: every old class's label and probability count as background."""
    probability = torch.softmax(out, dim=1)
    loss = torch.zeros(labels.shape, dtype=out.dtype)
    for c in range(out.shape[1]):
        here = labels == c
        mine = probability[:, :old].sum(dim=1) if c < old else probability[:, c]
        loss[here] = -mine[here].log()
    return loss


def binary_cross_entropy(out: Tensor, labels: Tensor, soft: Tensor | None = None, first: int = 0) -> Tensor:
    """Map, summed over classes; channels ``first`` to those of ``soft`` have it as their target."""
    loss = torch.zeros(labels.shape, dtype=out.dtype)
    for c in range(out.shape[1]):
        target = (labels == c).to(out.dtype)
        if soft is not None and first <= c < soft.shape[1]:
            target = soft[:, c]
        loss = loss - target * F.logsigmoid(out[:, c]) - (1 - target) * F.logsigmoid(-out[:, c])
    return loss


# ── MiB's trainer and what SDR's adds to it ──────────────────────────────────────────────────────


def distillation(out: Tensor, out_old: Tensor) -> Tensor:
    old = out_old.shape[1]
    student, teacher = torch.log_softmax(out[:, :old], dim=1), torch.softmax(out_old, dim=1)
    return -sum((teacher[:, c] * student[:, c]).mean() for c in range(old)) / old


def unbiased_distillation(out: Tensor, out_old: Tensor) -> Tensor:
    old = out_old.shape[1]
    student, teacher = torch.softmax(out, dim=1), torch.softmax(out_old, dim=1)
    total = torch.zeros((), dtype=out.dtype)
    for c in range(old):
        mass = student[:, c] + (student[:, old:].sum(dim=1) if c == 0 else 0.0)
        total = total + (teacher[:, c] * mass.log()).mean()
    return -total / old


def uncertainty_distillation(out: Tensor, out_old: Tensor, labels: Tensor, gs: float) -> Tensor:
    """SDR's loss of CIL: the teacher's logits of new classes are zero; no logarithm, no minus."""
    padded = torch.zeros_like(out)
    padded[:, : out_old.shape[1]] = out_old
    teacher, student = torch.softmax(padded, dim=1), torch.softmax(out, dim=1)
    bits = -(teacher * torch.log(teacher + 1e-8)).sum(dim=1) / math.log(2)
    free = (labels == 0) | (labels == VOID)
    return ((1 + gs * bits) * (teacher * student).sum(dim=1))[free].sum() / (free.sum() + 1e-8)


def mib_terms(
    *,
    old: int,
    unce: bool = False,
    kd: float = 0.0,
    unkd: bool = False,
    encoder: float = 0.0,
    icarl: str = "",
    icarl_importance: float = 0.0,
    cil: float = 0.0,
) -> Terms:
    """Classification, iCaRL, distillation of features and of logits, as MiB's and SDR's trainers add them."""

    def terms(s: Sight) -> list[Tensor]:
        found = []
        if icarl == "disjoint":
            found.append(binary_cross_entropy(s.out, s.labels, torch.sigmoid(s.out_old)).mean())
        elif icarl:
            labelled = (s.labels != VOID).to(s.out.dtype)
            found.append((binary_cross_entropy(s.out, s.labels) * labelled).mean())
        elif unce and old > 0:
            found.append(unbiased_cross_entropy(s.out, s.labels, old).mean())
        else:
            found.append(cross_entropy(s.out, s.labels).mean())
        if icarl == "combined":
            # The mean over classes and pixels, times the number of classes: a sum over the old classes.
            nobody = torch.full_like(s.labels, -1)
            soft = torch.sigmoid(s.out_old)
            found.append(icarl_importance * binary_cross_entropy(s.out[:, :old], nobody, soft).mean())
        if encoder > 0:
            found.append(encoder * (s.maps["body"] - s.maps_old["body"]).pow(2).mean())
        if cil > 0:
            found.append(uncertainty_distillation(s.out, s.out_old, s.labels, cil))
        if kd > 0:
            found.append(kd * (unbiased_distillation if unkd else distillation)(s.out, s.out_old))
        return found

    return terms


def shrink_labels(labels: Tensor, maps: Tensor) -> Tensor:
    """The label at the upper left corner of each position's cell (torch's nearest rule)."""
    height, width = maps.shape[-2:]
    rows = [i * labels.shape[-2] // height for i in range(height)]
    columns = [j * labels.shape[-1] // width for j in range(width)]
    return labels[..., rows, :][..., columns]


def selected(features: Tensor, where: Tensor) -> Tensor:
    """The values at B×h×w positions as one list: by image, then by channel, then by position."""
    return features[where[:, None].expand_as(features)]


class ReleasedSDR:
    """SDR's own terms with its published options; prototypes are carried from step to step."""

    def __init__(
        self,
        *,
        classes: int,
        old: int,
        step: int,
        protocol: str,
        carried: ReleasedSDR | None = None,
        matching: float = 1e-2,
        attraction: float = 1e-3,
        repulsion: float = 1e-3,
        sparsity: float = 1e-3,
        kd: float = 100.0,
    ) -> None:
        self.old, self.step, self.protocol = old, step, protocol
        self.matching, self.attraction, self.repulsion = matching, attraction, repulsion
        self.sparsity, self.kd = sparsity, kd
        self.prototypes: dict[int, Tensor] = dict(carried.prototypes) if carried else {}
        self.counts: dict[int, int] = dict(carried.counts) if carried else {}
        self.classes = classes

    def terms(self, s: Sight) -> list[Tensor]:
        features = s.maps["body"]
        small = shrink_labels(s.labels, features)
        self.take_in(features.detach(), small)
        found = mib_terms(old=self.old, unce=True, kd=self.kd if self.step else 0.0, unkd=True)(s)
        if self.step > 0:
            found += self.contrast(features, small)
            found.append(self.matching * self.match(features, small, s.out_old))
        found.append(self.sparsity * self.sparse(features, small))
        return found

    def take_in(self, features: Tensor, small: Tensor) -> None:
        present = sorted(set(small.flatten().tolist()))
        if self.protocol == "overlapped" or (self.protocol == "disjoint" and self.step > 0):
            present = present[1:]
        for c in present:
            if c == VOID:
                continue
            mine = selected(features, small == c).view(features.shape[1], -1)
            before = self.counts.get(c, 0)
            earlier = before * self.prototypes.get(c, torch.zeros_like(mine[:, 0]))
            self.counts[c] = before + mine.shape[1]
            self.prototypes[c] = (mine.sum(dim=1) + earlier) / self.counts[c]

    def prototype(self, c: int, like: Tensor) -> Tensor:
        return self.prototypes.get(c, torch.zeros(like.shape[1], dtype=like.dtype))

    def contrast(self, features: Tensor, small: Tensor) -> list[Tensor]:
        present = [c for c in sorted(set(small.flatten().tolist())) if c != VOID]
        attraction = torch.zeros((), dtype=features.dtype)
        means = []
        for c in present:
            mine = selected(features, small == c).view(features.shape[1], -1)
            means.append(mine.mean(dim=1))
            attraction = attraction + (mine - self.prototype(c, features)[:, None]).pow(2).mean()
            attraction = attraction / len(present)  # inside the loop, as released
        inverse = [
            1 / (a - b).pow(2).sum().sqrt()
            for i, a in enumerate(means)
            for j, b in enumerate(means)
            if i != j
        ]
        terms = [self.attraction * attraction]
        if inverse:
            terms.append(self.repulsion * torch.stack(inverse).mean())
        return terms

    def match(self, features: Tensor, small: Tensor, out_old: Tensor) -> Tensor:
        if self.protocol == "sequential":
            pseudo = torch.where(small < self.old, small, 0)
        else:
            guess = shrink_labels(out_old.argmax(dim=1), features)
            pseudo = torch.where(small == 0, guess, 0)
        present = [c for c in sorted(set(pseudo.flatten().tolist())) if c != 0]
        total = torch.zeros((), dtype=features.dtype)
        for c in present:
            mine = selected(features, pseudo == c).view(-1, features.shape[1])
            total = total + (mine.mean(dim=0) - self.prototype(c, features)).pow(2).mean() / len(present)
        return total

    @staticmethod
    def sparse(features: Tensor, small: Tensor) -> Tensor:
        scaled = torch.zeros_like(features)
        for c in set(small.flatten().tolist()):
            here = (small == c)[:, None].to(features.dtype)
            scaled = scaled + here * features / (selected(features, small == c).max() + 1e-15)
        return (scaled.exp().sum(dim=1) / (scaled.sum(dim=1) + 1e-15)).mean()


# ── PLOP and SATS ────────────────────────────────────────────────────────────────────────────────


def released_entropy(probability: Tensor) -> Tensor:
    """A mean over classes where a sum is meant."""
    classes = probability.shape[1]
    return -(probability * torch.log(probability + 1e-8)).mean(dim=1) / math.log(classes + 1e-8)


def released_medians(
    teacher: Callable[[Tensor], Any],
    batches: Iterable[tuple[Any, ...]],
    classes: int,
    floor: float,
    infinite: float | None,
) -> list[float]:
    """Threshold of each class. The running sum adds the number of the bin, not its count."""
    histogram = [[0] * 100 for _ in range(classes)]
    for images, labels, *_ in batches:
        with torch.no_grad():
            probability = torch.softmax(teacher(images)[0], dim=1)
        certainty = released_entropy(probability) / math.log(classes)
        for guess, value in zip(
            probability.argmax(dim=1)[labels == 0].tolist(), certainty[labels == 0].tolist(), strict=True
        ):
            histogram[guess][min(int(value * 100), 99)] += 1
    medians = []
    for counts in histogram:
        half, running, median = sum(counts) / 2, 0.0, 0.0
        if half > 0:
            for number in range(100):
                border = number / 100
                index = int(border * 100)
                if running <= half <= running + counts[index]:
                    break
                running += border * 100
            rest = half - running
            median = border + (rest / counts[index] if counts[index] else math.copysign(math.inf, rest)) / 100
        median = max(median, floor)
        medians.append(infinite if infinite is not None and math.isinf(median) else median)
    return medians


@dataclass
class PseudoLabelled:
    """Labels with the teacher's filled in, the share accepted per image, and the mask of what was asked."""

    labels: Tensor
    share: Tensor
    sure: Tensor
    asked: Tensor


def released_pseudo_labels(
    labels: Tensor, out_old: Tensor, medians: list[float], classes: int
) -> PseudoLabelled:
    probability = torch.softmax(out_old, dim=1)
    guess = probability.argmax(dim=1)
    limit = torch.tensor(medians, dtype=out_old.dtype)[guess]
    sure = released_entropy(probability) / math.log(classes) < limit
    asked = labels < out_old.shape[1]
    result = labels.clone()
    result[asked & ~sure] = VOID
    result[asked & sure] = guess[asked & sure]
    share = [
        (asked[i] & sure[i]).sum() / asked[i].sum() if asked[i].any() else torch.ones(())
        for i in range(labels.shape[0])
    ]
    return PseudoLabelled(result, torch.stack(share), sure, asked)


def local_pod(maps: Tensor) -> Tensor:
    """B×n: squared values, means of rows and of columns of each cell of the 1×1, 2×2 and 4×4 grids."""
    maps = maps.pow(2)
    parts = []
    for scale in (1, 2, 4):
        side = maps.shape[-1] // scale
        for i in range(scale):
            for j in range(scale):
                cell = maps[..., i * side : (i + 1) * side, j * side : (j + 1) * side]
                parts += [cell.mean(dim=3).flatten(1), cell.mean(dim=2).flatten(1)]
    return torch.cat(parts, dim=1)


def pooled_distillation(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    *,
    old: int,
    new: int,
    factor: float = 1e-2,
    last_factor: float = 5e-4,
) -> Tensor:
    """Mean over maps of the weighted local POD; in the last, new channels join the background's."""
    folded = student[-1][:, :old].clone()
    folded[:, 0] = folded[:, 0] + student[-1][:, old:].sum(dim=1)
    total = torch.zeros((), dtype=folded.dtype)
    for position, (a, b) in enumerate(zip(teacher, [*student[:-1], folded], strict=True)):
        distance = (local_pod(a) - local_pod(b)).pow(2).sum(dim=1).sqrt().mean()
        weight = last_factor if position == len(teacher) - 1 else factor
        total = total + weight * math.sqrt((old + new) / new) * distance
    return total / len(teacher)


def plop_terms(*, old: int, new: int, medians: list[float], adaptive: bool = True) -> Terms:
    """Cross entropy on pseudo-labels, then local POD; the last map is the logits.

    ``adaptive``: with the adaptive factor, which SATS' trainer never applies.
    """

    def terms(s: Sight) -> list[Tensor]:
        filled = released_pseudo_labels(s.labels, s.out_old, medians, old + new)
        share = filled.share if adaptive else torch.ones_like(filled.share)
        found = [(share[:, None, None] * cross_entropy(s.out, filled.labels)).mean()]
        teacher = [*s.maps_old["attentions"], s.maps_old["logits_small"]]
        student = [*s.maps["attentions"], s.maps["logits_small"]]
        return [*found, pooled_distillation(teacher, student, old=old, new=new)]

    return terms


def pillow_labels(labels: Tensor, size: int) -> Tensor:
    """Labels resized by Pillow, image by image, as SATS's trainer does."""
    resized = [
        Image.fromarray(label.numpy().astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
        for label in labels
    ]
    return torch.stack([torch.from_numpy(np.array(label)).long() for label in resized])


def attention_transfer(maps_old: list[Tensor], maps: list[Tensor], labels: Tensor) -> Tensor:
    """Class means of attention rows, read from a reshape that mixes heads and positions."""
    total = torch.zeros((), dtype=maps[0].dtype)
    for old, new in zip(maps_old, maps, strict=True):
        batch, heads, length, keys = new.shape
        side = math.isqrt(length)
        small = pillow_labels(labels, side)
        old, new = (values.reshape(batch, side, side, heads, keys) for values in (old, new))
        for i in range(batch):
            present = [c for c in set(small[i].flatten().tolist()) if c not in (0, VOID)]
            for c in present:
                here = small[i] == c
                for head in range(heads):
                    difference = new[i][here].mean(dim=0)[head] - old[i][here].mean(dim=0)[head]
                    distance = difference.pow(2).sum().sqrt()
                    total = total + distance / (heads * len(present) * batch)
    return total / 4


def feature_transfer(stages_old: list[Tensor], stages: list[Tensor], labels: Tensor) -> Tensor:
    """Class means of the stages' feature maps; the sum over stages is divided by 4, as four there are."""
    total = torch.zeros((), dtype=stages[0].dtype)
    for old, new in zip(stages_old, stages, strict=True):
        small = pillow_labels(labels, new.shape[-1])
        for i in range(new.shape[0]):
            present = [c for c in set(small[i].flatten().tolist()) if c not in (0, VOID)]
            for c in present:
                here = small[i] == c
                difference = new[i][:, here].mean(dim=1) - old[i][:, here].mean(dim=1)
                total = total + difference.pow(2).sum().sqrt() / (len(present) * new.shape[0])
    return total / 4


def sats_terms(
    *,
    old: int,
    new: int,
    medians: list[float],
    transfer: float = 20.0,
    kd: float = 20.0,
    stages: bool = False,
) -> Terms:
    """Cross entropy on pseudo-labels (without the adaptive factor), unbiased distillation, and transfer.

    Attention is transferred, or with ``stages`` the stages' feature maps, without the weight there.
    """

    def terms(s: Sight) -> list[Tensor]:
        filled = released_pseudo_labels(s.labels, s.out_old, medians, old + new)
        if stages:
            maps_old, maps = s.maps_old["attentions"][:-1], s.maps["attentions"][:-1]
            transferred = feature_transfer(maps_old, maps, filled.labels)
        else:
            maps_old, maps = s.maps_old["self_attention"], s.maps["self_attention"]
            transferred = transfer * attention_transfer(maps_old, maps, filled.labels)
        return [
            cross_entropy(s.out, filled.labels).mean(),
            kd * unbiased_distillation(s.out, s.out_old),
            transferred,
        ]

    return terms


# ── SSUL ─────────────────────────────────────────────────────────────────────────────────────────


def ssul_terms(*, threshold: float = 0.7) -> Terms:
    """SSUL counts unknown as 0 and background as 1; our network's unknown is its last channel.

    Its data set shifts the labels of the step's own images alone: an exemplar's stay as they are.
    """

    def unknown_first(out: Tensor) -> Tensor:
        return torch.cat([out[:, -1:], out[:, :-1]], dim=1)

    def terms(s: Sight) -> list[Tensor]:
        labels = torch.where(s.labels == VOID, VOID, s.labels + 1)
        hidden = labels == 1 if s.saliency is None else (labels == 1) & (s.saliency > 0)
        labels[hidden] = 0
        if s.exemplar is not None:
            labels[s.exemplar] = s.labels[s.exemplar]
        if s.out_old.numel():
            score, guess = torch.sigmoid(unknown_first(s.out_old)).max(dim=1)
            taken = (labels <= 1) & (guess > 1) & (score >= threshold)
            labels[taken] = guess[taken]
        loss = binary_cross_entropy(unknown_first(s.out), labels)
        return [loss[labels != VOID].mean()]

    return terms


# ── EWC, PI, RW ──────────────────────────────────────────────────────────────────────────────────


def scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min() + 1e-8)


class ReleasedRegulariser:
    """Importance of each weight from its gradients, and the penalty of a step; MiB's three kinds."""

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        teacher: nn.Module | None,
        carried: dict[str, dict[str, Tensor]] | None,
        *,
        alpha: float = 0.9,
        every: int = 10,
    ) -> None:
        self.kind, self.model, self.alpha, self.every = kind, model, alpha, every
        self.count = 0
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        if teacher is not None:
            self.start.update({name: p.detach().clone() for name, p in teacher.named_parameters()})
        self.penalised = set() if teacher is None else {name for name, _ in teacher.named_parameters()}
        self.fisher = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        self.score = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.carried_score: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] | None = None
        self.last: dict[str, Tensor] | None = None
        if carried is not None:
            self.carried_score = carried.get("score", {})
            self.fisher.update({name: value.clone() for name, value in carried.get("fisher", {}).items()})
            parts = [carried[key] for key in ("fisher", "score") if key in carried]
            self.weights = {name: sum(scaled(part[name]) for part in parts) for name in parts[0]}

    def update(self) -> None:
        here = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        gradients = {name: p.grad.detach().clone() for name, p in self.model.named_parameters()}
        if self.kind == "pi" or (self.kind == "rw" and self.count % self.every == 0):
            if self.last is not None:
                for name, gradient in gradients.items():
                    path = gradient * (self.last[name] - here[name])
                    if self.kind == "rw":
                        way = (here[name] - self.last[name]).pow(2)
                        path = path / (0.5 * self.fisher[name] * way + 1e-8)
                    self.score[name] = self.score[name] + path
            self.last = here
        self.count += 1
        if self.kind in ("ewc", "rw"):
            for name, gradient in gradients.items():
                self.fisher[name] = self.alpha * gradient.pow(2) + (1 - self.alpha) * self.fisher[name]

    def penalty(self) -> Tensor | float:
        if self.weights is None:
            return 0.0
        return sum(
            (self.weights[name] * (p - self.start[name]).pow(2)).sum()
            for name, p in self.model.named_parameters()
            if name in self.penalised
        )

    def carry(self) -> dict[str, dict[str, Tensor]]:
        """What the next step's regulariser starts from."""
        if self.kind == "ewc":
            return {"fisher": self.fisher}
        score = {}
        for name, p in self.model.named_parameters():
            value = self.score[name]
            if self.kind == "pi":
                value = value / ((p.detach() - self.start[name]).pow(2) + 1e-20)
            value = value.clamp(min=0)
            if name in self.carried_score:
                value = value + self.carried_score[name]
                value = value if self.kind == "pi" else value / 2
            score[name] = value
        return {"score": score} if self.kind == "pi" else {"fisher": self.fisher, "score": score}
