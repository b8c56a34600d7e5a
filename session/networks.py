"""Networks, methods and optimiser of a step, put together from the options and the step before."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from argparser import Options
from methods import Context, Method, build_methods
from modules.pretrained import LoadReport, load_default_pretrained, load_pretrained
from segmentation_module import IncrementalSegmentationModule, freeze, load_state, make_model
from session.folder import RunFolder
from train import Precision
from utils import distributed
from utils.checkpoint import load_checkpoint, model_state, save_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.restore import load_model
from utils.scheduler import make_scheduler

log = logging.getLogger(__name__)


class StepNetworks:
    """What a step trains, as at its start.

    Args:
        opts: checked options.
        world: this process among the others.
        folder: of the run.
        step: the step.
        precision: how the networks compute.

    Attributes:
        context: networks, classes and device, as the methods know them.
        methods: by name, already through ``begin_step`` once :meth:`begin` was called.

    Raises:
        UserError: wrong options of a method, the step before has no checkpoint that fits, or pretrained
            weights cannot be had.
    """

    def __init__(
        self, opts: Options, world: World, folder: RunFolder, step: int, precision: Precision
    ) -> None:
        self.opts = opts
        self.world = world
        self.folder = folder
        self.step = step
        self.precision = precision
        # First: they check their options, which costs nothing yet.
        self.methods: dict[str, Method] = build_methods(opts, step)
        self.previous: dict[str, Any] = folder.load_previous(step) if step else {}
        model = self._student()
        self.context = Context(
            task=opts.task_,
            step=step,
            model=self.place(model),
            model_old=self.place(self.teacher()) if step else None,
            device=world.device,
            protocol=opts.protocol,
            fidelity=opts.fidelity,
            reduce=distributed.all_reduce_sum,
            recall=self._recall,
            autocast=precision.network,
        )

    def _student(self) -> IncrementalSegmentationModule:
        """It starts from the previous step or from ImageNet."""
        opts = self.opts
        model = make_model(opts, opts.task_.classes_per_step(self.step))
        if self.step:
            model.load_previous(model_state(self.previous))
            log.info("previous step: %s", self.folder.previous(self.step))
            if opts.init_balanced and not opts.unknown:
                model.init_new_classifier()
        elif not opts.no_pretrained:
            log.info(self._pretrained(model).summary())
        if opts.fix_bn:
            model.fix_bn()
        if opts.freeze:
            for parameter in model.network.body.parameters():
                parameter.requires_grad_(False)
        channels = int(model.network.body_channels)
        if "feat_dim" in opts.typed and channels != opts.feat_dim:
            raise UserError(
                f"--feat_dim {opts.feat_dim:g}: this network's body has {channels} channels; drop it"
            )
        return model

    def _pretrained(self, model: IncrementalSegmentationModule) -> LoadReport:
        """Load ImageNet weights: the user's file, or what the published code starts from."""
        opts = self.opts
        if opts.pretrained_path is not None:
            return load_pretrained(model.network, path=opts.pretrained_path)
        # One process downloads, the others then find the file.
        if not self.world.is_main:
            distributed.barrier()
        report = load_default_pretrained(
            model.network,
            model=opts.model,
            backbone=opts.backbone,
            norm_act=opts.norm_act,
        )
        if self.world.is_main:
            distributed.barrier()
        return report

    def teacher(self) -> IncrementalSegmentationModule:
        """The network of the step before, frozen, on the CPU.

        Raises:
            UserError: its checkpoint does not fit.
        """
        path, classes = self.folder.previous(self.step), self.opts.task_.classes_per_step(self.step - 1)
        return freeze(load_model(self.opts, self.previous, path, classes)).eval()

    def place(self, model: IncrementalSegmentationModule) -> IncrementalSegmentationModule:
        """A network on this process's device, in the precision and memory layout that it computes in."""
        return self.precision.place(model)

    # ── methods ──────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Give the methods the previous step's state and their networks' needs, and begin the step."""
        context, methods = self.context, self.methods
        state = self.previous.get("method_state", {})
        for name, method in methods.items():
            if name in state:
                method.load_state_dict(state[name])
        needs = frozenset().union(*(method.needs for method in methods.values()))
        teacher = frozenset().union(*(m.needs for m in methods.values() if m.needs_teacher))
        context.model.intermediates = needs  # type: ignore[assignment]
        if context.model_old is not None:
            context.model_old.intermediates = teacher  # type: ignore[assignment]
            if not any(method.uses_teacher for method in methods.values()):
                context.model_old = None  # fine-tuning needs no teacher: save its forward pass
        for method in methods.values():
            method.begin_step(context)
        log.info("methods: %s", ", ".join(methods))

    def restore(self, resumed: Mapping[str, Any]) -> None:
        """Weights and the methods' states of an interrupted run; after ``begin``, which sets its own."""
        load_state(self.context.model, model_state(resumed))
        local = resumed.get("method_state_of_rank") or []
        states = resumed.get("method_state", {})
        states = states | (local[self.world.rank] if self.world.rank < len(local) else {})
        for name, method in self.methods.items():
            if name in states:
                method.resume(states[name])

    def _recall(
        self, name: str, inputs: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Keep what a method computed over the whole training set in the run's folder (Context.recall)."""
        path = self.folder.path / f"{name}_{self.step}.pth"
        computed_from = json.dumps({**inputs, **self._computed_from()}, sort_keys=True)
        # All take what the first process finds: another may not see its file yet.
        values = distributed.broadcast_object(self._stored(path, computed_from))
        if values is not None:
            log.info("%s: taken from %s", name, path)
            return {k: v.to(self.world.device) for k, v in values.items()}
        values = compute()
        with distributed.shared_errors():
            if self.world.is_main:
                plain = {k: v.cpu() for k, v in values.items()}
                save_checkpoint(path, {"computed_from": computed_from, "values": plain})
        return values

    def _computed_from(self) -> dict[str, Any]:
        opts = self.opts
        return {
            "checkpoint": str(self.folder.previous(self.step)) if self.step else "None",
            "weights": _fingerprint(model_state(self.previous)) if self.previous else None,
            "data": [opts.dataset, str(opts.data_root), opts.task, opts.protocol, self.step],
            "batch": [opts.batch_size, self.world.size, opts.crop_size, opts.random_seed],
        }

    def _stored(self, path: Path, computed_from: str) -> dict[str, Tensor] | None:
        """On the first process, values that were computed before from the same."""
        with distributed.shared_errors():
            if self.world.is_main and path.is_file():
                stored = load_checkpoint(path)
                if stored.get("computed_from") == computed_from:
                    return dict(stored["values"])
        return None

    # ── what trains them ─────────────────────────────────────────────────────────────────────────

    def wrapped(self) -> nn.Module:
        """The module whose forward trains: synchronised over processes where there are several."""
        model = self.context.model
        if self.world.size == 1:
            return model
        device = self.world.device
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Looking for unused weights keeps the gradients' buckets as they are at the start. Else they are
            # put together anew after the first batch, also the first of a resumed run, and with three
            # processes or more the order in which gradients are summed depends on them.
            find_unused_parameters=self.opts.deterministic,
        )

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """That of the student at a learning rate. See ``make_optimizer``."""
        return make_optimizer(self.opts, self.context.model, self.methods, lr)


def make_optimizer(
    opts: Options, model: nn.Module, methods: Mapping[str, Method], lr: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; one group of parameters per learning rate.

    Raises:
        UserError: no weight is left to train.
    """
    newest = f"cls.{len(model.cls) - 1}."  # type: ignore[arg-type]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = math.prod(method.lr_factor(name) for method in methods.values())
        if opts.lr_old is not None and name.startswith("cls.") and not name.startswith(newest):
            factor *= opts.lr_old
        groups.setdefault(factor, []).append(parameter)
    if not groups:
        raise UserError("no weight is left to train: drop --freeze or --fix_bn")
    optimizer = torch.optim.SGD(
        [{"params": parameters, "lr": lr * factor} for factor, parameters in groups.items()],
        lr=lr,
        momentum=opts.momentum,
        weight_decay=opts.weight_decay,
        nesterov=opts.momentum > 0,
        fused=_can_fuse(model.parameters()),
    )
    _fill_momentum(optimizer)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser of ``make_optimizer`` the state that a checkpoint holds, whatever form wrote it.

    Raises:
        ValueError: the state is of other weights.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = _can_fuse(group["params"])  # another device or precision may have written it
    _fill_momentum(optimizer)


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether SGD's fused form is right: PyTorch 2.6's for the CPU goes astray on bfloat16 weights."""
    return all(parameter.is_cuda or parameter.dtype == torch.float32 for parameter in parameters)


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin with a momentum of zeros where there is none.

    The fused form would make its own without filling it, and leave it so if a gradient scaler skips the
    first update.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] > 0 else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def schedule(
    opts: Options, optimizer: torch.optim.Optimizer, iterations: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning-rate schedule of the options over a step's iterations."""
    return make_scheduler(
        optimizer,
        opts.lr_policy,
        max_iters=iterations,
        lr_power=opts.lr_power,
        lr_decay_step=opts.lr_decay_step,
        lr_decay_factor=opts.lr_decay_factor,
        warmup_iters=round(opts.warmup * iterations),
    )


def _fingerprint(state: dict[str, Tensor]) -> list[float]:
    """A few sums that change when any weight of a network does."""
    tensors = [tensor.double() for tensor in state.values()]
    return [float(sum(t.sum() for t in tensors)), float(sum(t.square().sum() for t in tensors))]
