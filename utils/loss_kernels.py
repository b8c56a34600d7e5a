"""Fast CPU implementations of losses whose formulas are in ``utils/loss.py``.

On a CPU memory allocation costs more than arithmetic: a formula on whole tensors allocates several as large
as its input, which autograd keeps. A kernel works in blocks that fit into the cache, has an explicit backward
pass and allocates little beside the gradient. On a GPU blocks save nothing (docs/performance.md): there the
formula runs.

A kernel has the arguments, values and gradients of the function of the same name in ``utils/loss.py``
(``tests/utils/test_loss_kernels.py``). Each saves at least a fifth of the loss's time
(``python -m benchmarks.losses --plain --threads 1``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**20  # numbers in a block: 4 MiB, of the order of a processor's caches
_devices: tuple[str, ...] = ("cpu",)


def gain(tensor: Tensor) -> bool:
    """Whether to run the kernel on this tensor: on the CPU, outside ``used_on``."""
    return tensor.device.type in _devices


@contextmanager
def used_on(*devices: str, block: int | None = None) -> Iterator[None]:
    """Context in which kernels run on these types of devices only, for comparisons; without any, on none.

    Args:
        devices: "cpu", "cuda".
        block: numbers in a block instead of ``BLOCK``.
    """
    global _devices, BLOCK
    before, _devices, BLOCK = (_devices, BLOCK), devices, block or BLOCK
    try:
        yield
    finally:
        _devices, BLOCK = before


def _blocks(batch: int, channels: int, pixels: int) -> Iterator[tuple[slice, slice]]:
    """Slices (images, pixels) that cover B×C×N, with about ``BLOCK`` numbers each."""
    per_block = max(BLOCK // max(channels, 1), 1)
    images = max(per_block // max(pixels, 1), 1)
    for first in range(0, batch, images):
        for start in range(0, pixels, per_block):
            yield slice(first, first + images), slice(start, start + per_block)


def _channel_blocks(maps: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices (images, channels) that cover B×D×h×w maps, whatever their memory format."""
    step = max(BLOCK // max(maps.shape[2:].numel(), 1), 1)
    for image in range(maps.shape[0]):
        for first in range(0, maps.shape[1], step):
            yield slice(image, image + 1), slice(first, first + step)


def _without_autocast() -> torch.autocast:
    """Context that keeps matrix products in float32."""
    return torch.autocast(device_type="cpu", enabled=False)


# ── MiB and LwF ─────────────────────────────────────────────────────────────────────────────────────────


class _UnbiasedCrossEntropy(torch.autograd.Function):
    """Map of the unbiased cross-entropy, block by block: B×C×H×W float32, B×H×W int64 → B×H×W.

    The backward pass recomputes the softmax.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, targets: Tensor, classes_old: int, ignore_index: int) -> Tensor:
        logits, labels = inputs.flatten(2), targets.flatten(1)
        batch, channels, pixels = logits.shape
        loss = logits.new_empty(batch, pixels)
        lse_old = logits.new_empty(batch, pixels)
        lse_new = logits.new_full((batch, pixels), -math.inf)
        for block in _blocks(batch, channels, pixels):
            images, columns = block
            x, y = logits[images, :, columns], labels[block]
            lse_old[block] = torch.logsumexp(x[:, :classes_old], dim=1)
            if classes_old < channels:
                lse_new[block] = torch.logsumexp(x[:, classes_old:], dim=1)
            is_new = (y >= classes_old) & (y != ignore_index)
            picked = x.gather(1, torch.where(is_new, y, 0)[:, None])[:, 0]
            # −log P(old) = softplus(lse_new − lse_old) is precise where P(old) is close to 1.
            as_old = F.softplus(lse_new[block] - lse_old[block])
            as_new = torch.logaddexp(lse_old[block], lse_new[block]) - picked
            loss[block] = torch.where(is_new, as_new, as_old).masked_fill_(y == ignore_index, 0.0)
        ctx.save_for_backward(inputs, targets, lse_old, lse_new)
        ctx.classes_old, ctx.ignore_index = classes_old, ignore_index
        return loss.view(targets.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        inputs, targets, lse_old, lse_new = ctx.saved_tensors
        classes_old = ctx.classes_old
        grad_inputs = torch.empty_like(inputs)
        logits, labels, grads = inputs.flatten(2), targets.flatten(1), grad_inputs.flatten(2)
        grad_loss = grad_loss.flatten(1)
        batch, channels, pixels = logits.shape
        for block in _blocks(batch, channels, pixels):
            images, columns = block
            x, y, out = logits[images, :, columns], labels[block], grads[images, :, columns]
            g = grad_loss[block].masked_fill(y == ctx.ignore_index, 0.0)
            is_new = (y >= classes_old) & (y != ctx.ignore_index)
            log_total = torch.logaddexp(lse_old[block], lse_new[block])
            # Where the target is old: softmax − softmax within the old classes = −(the latter)·P(new).
            base = torch.where(is_new, log_total, lse_old[block])[:, None]
            scale = torch.where(is_new, g, -g * torch.sigmoid(lse_new[block] - lse_old[block]))[:, None]
            out[:, :classes_old] = torch.sub(x[:, :classes_old], base).exp_().mul_(scale)
            out[:, classes_old:] = torch.sub(x[:, classes_old:], log_total[:, None]).exp_().mul_(g[:, None])
            out.scatter_add_(1, torch.where(is_new, y, 0)[:, None], torch.where(is_new, -g, 0.0)[:, None])
        return grad_inputs, None, None, None


unbiased_cross_entropy = _UnbiasedCrossEntropy.apply


class _Distillation(torch.autograd.Function):
    """Map of −Σ_c softmax(αt)_c · log q_c / C_old, block by block: B×C×H×W, B×C_old×H×W float32 → B×H×W.

    ``unbiased=False``: q is the student's softmax over the old classes. ``unbiased=True``: over all classes,
    and q_0 is the probability of the background and the new classes together.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, targets: Tensor, alpha: float, unbiased: bool) -> Tensor:
        logits, teacher = inputs.flatten(2), targets.flatten(2)
        batch, channels, pixels = logits.shape
        old = teacher.shape[1]
        loss = logits.new_empty(batch, pixels)
        for images, columns in _blocks(batch, channels, pixels):
            x = logits[images, :, columns]
            p = _sharpened_softmax(teacher[images, :, columns], alpha)
            if unbiased:
                log_total = torch.logsumexp(x, dim=1)
                log_q = x[:, :old] - log_total[:, None]
                log_q[:, 0] = _log_background_and_new(x, old) - log_total
            else:
                log_q = F.log_softmax(x[:, :old], dim=1)
            loss[images, columns] = log_q.mul_(p).sum(dim=1).div_(-old)
        ctx.save_for_backward(inputs)
        # Not by save_for_backward, which refuses tensors of a teacher in inference mode.
        ctx.targets, ctx.alpha, ctx.unbiased = targets, alpha, unbiased
        return loss.view(inputs.shape[0], *inputs.shape[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        grad_inputs = torch.empty_like(inputs)
        logits, teacher, grads = inputs.flatten(2), ctx.targets.flatten(2), grad_inputs.flatten(2)
        batch, channels, pixels = logits.shape
        old = teacher.shape[1]
        scale = (grad_loss / old).flatten(1)
        for images, columns in _blocks(batch, channels, pixels):
            x, out = logits[images, :, columns], grads[images, :, columns]
            p = _sharpened_softmax(teacher[images, :, columns], ctx.alpha)
            if ctx.unbiased:
                q = F.softmax(x, dim=1)
                q[:, 1:old] -= p[:, 1:]
                log_group = _log_background_and_new(x, old)
                q[:, 0] -= p[:, 0] * (x[:, 0] - log_group).exp_()
                q[:, old:] -= p[:, :1] * (x[:, old:] - log_group[:, None]).exp_()
                torch.mul(q, scale[images, columns][:, None], out=out)
            else:
                q = F.softmax(x[:, :old], dim=1).sub_(p)
                out[:, :old] = q.mul_(scale[images, columns][:, None])
                out[:, old:] = 0.0
        return grad_inputs, None, None, None


distillation = _Distillation.apply


def _sharpened_softmax(logits: Tensor, alpha: float) -> Tensor:
    return F.softmax(logits if alpha == 1.0 else logits * alpha, dim=1)


def _log_background_and_new(logits: Tensor, old: int) -> Tensor:
    """log(exp x_0 + Σ_{c ≥ old} exp x_c): B×C×N → B×N."""
    if logits.shape[1] == old:
        return logits[:, 0]
    return torch.logaddexp(logits[:, 0], torch.logsumexp(logits[:, old:], dim=1))


# ── SDR ─────────────────────────────────────────────────────────────────────────────────────────────────


class _ClassStatistics(torch.autograd.Function):
    """Σ over positions of weight_c · |feature − prototype_c|², and the sum of each class's features.

    features B×D×N, prototypes C×D, one-hot B×C×N, weights C → scalar, C×D. One pass over the features; their
    gradient is 2·weight_c·(feature − prototype_c) + gradient of the class's sum.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor, one_hot: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, depth, number = features.shape
        distances, sums = features.new_zeros(()), torch.zeros_like(prototypes)
        with _without_autocast():
            at_position = torch.matmul(weights, one_hot)
            for images, columns in _blocks(batch, depth, number):
                block, hot = features[images, :, columns], one_hot[images, :, columns]
                sums += torch.bmm(hot, block.transpose(1, 2)).sum(0)
                table = prototypes.T.expand(block.shape[0], -1, -1)
                error = torch.baddbmm(block, table, hot, alpha=-1.0).square_()
                distances += (error.sum(dim=1) * at_position[images, columns]).sum()
        ctx.save_for_backward(features, prototypes, one_hot, weights, at_position)
        return distances, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_distances: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes, one_hot, weights, at_position = ctx.saved_tensors
        table = grad_sums - 2.0 * grad_distances * weights[:, None] * prototypes
        grad = features * (2.0 * grad_distances * at_position)[:, None]
        with _without_autocast():
            grad.baddbmm_(table.T.expand(features.shape[0], -1, -1), one_hot)
        return grad, None, None, None


class_statistics = _ClassStatistics.apply


class _MaxRatio(torch.autograd.Function):
    """Σ_d shrink(g_d) / (Σ_d g_d + ε) with g = f / (maximum of the position's group + ε): two maps B×h×w.

    Features B×D×h×w, groups B×h×w. The second map, Σ_d g_d, has no gradient. Positions that share the
    maximum share its gradient equally.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, groups: Tensor, number: int, shrinking: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        flat = features.flatten(2)
        batch, depth, positions = flat.shape
        own = flat.amax(dim=1)
        table = own.new_full((number,), -math.inf)
        highest = table.scatter_reduce(0, groups.flatten(), own.flatten(), "amax")[groups.flatten(1)]
        scale = 1.0 / (highest + eps)
        shrunk, slope, summed = torch.empty_like(own), torch.empty_like(own), torch.empty_like(own)
        for block in _blocks(batch, depth, positions):
            g = flat[block[0], :, block[1]] * scale[block][:, None]
            summed[block] = g.sum(dim=1)
            if shrinking == "exponential":
                e = g.exp()
                shrunk[block] = e.sum(dim=1)
                slope[block] = g.mul_(e).sum(dim=1)
            else:
                power = 2 if shrinking == "squared" else 3
                shrunk[block] = g.pow_(power).sum(dim=1)
                slope[block] = power * shrunk[block]
        total = summed + eps
        ratio = shrunk / total
        ctx.save_for_backward(features, groups, own == highest, scale, ratio, total)
        # d ratio / d log scale, for the gradient through the maximum.
        ctx.response = slope / total - ratio * summed / total
        ctx.number, ctx.shrinking = number, shrinking
        summed = summed.view(groups.shape)
        ctx.mark_non_differentiable(summed)
        return ratio.view(groups.shape), summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ratio: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        features, groups, attained, scale, ratio, total = ctx.saved_tensors
        grad_features = torch.empty_like(features)
        flat, out = features.flatten(2), grad_features.flatten(2)
        index = groups.flatten()
        grad = grad_ratio.flatten(1)
        first = grad * scale / total
        second = first * ratio
        highest_channel = torch.empty_like(index).view(attained.shape)
        batch, depth, positions = flat.shape
        for block in _blocks(batch, depth, positions):
            f = flat[block[0], :, block[1]]
            highest_channel[block] = f.argmax(dim=1)
            g = f * scale[block][:, None]
            if ctx.shrinking == "exponential":
                g.exp_()
            elif ctx.shrinking == "squared":
                g.mul_(2.0)
            else:
                g.square_().mul_(3.0)
            torch.sub(g.mul_(first[block][:, None]), second[block][:, None], out=out[block[0], :, block[1]])
        through = grad.new_zeros(2, ctx.number)
        through[0].index_add_(0, index, (-grad * ctx.response * scale).flatten())
        through[1].index_add_(0, index, attained.flatten().to(grad.dtype))
        share = (through[0] / through[1].clamp(min=1))[index].view_as(grad) * attained
        out.scatter_add_(1, highest_channel[:, None], share[:, None])
        return grad_features, None, None, None, None


max_ratio = _MaxRatio.apply


# ── PLOP ────────────────────────────────────────────────────────────────────────────────────────────────


def nested(maps: Tensor, scales: Sequence[int]) -> bool:
    """Whether the finest grid divides square maps evenly and the other grids join its cells."""
    height, width = maps.shape[-2:]
    finest = max(scales)
    return height == width and width % finest == 0 and all(finest % scale == 0 for scale in scales)


class _LocalPODDistance(torch.autograd.Function):
    """Distance of local POD without ``norm``, for ``nested`` grids: B×D×h×h twice → B.

    Pooling is linear, and the means of a coarse cell are means of the finest cells' means. The forward pass
    pools the difference of the preprocessed maps once, for the finest grid, and computes the gradient of all
    scales by these means. At a pixel it is the sum of a row's and a column's value of the finest cell, so the
    backward pass reads the student's map once and writes the gradient block by block.
    """

    @staticmethod
    def forward(
        ctx: Any, old: Tensor, new: Tensor, prepro: str, order: int, levels: list[tuple[int, float]]
    ) -> Tensor:
        finest = max(scale for scale, _ in levels)
        powers = new.new_empty(new.shape[:2])
        shares = [torch.empty_like(new[:, :, :finest]) for _ in ("rows", "columns")]
        for place in _channel_blocks(new):
            pools = _cell_means(_POD_PREPROS[prepro].difference(new[place], old[place]), finest)
            parts = [_level_powers(pool, levels, order) for pool in pools]
            powers[place] = parts[0][0] + parts[1][0]
            for share, (_, gradient) in zip(shares, parts, strict=True):
                share[place] = gradient
        distance = powers.sum(dim=1) if order == 1 else powers.sum(dim=1).sqrt()
        ctx.save_for_backward(new, distance, *shares)
        ctx.prepro, ctx.order = prepro, order
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        new, distance, rows, columns = ctx.saved_tensors
        _, factor, multiply = _POD_PREPROS[ctx.prepro]
        # Subgradient of the norm at distance 0, as in torch.
        slope = distance.pow(1 - ctx.order).masked_fill(distance == 0, 0.0)
        scale = (factor * grad * slope).view(-1, 1, 1, 1)
        cells = rows.shape[2]
        grad_new = torch.empty_like(new)
        for place in _channel_blocks(new):
            out, by = grad_new[place], scale[place[0]]
            out.unflatten(3, (cells, -1)).copy_((rows[place] * by).transpose(2, 3)[..., None])
            out.unflatten(2, (cells, -1)).add_((columns[place] * by)[:, :, :, None])
            multiply(out, new[place])
        return None, grad_new, None, None, None


local_pod_distance = _LocalPODDistance.apply


def _level_powers(fine: Tensor, levels: list[tuple[int, float]], order: int) -> tuple[Tensor, Tensor]:
    """Sum of powers of the pooled values of all scales, and its gradient.

    Args:
        fine: b×n×s×h means of the finest grid, see ``_cell_means``.
        levels: (scale, divisor) of every grid.
        order: 1 or 2.

    Returns:
        Σ|value|^order of each channel, b×n; its derivative by the pixels that a mean of ``fine`` covers,
        divided by ``order``, b×n×s×h.
    """
    power, gradient = fine.new_zeros(fine.shape[:2]), torch.zeros_like(fine)
    for scale, divisor in levels:
        pooled = _means(fine, 2, scale)
        slope = pooled if order == 2 else pooled.sign()
        weight, averaged = divisor**-order, fine.shape[3] // scale
        power.add_((pooled * slope).sum(dim=(2, 3)), alpha=weight)
        gradient.unflatten(2, (scale, -1)).add_(slope[:, :, :, None], alpha=weight / averaged)
    return power, gradient


class _Prepro(NamedTuple):
    """A preprocessing of POD; its derivative: ``factor`` times the in-place ``multiply(gradient, maps)``."""

    function: Callable[[Tensor], Tensor]
    factor: float
    multiply: Callable[[Tensor, Tensor], Tensor]

    def difference(self, new: Tensor, old: Tensor) -> Tensor:
        """``function(new) − function(old)``."""
        before, after = self.function(old), self.function(new)
        return after - before if after is new else after.sub_(before)


_POD_PREPROS = {
    "pow": _Prepro(torch.square, 2.0, lambda grad, maps: grad.mul_(maps)),
    "none": _Prepro(lambda maps: maps, 1.0, lambda grad, _: grad),
    "abs": _Prepro(torch.abs, 1.0, lambda grad, maps: grad.mul_(maps.sign())),
    # Multiplies by 0 or 1: ``masked_fill_`` is several times slower on the CPU.
    "relu": _Prepro(torch.relu, 1.0, lambda grad, maps: grad.mul_(maps.sign().clamp_(min=0.0))),
}


def _cell_means(maps: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Means over the rows and over the columns of the cells of square maps: b×n×h×h → b×n×cells×h, twice.

    Axis 2 counts cells, axis 3 the rows or columns of the map.
    """
    rows, columns = _means(maps, 3, cells), _means(maps, 2, cells)
    # Copied to make the long axis the last one; short inner loops would cost more than the copy.
    return torch.empty_like(columns).copy_(rows.transpose(2, 3)), columns


def _means(maps: Tensor, axis: int, parts: int) -> Tensor:
    """Means over equal parts of the rows (axis 2) or columns (axis 3) of B×D×h×w maps."""
    length = maps.shape[axis] // parts
    if maps.stride(1) == 1:  # channels-last, for which ``mean`` is tens of times slower
        return F.avg_pool2d(maps, (length, 1) if axis == 2 else (1, length))
    return maps.unflatten(axis, (parts, -1)).mean(dim=axis + 1)


class _ChannelByChannel(torch.autograd.Function):
    """A function of each channel of two maps, B×D×h×w twice → B×D, for a block of channels at a time.

    The function takes b×n×h×w twice and returns b×n. It is recomputed in the backward pass, so only the
    gradient is allocated at the size of the maps.
    """

    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(new)
        ctx.old, ctx.function = old, function  # the teacher's map as in _Distillation
        result = new.new_empty(new.shape[:2])
        for place in _channel_blocks(new):
            result[place] = function(old[place], new[place])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (new,) = ctx.saved_tensors
        grad_new = torch.empty_like(new)
        for place in _channel_blocks(new):
            with torch.enable_grad():
                leaf = new[place].detach().requires_grad_()
                value = ctx.function(ctx.old[place], leaf)
            grad_new[place] = torch.autograd.grad(value, leaf, grad[place])[0]
        return None, grad_new, None


channel_by_channel = _ChannelByChannel.apply
