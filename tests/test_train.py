"""The training loop: order of the hooks, kinds of input, precision levels, losses that are not finite."""

from __future__ import annotations

import copy
import math
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from forked import SMALL_BACKBONE
from released_reference import Toy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from argparser import parse_options
from benchmarks.workbench import Bench, bench, options
from dataset.transforms import normalize
from methods import Batch, Context, Method, build_methods
from methods.classification import Classification
from methods.presets import preset
from metrics.stream_metrics import StreamSegMetrics
from tasks import get_task
from train import Means, NonFiniteLoss, Precision, Trainer, evaluate, groups
from utils.errors import UserError

CLASSES = [16, 5]  # VOC 15-5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def context(*, attention: bool = False) -> Context:
    """Step 1: a student and a teacher with weights of their own."""
    torch.manual_seed(0)
    teacher, student = Toy(CLASSES[:1], attention=attention), Toy(CLASSES, attention=attention)
    teacher.requires_grad_(False).eval()
    return Context(task=get_task("voc", "15-5"), step=1, model=student, model_old=teacher)


def batches(number: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([0, 0, 16, 18, 20, 255])
    patches = [ids[torch.randint(6, (2, 4, 4), generator=generator)] for _ in range(number)]
    return [
        (torch.randn(2, 3, 32, 32, generator=generator), p.repeat_interleave(8, 1).repeat_interleave(8, 2))
        for p in patches
    ]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def trained(made: Context, methods: dict[str, Method], loader: Any) -> dict[str, float]:
    for method in methods.values():
        method.begin_step(made)
    return train_epoch(Trainer(made, methods, sgd(made.model)), loader)


def train_epoch(trainer: Trainer, loader: Any, accumulate: int = 1) -> dict[str, float]:
    """The means of every term over the loader's batches."""
    means = Means()
    trainer.model.train()
    for samples in groups(loader, accumulate):
        means.add(trainer.train_group(samples), len(samples))
    return means.read()


def evaluated(model: nn.Module, loader: Any, metrics: StreamSegMetrics) -> StreamSegMetrics:
    device = torch.device("cpu")
    return evaluate(model, loader, metrics, device=device, precision=Precision("O0", device))


# ── order ────────────────────────────────────────────────────────────────────────────────────────


class Witness(Method):
    """Writes down when each hook is called, and what it sees."""

    needs_teacher = True

    def __init__(self, name: str, seen: list[str], parameter: nn.Parameter) -> None:
        self.name, self.seen, self.parameter = name, seen, parameter

    def note(self, hook: str) -> None:
        self.seen.append(f"{hook} {self.name}")

    def observe(self, batch: Batch) -> None:
        self.note("observe")
        assert batch.targets is batch.original_targets
        assert batch.outputs.requires_grad and not batch.outputs_old.requires_grad  # type: ignore[union-attr]
        assert batch.outputs.shape[1] == 21 and batch.outputs_old.shape[1] == 16  # type: ignore[union-attr]
        assert (batch.classes_old, batch.classes_new, batch.incremental_step) == (16, 5, 1)

    def relabel(self, batch: Batch) -> None:
        self.note("relabel")
        batch.targets = (batch.targets + 1) % 21

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.note("losses")
        # Both have relabelled before either computes its losses.
        assert torch.equal(batch.targets, (batch.original_targets + 2) % 21)
        return {self.name: 2.0 * self.parameter.sum() + 0.0 * batch.outputs.sum()}

    def after_backward(self) -> None:
        self.note("after_backward")
        # Two terms of slope 2, and nothing of a penalty yet.
        assert torch.equal(self.parameter.grad, torch.full_like(self.parameter, 4.0))

    def penalty(self) -> dict[str, Tensor]:
        self.note("penalty")
        return {f"penalty {self.name}": 10.0 * self.parameter.sum()}


def test_hooks_are_called_in_order_around_one_backward() -> None:
    made = context()
    seen: list[str] = []
    parameter = made.model.head.bias  # type: ignore[union-attr]
    methods: dict[str, Method] = {name: Witness(name, seen, parameter) for name in "ab"}
    made.model.register_forward_pre_hook(lambda *_: seen.append("student"))
    made.model_old.register_forward_pre_hook(lambda *_: seen.append("teacher"))  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("optimiser"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    step = scheduler.step
    scheduler.step = lambda: (seen.append("scheduler"), step())  # type: ignore[method-assign, assignment]
    before = parameter.detach().clone()
    terms = Trainer(made, methods, optimizer, scheduler).train_step(*batches(1)[0])
    hooks = ("observe", "relabel", "losses", "after_backward", "penalty")
    called = [f"{hook} {name}" for hook in hooks for name in "ab"]
    assert seen == ["teacher", "student", *called, "optimiser", "scheduler"]
    # Slope 4 of the losses and 20 of the penalties; plain SGD with rate 0.1.
    torch.testing.assert_close(parameter.detach(), before - 2.4)
    assert list(terms) == ["a", "b", "penalty a", "penalty b", "total"]
    torch.testing.assert_close(terms["total"], 24.0 * before.sum())
    assert not any(term.requires_grad for term in terms.values())


def test_student_trains_its_norm_layers_and_the_teacher_does_not() -> None:
    made = context()
    states = copy.deepcopy((made.model.state_dict(), made.model_old.state_dict()))  # type: ignore[union-attr]
    methods = build_methods(parse_options(["--method", "LWF", "--task", "15-5"]), 1)
    trained(made, methods, batches())
    after = made.model.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in states[0].items())
    for name, value in made.model_old.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "PLOP", "--pod_options", '{"colour": 1}'], "--pod_options: .* colour"),
        (["--method", "PLOP", "--pod_options", '{"switch": {"after": {"factor": "much"}}}'], "factor 'much'"),
        (["--method", "PLOP", "--pod_options", '{"switch": {"after": {"spp_scales": [1, 0]}}}'], r"\[1, 0\]"),
        (
            ["--method", "PLOP", "--pod_options", '{"switch": {"after": {"spp_scales": [99]}}}'],
            "99: the small",
        ),
        (["--method", "SDR", "--lfc_orth_maxonly"], "needs --lfc_orth_sep"),
    ],
)
def test_wrong_options_of_methods_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_methods(parse_options(["--task", "15-5", *words]), 1)


def test_the_teacher_runs_only_for_a_method_that_looks_at_it() -> None:
    for words, runs in (("FT", 0), ("EWC", 0), ("FT --ewf", 0), ("LWF --ewf", 3)):
        made, calls = context(), []
        made.model_old.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr]
        trained(
            made, build_methods(parse_options(["--task", "15-5", "--method", *words.split()]), 1), batches()
        )
        assert len(calls) == runs


class ConstantPenalty(Method):
    def penalty(self) -> dict[str, Tensor]:
        return {"reg": torch.zeros(())}


def test_a_penalty_without_gradient_is_no_fault() -> None:
    means = trained(context(), {"a": Classification(), "b": ConstantPenalty()}, batches())
    assert means["reg"] == 0.0 and means["total"] == means["ce"]


# ── accumulation ─────────────────────────────────────────────────────────────────────────────────


def kd(made: Context) -> dict[str, Method]:
    methods = build_methods(parse_options(["--method", "LWF", "--task", "15-5"]), 1)
    for method in methods.values():
        method.begin_step(made)
    return methods


def test_an_accumulated_step_is_that_of_the_mean_of_the_losses() -> None:
    loader = batches(5)
    made, by_hand = context(), context()
    assert [len(samples) for samples in groups(loader, 2)] == [2, 2, 1]
    train_epoch(Trainer(made, kd(made), sgd(made.model)), loader, accumulate=2)
    model, teacher, optimizer = by_hand.model, by_hand.model_old, sgd(by_hand.model)
    methods = kd(by_hand)
    model.train()
    for group in (loader[:2], loader[2:4], loader[4:]):  # the last step has the mean over its own batch
        losses = []
        for images, targets in group:
            with torch.no_grad():
                outputs_old, _ = teacher(images)  # type: ignore[misc]
            batch = Batch(images, targets, targets, 1, 16, 5, model(images)[0], outputs_old=outputs_old)
            losses += [sum(t for m in methods.values() for t in m.losses(batch).values())]
        optimizer.zero_grad()
        (sum(losses) / len(group)).backward()  # type: ignore[union-attr]
        optimizer.step()
    expected = model.state_dict()
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


class Importance(Method):
    """Looks at the gradient once per optimiser step, and penalises."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.gradients = parameter, list[Tensor]()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"a": batch.images.mean() * self.parameter.sum() + 0.0 * batch.outputs.sum()}

    def after_backward(self) -> None:
        self.gradients.append(self.parameter.grad.clone())  # type: ignore[union-attr]

    def penalty(self) -> dict[str, Tensor]:
        return {"reg": 3.0 * self.parameter.sum()}


def test_importance_penalty_and_schedule_come_once_per_optimiser_step() -> None:
    made = context()
    parameter = made.model.head.bias  # type: ignore[union-attr]
    method, loader = Importance(parameter), batches(3)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = parameter.detach().clone()
    trainer = Trainer(made, {"a": method}, optimizer, scheduler)
    terms = trainer.train_group(loader[:2])
    slopes = [images.mean() for images, _ in loader]
    torch.testing.assert_close(parameter.detach(), before - 0.1 * (sum(slopes[:2]) / 2 + 3.0))
    torch.testing.assert_close(terms["a"], sum(slopes[:2]) / 2 * before.sum())
    torch.testing.assert_close(terms["reg"], 3.0 * before.sum())
    torch.testing.assert_close(terms["total"], terms["a"] + terms["reg"])
    train_epoch(trainer, loader, accumulate=2)
    expected = [sum(slopes[:2]) / 2, sum(slopes[:2]) / 2, slopes[2]]
    for gradient, slope in zip(method.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, torch.full_like(gradient, float(slope)))
    assert scheduler.get_last_lr() == [0.1 * 0.5**3]


def test_means_of_an_epoch_count_every_batch_alike() -> None:
    made = context()
    trainer = Trainer(made, {"a": Counting()}, sgd(made.model))
    assert train_epoch(trainer, batches(7), accumulate=3) == {"count": 3.0, "total": 3.0}


# ── nothing waits ────────────────────────────────────────────────────────────────────────────────

METHODS = ("FT", "LWF", "LWF-MC", "ILT", "EWC", "RW", "PI", "MIB", "CIL", "SDR", "PLOP", "SSUL", "SATS")
WAITING_OPS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
}
READING = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class Waits(TorchDispatchMode):
    """Counts operations for whose result, or whose result's size, the host would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = "index" in name and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITING_OPS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what Python calls to look at a tensor's values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # By its name only: the device that a context names is the CPU itself here.
        to_host = name == "to" and any(isinstance(word, str) and word == "cpu" for word in args[1:])
        if name in READING or to_host:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(function: Any) -> Counter[str]:
    ops, reads = Waits(), Reads()
    with ops, reads:
        function()
    return ops.found + reads.found


def ready(name: str, fidelity: str, device: str = "cpu") -> Trainer:
    """A trainer of step 1; importances come from a step 0."""
    opts = parse_options(["--method", name, "--task", "15-5", "--fidelity", fidelity])
    old, new = ([1, 15, 1], [1, 15, 5, 1]) if opts.unknown else (CLASSES[:1], CLASSES)
    torch.manual_seed(0)
    teacher, student = (Toy(classes, attention=True).to(device) for classes in (old, new))
    made = context()
    made.device, made.fidelity, made.model, made.model_old = torch.device(device), fidelity, student, teacher
    made.batches = lambda: [(images.to(device), targets.to(device)) for images, targets in batches()]
    before = Context(task=made.task, step=0, model=teacher, device=made.device)
    states = {}
    for kind, method in build_methods(opts, 0).items():
        method.begin_step(before)
        states[kind] = method.state_dict()
    teacher.requires_grad_(False).eval()
    methods = build_methods(opts, 1)
    for kind, method in methods.items():
        method.from_previous_step(states.get(kind, {}))
        method.begin_step(made)
    trainer = Trainer(made, methods, torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9))
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_no_step_of_any_method_waits_for_a_value(name: str, fidelity: str) -> None:
    trainer, loader = ready(name, fidelity), batches(2)

    def steps() -> None:
        for sample in loader:
            trainer.train_step(*sample)

    assert not waits(steps)
    if name in ("EWC", "RW", "PI"):
        assert "reg" in trainer.train_step(*loader[0]), "the penalty took part"


NEWER = ("DKD", "STAR", "MIB+EWF", "PLOP+EWF", "LGKD", "MIB+NeST", "PLOP+NeST", "RCIL", "DFT")


def made_for(name: str, fidelity: str, device: str, *words: str) -> Bench:
    """A step with the networks and heads that newer methods need, after one step."""
    crop = 128 if "pod" in preset(name, dataset="voc", task="15-5") else 64  # PLOP's grids need maps of 4 × 4
    if name != "RCIL":  # whose branches only some backbones have
        words += ("--backbone", SMALL_BACKBONE)
    opts = options(name, "deeplab-mobilenet_v2", batch=2, crop=crop, words=("--fidelity", fidelity, *words))
    made = bench(opts, torch.device(device))
    made.run()
    return made


# STAR's numbers of replayed features are on the host, which is not told apart here; the test on CUDA has it.
@pytest.mark.parametrize("name", [name for name in NEWER if name != "STAR"])
@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_no_step_of_a_newer_method_waits_for_a_value(name: str, fidelity: str) -> None:
    assert not waits(made_for(name, fidelity, "cpu").run)


def test_waits_are_seen() -> None:
    values, mask = torch.arange(3), torch.tensor([True, False, True])
    for look in (
        lambda: values.sum().item(),
        lambda: values[mask],
        lambda: mask.nonzero(),
        lambda: values.unique(),
        lambda: bool(mask.any()),
        lambda: values.to("cpu"),
        lambda: values.tolist(),
    ):
        assert waits(look)
    assert not waits(lambda: values[values.flip(0)] + values.sum())


@pytest.mark.cuda
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_no_step_of_any_method_waits_for_a_gpu(name: str, fidelity: str) -> None:
    trainer = ready(name, fidelity, "cuda")
    loader = [(images.pin_memory(), targets.pin_memory()) for images, targets in batches(2)]
    trainer.train_step(*loader[0])  # warms up libraries and caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(*loader[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_no_step_of_a_newer_method_waits_for_a_gpu(name: str, fidelity: str) -> None:
    made = made_for(name, fidelity, "cuda", "--opt_level", "O1")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = made.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.cuda
def test_half_precision_is_bfloat16_where_the_gpu_has_it() -> None:
    device = torch.device("cuda", 0)
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    precision = Precision("O1", device)
    assert precision.dtype == (torch.bfloat16 if native else torch.float16)
    assert precision.scaler.is_enabled() is not native


def test_no_batch_of_an_evaluation_waits_for_a_value() -> None:
    made = context()
    metrics = StreamSegMetrics(21)
    assert not waits(lambda: evaluated(made.model, batches(2), metrics))
    assert int(metrics.confusion_matrix.sum()) == sum(int((t != 255).sum()) for _, t in batches(2))


class SavesTheTeacher(Method):
    """Its term is a product: autograd saves the teacher's outputs to differentiate it."""

    needs_teacher = True

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        product = batch.outputs[:, :16] * batch.outputs_old  # type: ignore[operator]
        maps = zip(batch.features["attentions"], batch.features_old["attentions"], strict=True)
        return {"products": product.mean() + sum((a * b).mean() for a, b in maps)}


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_the_teacher_runs_in_inference_mode_and_its_outputs_can_be_saved(level: str) -> None:
    made, modes = context(), []
    made.model_old.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))  # type: ignore[union-attr]
    trainer = Trainer(
        made,
        {"a": SavesTheTeacher()},
        sgd(made.model),
        precision=Precision(level, made.device, bfloat16=True),
    )
    images, targets = batches(1)[0]
    trainer.train_step(images, targets)
    assert modes == [True]
    gradient = made.model.cls[0].weight.grad  # type: ignore[union-attr, index]
    assert gradient.abs().sum() > 0
    if level == "O0":
        again = context()
        with torch.no_grad():
            outputs_old, maps_old = again.model_old(images)  # type: ignore[misc]
        outputs, maps = again.model(images)
        batch = Batch(images, targets, targets, 1, 16, 5, outputs, maps, outputs_old, maps_old)
        SavesTheTeacher().losses(batch)["products"].backward()
        torch.testing.assert_close(gradient, again.model.cls[0].weight.grad)  # type: ignore[union-attr, index]


# ── torch.compile ────────────────────────────────────────────────────────────────────────────────


class Tiny(nn.Module):
    """As little as can be compiled: B×3×H×W → logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)
        self.norm = nn.BatchNorm2d(classes)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.norm(self.layer(images)), {}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs the compiler g++ on the CPU")
def test_compiled_networks_train_alike_under_the_same_names() -> None:
    states = []
    for compile in (False, True):
        torch.manual_seed(0)
        teacher, student = Tiny(16).requires_grad_(False).eval(), Tiny(21)
        made = Context(task=get_task("voc", "15-5"), step=1, model=student, model_old=teacher)
        trainer = Trainer(made, kd(made), sgd(student))
        if compile:
            trainer.compile()
        means = train_epoch(trainer, batches(2))
        metrics = evaluated(student, batches(1), StreamSegMetrics(21))
        states.append((student.state_dict(), means, metrics.confusion_matrix))
    (weights, means, matrix), (compiled, compiled_means, compiled_matrix) = states
    assert weights.keys() == compiled.keys()
    for name, value in weights.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert compiled_means == pytest.approx(means, rel=1e-4)
    assert torch.equal(matrix, compiled_matrix)


def test_without_a_compiler_compile_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    made = context()
    with pytest.raises(UserError, match="--compile needs the C\\+\\+ compiler no-such-compiler"):
        Trainer(made, {}, sgd(made.model)).compile()


# ── input ────────────────────────────────────────────────────────────────────────────────────────


def test_uint8_images_and_labels_are_the_normalised_floats() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (3, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = [target for _, target in batches()]
    small = [(image, target.to(torch.uint8)) for image, target in zip(images, labels, strict=True)]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    by_hand = [((i.float() / 255 - mean) / deviation, t) for i, t in zip(images, labels, strict=True)]
    torch.testing.assert_close(normalize(images[0]), by_hand[0][0], rtol=1e-5, atol=1e-6)
    results = []
    for loader in (small, by_hand):
        made = context()
        results.append((made.model, trained(made, {"ce": Classification()}, loader)))
    assert results[0][1]["ce"] == pytest.approx(results[1][1]["ce"], rel=1e-5)
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Extras(Method):
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"saliency": batch.extras["saliency"].float().mean() + 0.0 * batch.outputs.sum()}


def test_extras_reach_the_methods_by_name() -> None:
    images, labels = batches(1)[0]
    half = torch.zeros_like(labels)
    half[:, :16] = 1
    means = trained(context(), {"extras": Extras()}, [(images, labels, {"saliency": half})])
    assert means["saliency"] == 0.5


# ── means ──────────────────────────────────────────────────────────────────────────────────────


class Counting(Method):
    """Its term is 0, 1, 2, ... over the batches."""

    def __init__(self) -> None:
        self.count = 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.count += 1
        return {"count": self.count - 1 + 0.0 * batch.outputs.sum()}


class TurnsBad(Counting):
    """A loss that is not finite from the third batch on."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        super().losses(batch)
        bad = self.value if self.count >= 3 else 1.0
        return {"bad": 0.0 * batch.outputs.sum() + bad, "good": 0.0 * batch.outputs.sum() + 0.5}


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_named_with_all_terms_and_their_values(value: float, shown: str) -> None:
    made = context()
    with pytest.raises(NonFiniteLoss) as caught:
        train_epoch(Trainer(made, {"a": TurnsBad(value)}, sgd(made.model)), batches(3))
    message = str(caught.value)
    assert f"bad {shown}" in message and "good " in message and "total" in message
    assert "\n" not in message and "--lr" in message


def test_weights_that_are_not_finite_are_named_by_the_real_losses() -> None:
    made = context()
    with torch.no_grad():
        made.model.head.bias.fill_(math.nan)  # type: ignore[union-attr]
    methods = build_methods(parse_options(["--method", "LWF", "--task", "15-5"]), 1)
    with pytest.raises(NonFiniteLoss, match="ce nan, kd nan, total nan"):
        trained(made, methods, batches())


# ── precision ────────────────────────────────────────────────────────────────────────────────────


class Types(Method):
    """The types in which the losses see the networks' outputs."""

    needs_teacher = True

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.seen = {batch.outputs.dtype, batch.features["attentions"][0].dtype, batch.outputs_old.dtype}  # type: ignore[union-attr]
        return {"a": batch.outputs.float().square().mean()}


@pytest.mark.parametrize(
    ("level", "weights", "losses"),
    [
        ("O0", torch.float32, torch.float32),
        ("O1", torch.float32, torch.float32),
        ("O2", torch.float32, torch.bfloat16),
        ("O3", torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_the_levels_lower(level: str, weights: torch.dtype, losses: torch.dtype) -> None:
    made, method = context(), Types()
    precision = Precision(level, made.device, bfloat16=True)
    made.model, made.model_old = precision.cast(made.model), precision.cast(made.model_old)  # type: ignore[type-var]
    convolved = []
    made.model.stem[0].register_forward_hook(lambda *found: convolved.append(found[2].dtype))  # type: ignore[union-attr, index]
    trainer = Trainer(made, {"a": method}, sgd(made.model), precision=precision)
    train_epoch(trainer, batches())
    assert {p.dtype for p in made.model.parameters()} == {weights}
    assert method.seen == {losses}
    assert set(convolved) == {torch.float32 if level == "O0" else torch.bfloat16}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_every_level_is_single_precision_where_the_processor_would_emulate_bfloat16(level: str) -> None:
    found = {}
    for chosen, bfloat16 in (("O0", True), (level, False)):
        made, method = context(), Types()
        precision = Precision(chosen, made.device, bfloat16)
        made.model, made.model_old = precision.place(made.model), precision.place(made.model_old)  # type: ignore[type-var]
        trainer = Trainer(made, {"a": method}, sgd(made.model), precision=precision)
        train_epoch(trainer, batches())
        assert method.seen == {torch.float32}
        assert (precision.level, precision.description) == (chosen, "float32")
        found[chosen] = made.model.state_dict()
    assert all(torch.equal(value, found["O0"][name]) for name, value in found[level].items())


@pytest.mark.parametrize(
    ("device", "level", "bfloat16", "description", "scaled"),
    [
        ("cpu", "O0", True, "float32", False),
        ("cpu", "O1", True, "bfloat16 autocast", False),
        ("cpu", "O2", True, "bfloat16 autocast, losses too", False),
        ("cpu", "O3", True, "bfloat16 weights", False),
        ("cuda", "O0", True, "float32", False),
        ("cuda", "O1", True, "bfloat16 autocast", False),
        ("cuda", "O1", False, "float16 autocast", True),
        ("cuda", "O2", False, "float16 autocast, losses too", True),
        ("cuda", "O3", False, "bfloat16 weights", False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_what_a_level_means_on_a_device(
    device: str, level: str, bfloat16: bool, description: str, scaled: bool
) -> None:
    precision = Precision(level, torch.device(device), bfloat16)
    assert precision.description == description
    assert precision.scaler.is_enabled() is (scaled and torch.cuda.is_available())

    def chosen(**options: str) -> Precision:
        given = {"opt_level": level, "norm_act": "abn", "half": "auto", **options}
        return Precision.of(Namespace(**given), torch.device(device), bfloat16)

    assert chosen().description == description
    # In-place norms have no kernels for bfloat16 on CUDA.
    in_float16 = description.replace("bfloat16 a", "float16 a")
    assert chosen(norm_act="iabn_sync").description == (in_float16 if device == "cuda" else description)
    if device == "cuda":
        assert chosen(half="float16").description == in_float16
    else:
        with pytest.raises(UserError, match=r"^--half float16 needs a GPU: "):
            chosen(half="float16")


@pytest.mark.parametrize("typed", [True, False])
def test_a_level_that_is_not_used_is_logged(typed: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Precision("O1", torch.device("cpu"), bfloat16=False).log_choice(typed)
        Precision("O1", torch.device("cpu"), bfloat16=True).log_choice(typed)
    (warned, used) = caplog.records
    assert warned.levelname == ("WARNING" if typed else "INFO")
    assert warned.getMessage().startswith("--opt_level O1 is computed in float32: ")
    assert "2 to 12 times as long" in warned.getMessage()
    assert (used.levelname, used.getMessage()) == ("INFO", "precision: bfloat16 autocast")


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("name", ["FT", "LWF-MC", "ILT", "MIB", "CIL", "SDR", "PLOP", "SATS", "EWC", "RW"])
@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_every_level_gives_finite_losses_near_those_of_single_precision(
    level: str, name: str, fidelity: str
) -> None:
    words = ["--method", name, "--task", "15-5", "--fidelity", fidelity]
    if name == "CIL":
        words += ["--loss_CIL", "1"]
    results = {}
    for chosen in ("O0", level):
        made = context(attention=True)
        made.fidelity = fidelity
        precision = Precision(chosen, made.device, bfloat16=True)
        made.model, made.model_old = precision.cast(made.model), precision.cast(made.model_old)  # type: ignore[type-var]
        made.batches, made.autocast = batches, precision.network
        methods = build_methods(parse_options(words), 1)
        for method in methods.values():
            method.begin_step(made)
        trainer = Trainer(made, methods, sgd(made.model), precision=precision)
        results[chosen] = {n: t.item() for n, t in trainer.train_step(*batches()[0]).items()}
        assert all(math.isfinite(value) for value in train_epoch(trainer, batches()).values())
        assert all(torch.isfinite(p).all() for p in made.model.parameters())
    for term, value in results["O0"].items():
        assert results[level][term] == pytest.approx(value, rel=0.1, abs=1e-4), term


class Gradients(Method):
    """A steep loss, and how often its gradients may be looked at."""

    def __init__(self) -> None:
        self.count = 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"steep": 1000.0 * batch.outputs.square().mean()}

    def after_backward(self) -> None:
        self.count += 1


def test_a_step_whose_scaled_gradients_overflow_leaves_no_trace() -> None:
    made, method = context(), Gradients()
    precision = Precision("O1", made.device, bfloat16=True)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-36)
    trainer = Trainer(made, {"a": method}, sgd(made.model), precision=precision)
    before = copy.deepcopy(list(made.model.parameters()))
    trainer.train_step(*batches()[0])
    assert method.count == 0
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    trainer.train_step(*batches()[0])
    assert method.count == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────


class Constant(nn.Module):
    """Predicts class 1 everywhere; its norm layer says in which mode it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = torch.zeros(images.shape[0], 3, *images.shape[2:]) + 0.0 * self.norm(images)
        logits[:, 1] = 1.0
        return logits, {}


def test_evaluation_counts_every_pixel_once_and_trains_nothing() -> None:
    model = Constant()
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[:, 0], labels[:, 1], labels[0, 2] = 1, 2, 255
    metrics = StreamSegMetrics(3)
    for _ in range(2):  # emptied first: the second pass does not add to the first
        evaluated(model, [(torch.randn(2, 3, 4, 4), labels)], metrics)
    matrix = torch.as_tensor(metrics.confusion_matrix)
    assert matrix[:, 1].tolist() == [12, 8, 8] and int(matrix.sum()) == 28
    assert not model.training and torch.equal(model.norm.running_mean, torch.zeros(3))
