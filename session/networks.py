"""Networks and methods of a step, from the options and the previous step's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inference.load import load_model
from methods import Context, Method
from methods.base import needs_of_teacher
from methods.checks import call_hook
from methods.own_modules import collect_modules, load_modules, take_over
from modules.pretrained import LoadReport, load_default_pretrained, load_pretrained
from runs.checkpoint import model_state
from runs.folder import Resumed
from segmentation_module import IncrementalSegmentationModule, freeze, load_state, make_model
from session.run import Run
from train import Precision
from utils import distributed
from utils.errors import UserError

log = logging.getLogger(__name__)


class StepNetworks:
    """Student, teacher and methods at the start of a step.

    Attributes:
        context: networks, classes and device for the methods.
        methods: of the step; :meth:`begin` calls their ``begin_step``.
        own_modules: modules of the methods, trained with the student; set by :meth:`begin`.

    Raises:
        UserError: there is no fitting checkpoint of the previous step, or pretrained weights cannot be
        loaded.
    """

    def __init__(self, run: Run, step: int, precision: Precision, methods: dict[str, Method]) -> None:
        self.opts = opts = run.opts
        self.world = world = run.world
        self.folder = folder = run.folder
        self.step = step
        self.precision = precision
        self.methods = methods
        self.previous: dict[str, Any] = folder.load_previous(step) if step else {}
        model = self._student()
        self.context = Context(
            task=opts.task_,
            step=step,
            model=precision.place(model),
            model_old=precision.place(self.teacher()) if step else None,
            device=world.device,
            protocol=opts.protocol,
            fidelity=opts.fidelity,
            reduce=distributed.all_reduce_sum,
            autocast=precision.network,
        )

    def _student(self) -> IncrementalSegmentationModule:
        """The student, initialised from the previous step or from pretrained weights."""
        opts = self.opts
        task, step = opts.task_, self.step
        model = make_model(self.folder.spec, task.classes_per_step(step), task.later_classes_per_step(step))
        if self.step:
            model.load_previous(model_state(self.previous))
            log.info("previous step: %s", self.folder.previous(self.step))
            model.cls.start(balanced=opts.init_balanced)
        elif not opts.no_pretrained:
            log.info(self._pretrained(model).summary())
        if opts.fix_bn:
            model.fix_bn(statistics=opts.fidelity == "paper")
        if opts.freeze:
            for parameter in model.network.body.parameters():
                parameter.requires_grad_(False)
        if opts.fix_pre_cls:
            model.fix_older_classifiers()
        stride = getattr(model.network.body, "stride", opts.output_stride)
        if stride != opts.output_stride:
            log.info("%s has %d pixels per position, not --output_stride", opts.backbone, stride)
        channels = int(model.network.backbone_channels)
        if "feat_dim" in opts.typed and channels != opts.feat_dim:
            raise UserError(
                f"--feat_dim {opts.feat_dim:g}: this network's features have {channels} channels; drop it"
            )
        return model

    def _pretrained(self, model: IncrementalSegmentationModule) -> LoadReport:
        """Load pretrained weights: the user's file, or those that the released code starts from."""
        opts = self.opts
        if opts.pretrained_path is not None:
            return load_pretrained(model.network, path=opts.pretrained_path)
        # Rank 0 downloads the file; the others wait and then load it.
        if not self.world.is_main:
            distributed.barrier()
        kind = {"model": opts.model, "backbone": opts.backbone, "norm_act": opts.norm_act}
        report = load_default_pretrained(model.network, **kind)
        if self.world.is_main:
            distributed.barrier()
        return report

    def teacher(self) -> IncrementalSegmentationModule:
        """The previous step's network, frozen, on the CPU.

        Raises:
            UserError: its checkpoint does not fit.
        """
        path, task = self.folder.previous(self.step), self.opts.task_
        return freeze(load_model(self.folder.spec, self.previous, path, task, self.step - 1)).eval()

    def previous_network(self) -> IncrementalSegmentationModule | None:
        """The previous step's network, loaded if no method uses a teacher; None at step 0."""
        if self.step == 0 or self.context.model_old is not None:
            return self.context.model_old  # type: ignore[return-value]
        return self.precision.place(self.teacher())

    # ── methods ──────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Begin the methods and collect their own modules."""
        context, methods = self.context, self.methods
        begin_methods(context, methods, _method_states(self.previous, methods))
        self.own_modules = self.precision.cast(collect_modules(methods, context).to(context.device))
        take_over(self.own_modules, self.previous.get("modules", {}))
        distributed.broadcast_weights(self.own_modules)
        log.info("methods: %s", ", ".join(methods))

    def restore(self, resumed: Resumed) -> None:
        """Restore weights and methods' states of a checkpoint to resume from; call it after ``begin``.

        Methods' modules that another run's checkpoint (``--ckpt``) does not have keep their initial weights.
        """
        content = resumed.content
        load_state(self.context.model, model_state(content))
        local = content.get("method_state_of_rank") or []
        states = _method_states(content, self.methods)
        states = states | (local[self.world.rank] if self.world.rank < len(local) else {})
        modules = content.get("modules", {})
        if resumed.own:
            load_modules(self.own_modules, self.methods, modules, states.keys())
        else:
            take_over(self.own_modules, modules)
        for name, method in self.methods.items():
            if name in states:
                call_hook(method, "load_state_dict", states[name])

    # ── training ─────────────────────────────────────────────────────────────────────────────────

    @property
    def trained(self) -> tuple[nn.Module, nn.Module]:
        """The modules with trained parameters: the student and the methods' own modules."""
        return self.context.model, self.own_modules

    def wrapped(self) -> nn.Module:
        """The student, in DistributedDataParallel if there are several processes."""
        model = self.context.model
        if self.world.size == 1:
            return model
        device = self.world.device
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # find_unused_parameters keeps the initial gradient buckets. Otherwise they are rebuilt after the
            # first batch of every start, also of a resumed run; with three or more processes the order in
            # which gradients are summed depends on the buckets. Some of timm's networks have weights of
            # stages that only some methods use, --model mlp does not read MobileNetV2's last layer, and a
            # method of the user's may read any part of a network.
            find_unused_parameters=self.opts.deterministic
            or self.opts.method_file is not None
            or self.opts.model == "mlp"
            or self.opts.backbone.startswith("timm/"),
        )


def begin_methods(
    context: Context,
    methods: Mapping[str, Method],
    state: Mapping[str, Mapping[str, Any]],
    *,
    keep_teacher: bool = False,
) -> None:
    """Pass the previous step's states to the methods, request intermediates, call ``begin_step``.

    A teacher that no method reads is dropped, which saves its memory, unless ``keep_teacher``.
    """
    for name, method in methods.items():
        if name in state:
            call_hook(method, "from_previous_step", state[name])
    needs = frozenset().union(*(method.needs for method in methods.values()))
    teacher = frozenset().union(*(needs_of_teacher(method) for method in methods.values()))
    context.model.intermediates = needs  # type: ignore[assignment]
    if context.model_old is not None:
        context.model_old.intermediates = teacher  # type: ignore[assignment]
        read = any(method.needs_teacher or method.uses_teacher for method in methods.values())
        if not (keep_teacher or read):
            context.model_old = None
    for method in methods.values():
        call_hook(method, "begin_step", context)


def _method_states(content: Mapping[str, Any], methods: Mapping[str, Method]) -> dict[str, dict[str, Any]]:
    """States of methods in a checkpoint, by name; a released one has them as entries of its own."""
    released = {
        name: {entry: content[entry] for entry in method.released_state}
        for name, method in methods.items()
        if method.released_state and method.released_state <= content.keys()
    }
    return {**released, **content.get("method_state", {})}
