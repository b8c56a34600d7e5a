"""Builds a training step of any method and network on random images, as ``session/`` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from argparser import Options, parse_options
from benchmarks.measure import Column, Row, heading, markdown, write_report
from methods import Context, build_methods
from modules import NetworkSpec
from segmentation_module import IncrementalSegmentationModule, freeze, make_model
from session.networks import begin_methods
from session.optimizer import make_optimizer
from train import Precision, Trainer, to_device
from utils.labels import VOID
from utils.memory import keep_freed_memory
from utils.option_types import positive_int, whole

Sample = tuple[Tensor, Tensor, dict[str, Tensor]]

MODELS = {
    "deeplab-resnet101": ["--model", "deeplab", "--backbone", "resnet101"],
    "deeplab-resnet50": ["--model", "deeplab", "--backbone", "resnet50"],
    "deeplab-mobilenet_v2": ["--model", "deeplab", "--backbone", "mobilenet_v2"],
    "segformer_b0": ["--model", "segformer_b0"],
    "segformer_b2": ["--model", "segformer_b2"],
}
ALL_METHODS = (
    *("FT", "LWF", "LWF-MC", "ILT", "EWC", "RW", "PI", "MIB", "CIL", "SDR", "PLOP", "SSUL", "SATS"),
    *("DKD", "STAR", "MIB+EWF", "PLOP+EWF", "LGKD", "MIB+NeST", "PLOP+NeST"),
    *("RCIL", "DFT"),
)
DEEPLAB_ONLY = ("RCIL",)


def methods_of(model: str) -> list[str]:
    """All methods that a network allows."""
    return [name for name in ALL_METHODS if model.startswith("deeplab") or name not in DEEPLAB_ONLY]


@dataclass
class Bench:
    """One step of training, ready to run.

    Attributes:
        opts: checked options.
        trainer: the real trainer with the method.
        sample: a batch as returned by the loader.
    """

    opts: Options
    trainer: Trainer
    sample: Sample

    @property
    def context(self) -> Context:
        """Context of the step: networks, classes and device."""
        return self.trainer.context

    @property
    def student(self) -> IncrementalSegmentationModule:
        """The student network, not wrapped."""
        model = self.context.model
        assert isinstance(model, IncrementalSegmentationModule)
        return model

    def run(self) -> dict[str, Tensor]:
        """Run one step of the method."""
        return self.trainer.train_step(*self.sample)

    def bare(self, *, teacher: bool) -> Callable[[], object]:
        """One step of the same network with cross entropy only, optionally after the teacher's forward pass.

        The networks return logits only, without intermediates.
        """
        context, trainer = self.context, self.trainer
        networks = [context.model, context.model_old] if teacher else [context.model]

        def step() -> None:
            needs = [(model, model.intermediates) for model in networks if model is not None]
            for model, _ in needs:
                model.intermediates = frozenset()  # type: ignore[assignment]
            trainer.optimizer.zero_grad(set_to_none=True)
            images = to_device(self.sample[0], context.device)
            targets = self.sample[1].to(context.device, non_blocking=True).long()
            with trainer.precision.network():
                if teacher:
                    assert context.model_old is not None
                    with torch.no_grad():
                        context.model_old(images)
                logits, _ = trainer.model(images)
            scaler = trainer.precision.scaler
            scaler.scale(F.cross_entropy(logits.float(), targets, ignore_index=VOID)).backward()
            scaler.step(trainer.optimizer)
            scaler.update()
            for model, names in needs:
                model.intermediates = names

        return step


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by the benchmarks of whole steps."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--batch", type=positive_int, help="images per step; default 4, on CUDA 8")
    parser.add_argument("--crop", type=whole(32, 16384), help="pixels; default 128, on CUDA 512")
    parser.add_argument("--opt_level", help="as of run.py; default O0, on CUDA O1")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed repeats of each case")


def prepare(args: argparse.Namespace) -> torch.device:
    """Set the device-dependent defaults of ``add_options``, and set up the device as a run does."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    args.batch = args.batch or (8 if cuda else 4)
    args.crop = args.crop or (512 if cuda else 128)
    typed, args.opt_level = args.opt_level, Precision(args.opt_level or ("O1" if cuda else "O0"), device).used
    if typed not in (None, args.opt_level):
        print(f"--opt_level {typed}: this CPU has no fast bfloat16, {args.opt_level} is used")
    torch.set_num_threads(args.threads)
    if cuda:
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    return device


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of ``options`` that ``add_options`` adds."""
    return {"batch": args.batch, "crop": args.crop, "opt_level": args.opt_level}


def show(args: argparse.Namespace, device: torch.device, columns: Sequence[Column], rows: list[Row]) -> str:
    """Print the rows of ``--method`` on ``--model`` with a heading, and write them; returns the heading."""
    title = f"{args.method}, {args.model}, B = {args.batch}, {args.crop}², {args.opt_level}"
    print(f"{title}\n{heading(device)}\n{markdown(columns, rows)}")
    write_report(args.out, device, step=title, rows=rows)
    return title


def options(
    method: str, model: str, *, batch: int, crop: int, opt_level: str = "O0", words: tuple[str, ...] = ()
) -> Options:
    """Options of a step on the VOC task 15-5; ``words`` are appended and may change the task.

    On DeepLab, which has no attention, SATS transfers class means of features.
    """
    named = ["--method", method, "--task", "15-5", *MODELS[model]]
    if method == "SATS" and model.startswith("deeplab"):
        named += ["--distill_object", "sats-feature-CNN"]
    sizes = ["--batch_size", str(batch), "--crop_size", str(crop), "--opt_level", opt_level]
    return parse_options([*named, *sizes, "--no_pretrained", *words])


def bench(opts: Options, device: torch.device, *, step: int = 1, channels_last: bool = True) -> Bench:
    """Build networks with random weights, methods and optimiser of a step."""
    torch.manual_seed(0)
    precision = Precision.of(opts, device)
    student = _placed(_model(opts, step), precision, channels_last)
    context = Context(
        task=opts.task_,
        step=step,
        model=student,
        device=device,
        protocol=opts.protocol,
        fidelity=opts.fidelity,
        autocast=precision.network,
    )
    sample = make_sample(opts, context)
    context.batches = _batches_of(sample, device)
    state: dict[str, Any] = {}
    if step:
        teacher = _placed(_model(opts, step - 1), precision, channels_last)
        state = _state_before(opts, replace(context, step=step - 1, model=teacher))
        context.model_old = freeze(teacher).eval()
    methods = build_methods(opts, step)
    begin_methods(context, methods, state, keep_teacher=True)
    optimizer = make_optimizer(opts, student, methods, 1e-4)
    trainer = Trainer(context, methods, optimizer, precision=precision)
    if opts.compile:
        trainer.compile()
    trainer.model.train()
    return Bench(opts, trainer, sample)


def _model(opts: Options, step: int) -> IncrementalSegmentationModule:
    task = opts.task_
    return make_model(NetworkSpec.of(opts), task.classes_per_step(step), task.later_classes_per_step(step))


def _placed(
    model: IncrementalSegmentationModule, precision: Precision, channels_last: bool
) -> IncrementalSegmentationModule:
    if channels_last:
        return precision.place(model)
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return precision.cast(model.to(precision.device))


def _state_before(opts: Options, context: Context) -> dict[str, Any]:
    """State of the methods after an untrained previous step with labels of its own, e.g. importances."""
    context.batches = _batches_of(make_sample(opts, context), context.device)
    methods = {name: m for name, m in build_methods(opts, context.step).items() if not m.needs_teacher}
    needs = frozenset().union(*(method.needs for method in methods.values()))
    context.model.eval().intermediates = needs  # type: ignore[assignment]
    for method in methods.values():
        method.begin_step(context)
        method.end_step(context)
    return {name: method.state_dict() for name, method in methods.items()}


def _batches_of(sample: Sample, device: torch.device) -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """One batch per epoch, as ``Context.batches`` has them."""
    return lambda epoch=0: [(to_device(sample[0], device), sample[1].to(device).long())]


def make_sample(opts: Options, context: Context) -> Sample:
    """Random pixels; labels constant in squares: background, the step's classes and some void."""
    generator = torch.Generator().manual_seed(1)
    batch, crop, cells = opts.batch_size, opts.crop_size, max(opts.crop_size // 32, 1)
    images = torch.randint(0, 256, (batch, 3, crop, crop), generator=generator, dtype=torch.uint8)
    new = range(context.classes_old, context.classes_old + context.classes_new)
    ids = torch.tensor([0, 0, 0, *new, VOID], dtype=torch.uint8)
    coarse = ids[torch.randint(len(ids), (batch, 1, cells, cells), generator=generator)]
    targets = F.interpolate(coarse.float(), size=(crop, crop)).to(torch.uint8)[:, 0].contiguous()
    reads_saliency = any("saliency" in method.extras for method in build_methods(opts, context.step).values())
    extras = {"saliency": (targets % 2).contiguous()} if reads_saliency else {}
    if context.device.type == "cuda":  # as from the loader
        images, targets = images.pin_memory(), targets.pin_memory()
        extras = {name: extra.pin_memory() for name, extra in extras.items()}
    return images, targets, extras
