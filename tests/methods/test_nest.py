"""NeST's pre-tuning against a slow form of it, in a network that moves its running statistics."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argparser import parse_options
from methods import Context, build_methods
from modules import NetworkSpec
from modules.network import Network
from segmentation_module import IncrementalSegmentationModule, freeze, make_model
from tasks import Task
from utils.errors import UserError

OLD, NEW, WIDTH, SIDE, LR = 4, 2, 6, 16, 0.05
EPOCHS, BATCHES = 2, 3
TASK = Task("few", "voc", (tuple(range(OLD)), tuple(range(OLD, OLD + NEW))))


class Small(Network):
    """Features at a quarter of the size, with a norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH))
        self.out_channels = WIDTH

    def forward(self, images: Tensor, needs: frozenset[str] = frozenset()) -> tuple[Tensor, dict[str, Any]]:
        return self.body(images), {}


def batches(epoch: int = 0, without: int = -1) -> list[tuple[Tensor, Tensor]]:
    """Other crops in each epoch; labels background, new classes and void."""
    generator = torch.Generator().manual_seed(epoch)
    found = []
    for _ in range(BATCHES):
        labels = torch.tensor([0, OLD, OLD + 1, 255])[torch.randint(4, (2, SIDE, SIDE), generator=generator)]
        labels = torch.where(labels == without, 0, labels)
        found.append((torch.randn(2, 3, SIDE, SIDE, generator=generator), labels))
    return found


def networks() -> tuple[IncrementalSegmentationModule, IncrementalSegmentationModule]:
    torch.manual_seed(1)
    teacher = IncrementalSegmentationModule(Small(), [OLD])
    for _ in range(3):
        teacher(torch.randn(2, 3, SIDE, SIDE))
    student = IncrementalSegmentationModule(Small(), [OLD, NEW])
    student.load_previous(teacher.state_dict())
    return freeze(teacher).eval(), student


def begin(
    fidelity: str,
    student: IncrementalSegmentationModule,
    teacher: IncrementalSegmentationModule,
    images: Callable[..., Any] = batches,
    words: tuple[str, ...] = (),
    **more: Any,
) -> IncrementalSegmentationModule:
    """The student after ``begin_step``; the released random number is drawn from seed 5."""
    opts = parse_options(
        ["--nest", "--warm_epochs", str(EPOCHS), "--warm_lr_scale", "2", "--fidelity", fidelity, *words]
    )
    context = Context(TASK, 1, student, teacher, fidelity=fidelity, batches=images, lr=LR, **more)
    torch.manual_seed(5)
    build_methods(opts, 1)["ClassifierPreTuning"].begin_step(context)
    return student


def enlarge(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def slow_matrices(
    teacher: IncrementalSegmentationModule, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    sums, counts = torch.zeros(NEW, OLD, WIDTH, dtype=torch.float64), [0, 0]
    for images, labels in batches(0):
        for image, label in zip(images, labels, strict=True):
            features = teacher.network(image[None])[0]
            logits = enlarge(F.conv2d(features.double(), weight[:, :, None, None], bias), SIDE)
            p, f = enlarge(logits, 128)[0].softmax(dim=0), enlarge(features.double(), 128)[0]
            near = F.interpolate(label[None, None].float(), size=(128, 128))[0, 0]
            for c in range(NEW):
                for k in range(OLD):
                    active = f * weight[k][:, None, None] > 0
                    sums[c, k] += (active * p[k])[:, near == OLD + c].sum(dim=1)
                counts[c] += int((near == OLD + c).sum())
    M = torch.stack([sums[c] / counts[c] for c in range(NEW)])
    return M, M.sum(dim=2).softmax(dim=1)


def slow(fidelity: str, loss_form: str = "unce") -> tuple[dict[str, Tensor], IncrementalSegmentationModule]:
    """Classifiers after the pre-tuning, in float64 (the network in float32), and the student's network."""
    teacher, student = networks()
    w, b = teacher.cls.parts[0].weight[:, :, 0, 0].double(), teacher.cls.parts[0].bias.double()
    M, P = slow_matrices(teacher, w, b)
    torch.manual_seed(5)
    bound = 1 / math.sqrt(WIDTH)
    start = torch.empty(1).uniform_(-bound, bound).double() if fidelity == "released" else b[:1]
    theta = {
        "M": M,
        "P": P,
        "b": start.repeat(NEW),
        "M0": torch.ones(WIDTH).double(),
        "P0": torch.ones(1).double(),
    }
    velocity = {key: torch.zeros_like(value) for key, value in theta.items()}
    student.train(fidelity == "released")

    def transformed(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        new = [sum(t["P"][c, k] * t["M"][c, k] * w[k] for k in range(OLD)) for c in range(NEW)]
        return t["P0"] * t["M0"] * w[0], torch.stack(new)

    total = EPOCHS * BATCHES
    for epoch in range(EPOCHS):
        for number, (images, labels) in enumerate(batches(epoch)):
            with torch.no_grad():
                features = student.network(images)[0].double()
            leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
            background, new = transformed(leaves)
            weight = torch.cat([background[None], w[1:], new])
            small = F.conv2d(features, weight[:, :, None, None], torch.cat([b, leaves["b"]]))
            p = enlarge(small, SIDE).softmax(dim=1)
            loss = torch.zeros(labels.shape).double()
            for c in [0, *range(OLD, OLD + NEW)]:
                mine = p[:, c] if c or loss_form == "ce" else p[:, :OLD].sum(dim=1)
                loss = loss - mine.log() * (labels == c)
            gradients = torch.autograd.grad(loss.mean(), list(leaves.values()))
            done = epoch * BATCHES + number + (1 if fidelity == "released" else 0)
            rate = 2 * LR * (1 - done / total) ** 0.9
            for key, gradient in zip(theta, gradients, strict=True):
                slope = gradient + 1e-4 * theta[key]
                velocity[key] = 0.9 * velocity[key] + slope
                theta[key] = theta[key] - rate * (slope + 0.9 * velocity[key])
    background, new = transformed(theta)
    lengths = w.norm(dim=1)
    expected = {
        "0.weight": torch.cat([(background / background.norm() * lengths[0])[None], w[1:]])[:, :, None, None],
        "0.bias": b,
        "1.weight": (new * lengths.mean() / new.norm(dim=1).mean())[:, :, None, None],
        "1.bias": theta["b"] * b.norm() / theta["b"].norm(),
    }
    return expected, student


@pytest.mark.parametrize("loss_form", ["unce", "ce"])
@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_pre_tuning(fidelity: str, loss_form: str) -> None:
    expected, network = slow(fidelity, loss_form)
    teacher, student = networks()
    before = copy.deepcopy(student.state_dict())
    begin(fidelity, student, teacher, words=("--warm_loss", loss_form))
    for name, value in student.cls.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, network.network.state_dict()[name]), name
        moved = "running" in name or "tracked" in name
        assert torch.equal(value, before[f"network.{name}"]) != (moved and fidelity == "released"), name
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_balanced_start_has_no_effect() -> None:
    expected = slow("paper")[0]
    teacher, student = networks()
    student.cls.start(balanced=True)
    begin("paper", student, teacher)
    for name, value in student.cls.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_two_processes_with_halves_of_the_batches(fidelity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that meet at every sum. Without batch statistics the result is that of whole batches."""
    barrier = threading.Barrier(2, timeout=60)
    *sides, (teacher, student) = [networks() for _ in range(3)]
    # The threads share a generator of random numbers.
    monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.fill_(high / 2))
    alone = begin(fidelity, student, teacher).state_dict()
    given: dict[int, Tensor] = {}

    def process(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            given[rank] = tensor.clone()
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return tensor.copy_(total)

        def half(epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
            return [(images[rank : rank + 1], labels[rank : rank + 1]) for images, labels in batches(epoch)]

        teacher, student = sides[rank]
        begin(fidelity, student, teacher, half, reduce=reduce)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (student.state_dict() for _, student in sides)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if fidelity == "paper":
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6, msg=name)


class Stop(Exception):
    """The process is killed."""


@pytest.mark.parametrize("fidelity", ["paper", "released"])
@pytest.mark.parametrize("killed_in", [0, 1])
def test_a_killed_pre_tuning_goes_on_with_equal_bits(fidelity: str, killed_in: int) -> None:
    teacher, student = networks()
    whole = begin(fidelity, student, teacher).state_dict()
    stored: dict[str, dict[str, Tensor]] = {}
    passes: list[int] = []

    def cached(
        name: str, inputs: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if name not in stored:
            stored[name] = copy.deepcopy(compute())
        return stored[name]

    def killing(epoch: int = 0) -> Any:
        passes.append(epoch)
        for number, batch in enumerate(batches(epoch)):
            if passes.count(killed_in) > (killed_in == 0) and number == 1 and not resumed:
                raise Stop
            yield batch

    resumed = False
    teacher, student = networks()
    with pytest.raises(Stop):
        begin(fidelity, student, teacher, killing, cached=cached)
    resumed, stopped = True, list(passes)
    teacher, student = networks()
    again = begin(fidelity, student, teacher, killing, cached=cached).state_dict()
    assert passes[len(stopped) :] == list(range(killed_in, EPOCHS)), "finished epochs are trained once"
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_a_class_without_a_pixel(fidelity: str) -> None:
    teacher, student = networks()
    begin(fidelity, student, teacher, lambda epoch=0: batches(epoch, without=OLD))
    for name, value in student.state_dict().items():
        assert value.isfinite().all(), name


def test_images_of_void_alone() -> None:
    teacher, student = networks()
    begin(
        "paper", student, teacher, lambda epoch=0: [(x, torch.full_like(y, 255)) for x, y in batches(epoch)]
    )
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_a_diverging_rate_is_reported() -> None:
    teacher, student = networks()
    with pytest.raises(UserError, match=r"--warm_lr_scale 1e\+06: the pre-tuning diverged; give less"):
        begin("paper", student, teacher, words=("--warm_lr_scale", "1e6", "--warm_epochs", "30"))


@pytest.mark.parametrize("kind", [{"backbone": "mobilenet_v2", "pooling": 0}, {"model": "segformer_b0"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_networks(kind: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher, student = (make_model(NetworkSpec.of(kind), sizes) for sizes in ([OLD], [OLD, NEW]))
    student.load_previous(teacher.state_dict())
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 3, 64, 64, generator=generator), torch.randint(6, (2, 64, 64), generator=generator)
    before = copy.deepcopy(student.cls.state_dict())
    begin(
        "released",
        student.to(dtype),
        freeze(teacher.to(dtype)).eval(),
        lambda epoch=0: [batch],
        ("--warm_lr_scale", "50"),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    )
    for name, value in student.cls.state_dict().items():
        assert value.isfinite().all() and value.dtype == dtype
        if name != "0.weight" or dtype == torch.float32:  # its change may be below bfloat16's digits
            assert torch.equal(value, before[name].to(dtype)) == (name == "0.bias"), name


def test_its_options_go_with_it() -> None:
    for words in (
        ["--warm_epochs", "3"],
        ["--warm_lr_scale", "3"],
        ["--unce_in_warm"],
        ["--warm_loss", "ce"],
    ):
        with pytest.raises(UserError, match=r"--warm_\w+ goes with --nest; give it, or drop this"):
            parse_options(words)
    published = parse_options(["--warm_up", "--warm_epochs", "5", "--warm_lr_scale", "1", "--unce_in_warm"])
    assert published.nest and published.warm_loss == "unce"
    with pytest.raises(UserError, match=r"--classifier unknown"):
        parse_options(["--nest", "--classifier", "unknown"])
