"""Training and evaluation, the same for all methods.

``Trainer`` trains any module that maps images to ``(logits, intermediates)``; methods act through the hooks
of ``methods/base.py``. Order of an optimiser step: teacher forward, student forward, ``observe``,
``relabel``, ``losses``, backward (up to here for every batch of a group), ``after_backward``, ``penalty`` and
its backward, optimiser, scheduler.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from dataset.transforms import normalize
from methods.base import Batch, Context, Method
from methods.checks import LossTerms, call_hook, relabel
from metrics.stream_metrics import StreamSegMetrics
from utils.distributed import average_gradients
from utils.errors import Fault, UserError
from utils.processor import fast_bfloat16

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
Predict = Callable[[nn.Module, Tensor], Tensor]


class NonFiniteLoss(Fault):
    """A loss term became NaN or infinite."""


class Precision:
    """Number formats of ``--opt_level`` on a device.

    O0: float32. O1: networks under autocast, losses in float32. O2: losses under autocast too. O3: the
    weights of student and teacher are in half precision. Half precision is bfloat16 on devices with native
    bfloat16 arithmetic, unless ``--half float16`` is given. Otherwise it is float16 with loss scaling on CUDA
    (bfloat16 for O3, which has no scaling); on the CPU, where emulation is several times slower than
    float32, every level is O0.

    Args:
        level: as typed.
        device: of the networks.
        bfloat16: whether the devices of all processes have native bfloat16 arithmetic; None: check this
            process's device.

    Attributes:
        used: the level that applies, ``level`` or O0.
    """

    def __init__(self, level: str, device: torch.device, bfloat16: bool | None = None) -> None:
        self.level = level
        self.device = device
        if bfloat16 is None:
            bfloat16 = level != "O0" and fast_bfloat16(device)
        on_cuda = device.type == "cuda"
        self.used = level if bfloat16 or on_cuda else "O0"
        scaled = on_cuda and level in ("O1", "O2") and not bfloat16
        self.dtype = torch.float16 if scaled else torch.bfloat16
        self.scaler = GradScaler(device.type, enabled=scaled)

    @classmethod
    def of(cls, opts: argparse.Namespace, device: torch.device, bfloat16: bool | None = None) -> Precision:
        """Of options: in-place norms have CUDA kernels for float16, but not for bfloat16.

        Raises:
            UserError: float16 is asked for on a device that has no scaled float16.
        """
        asked = opts.half == "float16"
        if asked and device.type != "cuda":
            raise UserError("--half float16 needs a GPU: use one, or for a new run drop the option")
        in_place = opts.norm_act.startswith("iabn") and device.type == "cuda"
        return cls(opts.opt_level, device, False if asked or in_place else bfloat16)

    @property
    def description(self) -> str:
        """The number formats, for logs and manifests."""
        if self.used == "O0":
            return "float32"
        name = str(self.dtype).removeprefix("torch.")
        return {"O1": f"{name} autocast", "O2": f"{name} autocast, losses too", "O3": f"{name} weights"}[
            self.used
        ]

    def log_choice(self, typed: bool) -> None:
        """Log the precision; warn if it is not the one that the user typed."""
        if self.used == self.level:
            log.info("precision: %s", self.description)
            return
        log.log(
            logging.WARNING if typed else logging.INFO,
            "--opt_level %s is computed in float32: this CPU (or another process's) has no native bfloat16 "
            "arithmetic, and emulation takes 2 to 12 times as long as float32",
            self.level,
        )

    def place(self, model: M) -> M:
        """Move a network to the device, channels last (fastest for convolutions), and ``cast`` it."""
        return self.cast(model.to(self.device).to(memory_format=torch.channels_last))

    def cast(self, model: M) -> M:
        """Convert the weights for O3; call it before the optimiser is made."""
        return model.to(self.dtype) if self.used == "O3" else model

    def network(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a network's forward pass."""
        return self._autocast(self.used in ("O1", "O2", "O3"))

    def losses(self) -> contextlib.AbstractContextManager[Any]:
        """Context of the losses."""
        return self._autocast(self.used in ("O2", "O3"))

    def loss_input(self, value: Any) -> Any:
        """A network's output as input of the losses: float32 unless they run under autocast."""
        return value if self.used in ("O2", "O3") else map_tensors(_single, value)

    def _autocast(self, on: bool) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=on)


class Trainer:
    """Trains the network of one step.

    Args:
        context: networks, classes and device of the step. The teacher must be in evaluation mode.
        methods: in calling order, after their ``begin_step``.
        optimizer: of the student's parameters and those of ``own_modules``.
        scheduler: stepped once per optimiser step, or None.
        forward: the student wrapped for several processes; None: the student itself.
        precision: O0 if None.
        own_modules: modules of the methods (``collect_modules``), trained with the student.
    """

    def __init__(
        self,
        context: Context,
        methods: Mapping[str, Method],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        forward: nn.Module | None = None,
        precision: Precision | None = None,
        own_modules: nn.Module | None = None,
    ) -> None:
        self.context = context
        self.methods = methods
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.model = forward if forward is not None else context.model
        self.teacher = context.model_old if any(m.uses_teacher for m in methods.values()) else None
        self.precision = precision or Precision("O0", context.device)
        self.own_modules = own_modules if own_modules is not None else nn.Module()
        self._loss_terms = LossTerms()
        self._is_first = True  # no batch yet

    def compile(self) -> None:
        """Use ``torch.compile`` for both networks in training; weights keep their names.

        Evaluation, with images of any size, uses the networks without it.

        Raises:
            UserError: no compiler is installed.
        """
        self.model = compiled(self.model)
        self.teacher = None if self.teacher is None else compiled(self.teacher)

    def set_training(self) -> None:
        """Put the student and the methods' own modules into training mode."""
        self.model.train()
        self.own_modules.train()

    @property
    def lr(self) -> float:
        """Learning rate of the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(
        self, images: Tensor, targets: Tensor, extras: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step on one batch.

        Args:
            images: B×3×H×W, uint8 (normalised here) or float32 (already normalised).
            targets: B×H×W, network indices and 255, any integer type.
            extras: further tensors of the samples, by name.

        Returns:
            The loss terms, detached, on the device.
        """
        return self.train_group([(images, targets, extras)])

    def train_group(self, samples: Sequence[Sequence[Any]], *, epoch: int = 0) -> dict[str, Tensor]:
        """One optimiser step on the mean gradient of several batches.

        ``after_backward`` and ``penalty`` are called once, with that mean. Processes reduce gradients once,
        in the backward pass of the last batch.

        Args:
            samples: the batches, each (images, targets) or (images, targets, extras); see ``train_step``.
            epoch: number of the epoch, from 0.

        Returns:
            The means of the loss terms, detached, on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        means = Means()
        # Only a network wrapped for several processes has ``no_sync``.
        no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        for left in reversed(range(len(samples))):
            with no_sync() if left else contextlib.nullcontext():
                means.add(self._backward(*samples[-1 - left], epoch=epoch, share=len(samples)))
        terms = means.means()
        penalties = self._penalise()
        scaler = self.precision.scaler
        scaler.step(self.optimizer)
        scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        total = terms.pop("total")
        terms.update(penalties)
        terms["total"] = total + sum(penalties.values())
        return terms

    def _backward(
        self,
        images: Tensor,
        targets: Tensor,
        extras: dict[str, Tensor] | None = None,
        *,
        epoch: int,
        share: int,
    ) -> dict[str, Tensor]:
        """Add a batch's gradient, divided by ``share``, to the step's; returns the loss terms and total."""
        batch = self._forward(images, targets, extras or {}, epoch)
        with self.precision.losses():
            for method in self.methods.values():
                call_hook(method, "observe", batch)
            for method in self.methods.values():
                relabel(method, batch, is_first=self._is_first)
            self._is_first = False
            terms: dict[str, Tensor] = {}
            for method in self.methods.values():
                self._loss_terms.add(terms, method, "losses", method.losses(batch))
        if not terms:
            raise UserError(
                f"step {self.context.step}: no method returned a loss ({', '.join(self.methods)}); "
                "choose a method or option with a loss"
            )
        total = torch.stack([term.float() for term in terms.values()]).sum()
        if not total.requires_grad:
            raise UserError(
                f"step {self.context.step}: no loss depends on trained weights ({', '.join(terms)}); compute "
                "one from batch.outputs or batch.features"
            )
        self.precision.scaler.scale(total / share).backward()
        terms["total"] = total
        return {name: term.detach() for name, term in terms.items()}

    def _penalise(self) -> dict[str, Tensor]:
        """Call ``after_backward``, then add the gradients of the penalties; returns the penalties."""
        average_gradients(self.own_modules)  # the network's were averaged in its backward pass
        self.precision.scaler.unscale_(self.optimizer)
        if self._gradients_are_finite():
            for method in self.methods.values():
                call_hook(method, "after_backward")
        penalties: dict[str, Tensor] = {}
        for method in self.methods.values():
            self._loss_terms.add(penalties, method, "penalty", method.penalty())
        for penalty in penalties.values():
            if penalty.requires_grad:  # else constant, or the method added the gradient itself
                penalty.backward()
        return {name: penalty.detach() for name, penalty in penalties.items()}

    def _gradients_are_finite(self) -> bool:
        """False if loss scaling overflowed: that step is skipped, and methods must not use its gradients.

        This synchronises with the GPU, so it is checked only if a method has ``after_backward``.
        """
        readers = any(type(m).after_backward is not Method.after_backward for m in self.methods.values())
        if not (readers and self.precision.scaler.is_enabled()):
            return True
        weights = itertools.chain(self.context.model.parameters(), self.own_modules.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _forward(self, images: Tensor, targets: Tensor, extras: dict[str, Tensor], epoch: int) -> Batch:
        context, device = self.context, self.context.device
        images = to_device(images, device)
        targets = targets.to(device, non_blocking=True).long()
        outputs_old, features_old = None, {}
        with self.precision.network():
            if self.teacher is not None:
                with torch.inference_mode():
                    found = self.teacher(images)
                outputs_old, features_old = map_tensors(_savable, found)
            outputs, features = self.model(images)
        return Batch(
            images=images,
            targets=targets,
            original_targets=targets,
            incremental_step=context.step,
            classes_old=context.classes_old,
            classes_new=context.classes_new,
            outputs=self.precision.loss_input(outputs),
            features=self.precision.loss_input(features),
            outputs_old=self.precision.loss_input(outputs_old),
            features_old=self.precision.loss_input(features_old),
            extras={name: extra.to(device, non_blocking=True) for name, extra in extras.items()},
            epoch=epoch,
        )


def class_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores B×C×H×W of normalised images; the prediction is their argmax over C."""
    logits, _ = model(images)
    scores = getattr(model, "scores", None)
    return logits if scores is None else scores(logits)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    metrics: StreamSegMetrics,
    *,
    device: torch.device,
    precision: Precision,
    predict: Predict | None = None,
) -> StreamSegMetrics:
    """Confusion matrix of a loader's images, summed over all processes.

    Args:
        model: maps images to (logits, intermediates); put into evaluation mode.
        loader: yields (images, targets); each image on one process only.
        metrics: reset first.
        device, precision: as in training.
        predict: maps (model, images) to scores B×C×H×W; ``class_scores`` if None.
    """
    model.eval()
    metrics.reset()
    predict = predict or class_scores
    with _untuned_convolutions():
        for images, targets, *_ in loader:
            with torch.inference_mode(), precision.network():
                predictions = predict(model, to_device(images, device)).argmax(dim=1)
            metrics.update(predictions, targets.to(device, non_blocking=True))
    metrics.synchronise()
    return metrics


@contextlib.contextmanager
def _untuned_convolutions() -> Iterator[None]:
    """Without cuDNN's search for the fastest kernel, which would run for every new image size."""
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tuned


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Images on the device, as normalised float32, channels last (fastest for convolutions)."""
    moved = images.to(device, non_blocking=True)
    return normalize(moved).contiguous(memory_format=torch.channels_last)


def compiled(module: nn.Module) -> nn.Module:
    """``torch.compile`` of a module, compiled at the first batch of each shape.

    Raises:
        UserError: a required compiler is missing: on the CPU a C++ compiler, on CUDA Triton and a C compiler.
    """
    on_cuda = next(module.parameters()).is_cuda
    if on_cuda and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton on CUDA: pip install triton, or drop --compile")
    variable, language, usual = ("CC", "C", "gcc") if on_cuda else ("CXX", "C++", "g++")
    compiler = os.environ.get(variable, usual)
    if os.name == "posix" and shutil.which(compiler) is None:
        raise UserError(f"--compile needs the {language} compiler {compiler}: install it or drop --compile")
    return cast(nn.Module, torch.compile(module))


def groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the batches in lists of ``size``; the last may be shorter."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to a tensor, or to all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_tensors(function, item) for item in value]
    return value


def _single(value: Tensor) -> Tensor:
    """Floating-point tensors as float32: losses are sums over many pixels."""
    return value.float() if value.is_floating_point() else value


def _savable(value: Tensor) -> Tensor:
    """A tensor of inference mode as a normal one, which autograd can save; shares its memory."""
    plain = torch.empty(0, dtype=value.dtype, device=value.device)
    return plain.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())


class Means:
    """Running means of loss terms, on the device until ``read``."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, terms: Mapping[str, Tensor], count: int = 1) -> None:
        """Add the terms of one batch, or the means of ``count`` batches."""
        self.count += count
        for name, term in terms.items():
            weighted = term if count == 1 else count * term
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted

    def means(self) -> dict[str, Tensor]:
        """The means, still on the device."""
        if self.count == 1:
            return dict(self.sums)
        return {name: value / self.count for name, value in self.sums.items()}

    def read(self) -> dict[str, float]:
        """The means as floats; synchronises with the GPU.

        Raises:
            NonFiniteLoss: a mean is NaN or infinite.
        """
        if not self.sums:
            return {}
        values = (torch.stack([s.float() for s in self.sums.values()]) / self.count).tolist()
        means = dict(zip(self.sums, values, strict=True))
        if not all(torch.isfinite(torch.tensor(values))):
            shown = ", ".join(f"{name} {value:g}" for name, value in means.items())
            raise NonFiniteLoss(f"a loss is not finite: {shown}; a lower --lr or --opt_level O0 may help")
        return means
