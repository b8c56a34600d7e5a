"""NeST: new classifiers are tuned as a transformation of the old ones before a step (Xie et al. 2024)."""

from __future__ import annotations

import logging
from typing import Any

from methods.base import Context, Method
from methods.checks import defaults_of, refuse_without
from utils.errors import UserError
from utils.labels import VOID
from utils.lazy import loss, no_grad, torch
from utils.option_roles import OptionGroup
from utils.option_types import Number, positive_int

MOMENTUM, WEIGHT_DECAY, POWER = 0.9, 1e-4, 0.9
log = logging.getLogger(__name__)


class ClassifierPreTuning(Method):
    """Before a step, a transformation of the old classifiers is trained; the new ones start as its result.

    The student is not trained meanwhile. Paper: it is in evaluation mode. Released: in training mode, so that
    running statistics move; the biases start at one random number, and the learning rate falls before
    each update instead of after it.
    """

    needs_teacher = True
    classifier = "linear"

    def __init__(self, opts: Any) -> None:
        self.epochs: int = opts.warm_epochs
        self.lr_scale: float = opts.warm_lr_scale
        self.unbiased: bool = opts.warm_loss == "unce"
        self.released: bool = opts.fidelity == "released"

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--nest``, in the released program ``--warm_up``; ``--warm_*``, ``--unce_in_warm``."""
        group.flag("--nest --warm_up", help="tune the new classifiers before each step (NeST)")
        group.value("--warm_epochs", positive_int, 5, help="epochs of that tuning")
        group.value("--warm_lr_scale", Number(float, 0, 1e6), 1.0, help="factor on its learning rate")
        group.choice("--warm_loss", ("unce", "ce"), "unce", help="its loss: unbiased or plain cross entropy")
        group.add_argument(
            *("--unce_in_warm",),
            dest="warm_loss",
            action="store_const",
            const="unce",
            help="--warm_loss unce",
        )

    @classmethod
    def from_options(cls, opts: Any) -> ClassifierPreTuning | None:
        """Enabled with ``--nest``.

        Raises:
            UserError: an option of it is typed without it.
        """
        refuse_without(opts, ["nest"], list(defaults_of(cls)))
        return cls(opts) if opts.nest else None

    def begin_step(self, context: Context) -> None:
        """Compute the initial matrices, train the transformation, and write the classifiers.

        An epoch's results are cached, so that a resumed step trains only the epochs that were not finished.

        Raises:
            UserError: the training diverged.
        """
        model: Any = context.model
        old = _classifiers(context.model_old)
        start = context.cached("pre_tuning_start", {}, lambda: self._start(context, *old))
        transform = loss.ClassifierTransform(*old, start["M"], start["P"], start["bias"]).to(context.device)
        optimizer = torch.optim.SGD(
            transform.parameters(),
            lr=context.lr * self.lr_scale,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=WEIGHT_DECAY,
        )
        # Everything that an epoch changes.
        changing = {name: parameter.data for name, parameter in transform.named_parameters()}
        for name, parameter in transform.named_parameters():
            momentum = optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            changing[f"momentum.{name}"] = momentum
        if self.released:
            changing |= {f"network.{name}": buffer for name, buffer in model.network.named_buffers()}
        batches = int(start["batches"])
        for epoch in range(self.epochs):

            def train(epoch: int = epoch) -> dict[str, torch.Tensor]:
                mean = self._epoch(context, transform, optimizer, epoch, batches)
                log.info("pre-tuning epoch %d of %d: loss %.4f", epoch + 1, self.epochs, mean)
                return {name: value.clone() for name, value in changing.items()}

            found = context.cached(f"pre_tuning_{epoch + 1}", {}, train)
            for name, value in changing.items():
                value.copy_(found[name])
        self._write(context, transform)

    @no_grad
    def _start(self, context: Context, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        """M, P, the new biases, and the number of batches per epoch."""
        new, teacher = context.classes_new, context.model_old
        bound = weight.shape[1] ** -0.5  # of a new convolution's bias
        first = torch.empty(1).uniform_(-bound, bound) if self.released else bias[:1]
        matrices = loss.ImportanceMatrices(context.classes_old, new, weight.shape[1])
        batches = 0
        for images, labels in context.batches():
            features = _features(context, teacher, images)
            logits = _enlarged(torch.nn.functional.conv2d(features, weight[:, :, None, None], bias), images)
            matrices.update(features, logits, labels, weight)
            batches += 1
        context.reduce(matrices.sums)
        context.reduce(matrices.counts)
        importance, shares = matrices.compute()
        count = torch.tensor(batches)
        return {"M": importance, "P": shares, "bias": first.expand(new).clone(), "batches": count}

    def _epoch(
        self,
        context: Context,
        transform: loss.ClassifierTransform,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        batches: int,
    ) -> float:
        """One epoch, an update per batch; returns the mean loss on this process."""
        model: Any = context.model
        processes = context.reduce(torch.ones((), device=context.device))
        if self.unbiased:
            criterion: torch.nn.Module = loss.UnbiasedCrossEntropy(context.classes_old, reduction="none")
        else:
            criterion = torch.nn.CrossEntropyLoss(ignore_index=VOID, reduction="none")
        total = torch.zeros((), device=context.device)
        iteration = epoch * batches
        model.train(self.released)
        for images, labels in context.batches(epoch):
            mean = criterion(_enlarged(transform(_features(context, model, images)), images), labels).mean()
            optimizer.zero_grad()
            mean.backward()
            for parameter in transform.parameters():
                assert parameter.grad is not None
                context.reduce(parameter.grad).div_(processes)
            done = (iteration + self.released) / (self.epochs * batches)
            for group in optimizer.param_groups:
                group["lr"] = context.lr * self.lr_scale * (1 - done) ** POWER
            optimizer.step()
            iteration += 1
            total += mean.detach()
        model.train()
        if self.released:  # processes have statistics of their own images
            for buffer in model.network.buffers():
                buffer.copy_(context.reduce(buffer.double()) / processes)
        return float(total / batches)

    @no_grad
    def _write(self, context: Context, transform: loss.ClassifierTransform) -> None:
        """Put the classifiers into the student; those of the old classes are the teacher's but for the
        background's weight, whatever ``--init_balanced`` did.
        """
        model: Any = context.model
        teacher: Any = context.model_old
        found = transform.finish()
        if not all(bool(value.isfinite().all()) for value in found.values()):
            raise UserError(f"--warm_lr_scale {self.lr_scale:g}: the pre-tuning diverged; give less")
        model.cls.load_state_dict(teacher.cls.state_dict(), strict=False)
        first, new = model.cls.parts[0], model.cls.parts[-1]
        first.weight[0] = found["weight_background"][:, None, None]
        new.weight.copy_(found["weight_new"][:, :, None, None])
        new.bias.copy_(found["bias_new"])


def _classifiers(network: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights C×D and biases C of all classes, float32."""
    weight = torch.cat([part.weight.detach().flatten(1) for part in network.cls.parts])
    bias = torch.cat([part.bias.detach() for part in network.cls.parts])
    return weight.float(), bias.float()


def _features(context: Context, network: Any, images: torch.Tensor) -> torch.Tensor:
    """The channels before the classifiers, B×D×h×w float32, without gradient."""
    with torch.no_grad(), context.autocast():
        return network.network(images, frozenset())[0].float()


def _enlarged(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        logits, size=images.shape[-2:], mode="bilinear", align_corners=False
    )
