"""Every kernel against the formula that it replaces: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from utils import loss as L
from utils import loss_kernels

OLD, CLASSES = 3, 5


class Inputs(NamedTuple):
    """A batch of one size: leaves of what is trained, and what it is compared with."""

    logits: Tensor
    teacher: Tensor
    features: Tensor
    features_old: Tensor
    prototypes: Tensor
    labels: Tensor


class Case(NamedTuple):
    kernel: str
    loss: Callable[[Inputs], Tensor]
    trained: str


def reduced(loss: nn.Module, *inputs: str) -> Callable[[Inputs], Tensor]:
    return lambda batch: loss(*(getattr(batch, name) for name in inputs))


def contrastive(batch: Inputs) -> Tensor:
    attraction, repulsion = L.FeaturesClusteringSeparationLoss()(
        batch.features, batch.labels, batch.prototypes
    )
    return attraction + 0.5 * repulsion


def matching(batch: Inputs) -> Tensor:
    return L.DistillationEncoderPrototypesLoss()(
        batch.features, batch.labels, batch.teacher, batch.prototypes, OLD
    )


def sparsity(criterion: nn.Module) -> Callable[[Inputs], Tensor]:
    # After a ReLU, as SDR's features are: the ratio divides by their sum.
    return lambda batch: criterion(batch.features.abs(), batch.labels)


def pod(
    prepro: str = "pow", difference: str = "frobenius", per_scale: object = False, **options: Any
) -> Callable[[Inputs], Tensor]:
    switch = {"difference_function": difference, "switch": {"normalize_per_scale": per_scale}}
    criterion = L.LocalPODLoss(pod_options=switch, pod_prepro=prepro, **options)
    return lambda batch: criterion([batch.features_old], [batch.features], CLASSES, CLASSES - OLD, OLD)


CASES = {
    **{
        f"unbiased CE, {reduction}, {old} old": Case(
            "unbiased_cross_entropy",
            reduced(L.UnbiasedCrossEntropy(old, reduction), "logits", "labels"),
            "logits",
        )
        for reduction in ("mean", "none")
        for old in (1, OLD, CLASSES)
    },
    **{
        f"{loss.__name__}, {alpha}": Case(
            "distillation", reduced(loss(alpha=alpha), "logits", "teacher"), "logits"
        )
        for loss in (L.KnowledgeDistillationLoss, L.UnbiasedKnowledgeDistillationLoss)
        for alpha in (1.0, 2.5)
    },
    "contrastive": Case("class_statistics", contrastive, "features"),
    "matching": Case("class_statistics", matching, "features"),
    **{
        f"sparsity, {norm}, {shrinking}": Case(
            "max_ratio",
            sparsity(L.FeaturesSparsificationLoss(norm, shrinking)),
            "features",
        )
        for norm in ("max_foreachfeature", "max_maskedforclass", "max_overall")
        for shrinking in ("squared", "power3", "exponential")
    },
    **{
        f"local POD, {prepro}, {difference}, {per_scale}": Case(
            "local_pod_distance", pod(prepro, difference, per_scale), "features"
        )
        for prepro in ("pow", "abs", "relu", "none")
        for difference, per_scale in (("frobenius", False), ("l1", True), ("frobenius", "spm"))
    },
    "local POD, grids not nested": Case("channel_by_channel", pod(spp_scales=(1, 3)), "features"),
    "spatial POD": Case("channel_by_channel", pod(pod="spatial"), "features"),
    "global POD": Case("channel_by_channel", pod(pod="global", difference="l1"), "features"),
}  # fmt: skip


def make(batch: int, side: int, dtype: torch.dtype, layout: torch.memory_format) -> Inputs:
    generator = torch.Generator().manual_seed(side)

    def randn(*shape: int) -> Tensor:
        values = (2 * torch.randn(shape, generator=generator)).to(dtype)
        return values.contiguous(memory_format=layout)

    labels = torch.randint(0, CLASSES, (batch, 2 * side, 2 * side), generator=generator)
    small = L.downsample_labels(labels, (side, side))
    void = torch.rand(labels.shape, generator=generator) < 0.2
    return Inputs(
        logits=randn(batch, CLASSES, side, side),
        teacher=randn(batch, OLD, side, side),
        features=randn(batch, 12, side, side),
        features_old=randn(batch, 12, side, side),
        prototypes=torch.randn(CLASSES, 12, generator=generator),
        labels=small.masked_fill(void[:, :side, :side], L.VOID),
    )


def value_and_gradient(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    leaf = getattr(inputs, case.trained).detach().clone().requires_grad_()
    value = case.loss(inputs._replace(**{case.trained: leaf}))
    weights = torch.linspace(0.5, 2.0, value.numel(), device=value.device).view_as(value)
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaf)[0]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
    ],
)
@pytest.mark.parametrize(("batch", "side", "block"), [(1, 4, 2**20), (3, 8, 70)])  # one block and many
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_formula(name, batch, side, block, dtype, layout, monkeypatch):
    case, inputs = CASES[name], make(batch, side, dtype, layout)
    with loss_kernels.used_on():
        expected, expected_gradient = value_and_gradient(case, inputs)
    calls = []
    kernel = getattr(loss_kernels, case.kernel)
    monkeypatch.setattr(loss_kernels, case.kernel, lambda *given: calls.append(1) or kernel(*given))
    monkeypatch.setattr(loss_kernels, "BLOCK", block)
    value, gradient = value_and_gradient(case, inputs)
    assert calls
    close(value, expected, 2e-6)
    close(gradient, expected_gradient, 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_formula_on_a_gpu(name, layout):
    """Not used there, but ``benchmarks.losses --plain`` compares their times."""
    case = CASES[name]
    inputs = Inputs(*(each.cuda() for each in make(3, 8, torch.float32, layout)))
    assert not loss_kernels.gain(inputs.logits)
    expected, expected_gradient = value_and_gradient(case, inputs)
    with loss_kernels.used_on("cuda", block=2**62):
        value, gradient = value_and_gradient(case, inputs)
    close(value, expected, 1e-5)
    close(gradient, expected_gradient, 1e-5)


def test_formulas_run_where_kernels_do_not_gain(monkeypatch):
    """On another device, and where kernels are not to be used, none is called."""
    assert loss_kernels.gain(torch.zeros(1)) and not loss_kernels.gain(torch.zeros(1, device="meta"))
    with loss_kernels.used_on("meta", block=7):
        assert not loss_kernels.gain(torch.zeros(1)) and loss_kernels.gain(torch.zeros(1, device="meta"))
        assert loss_kernels.BLOCK == 7
    assert loss_kernels.BLOCK == 2**20
    for kernel in {case.kernel for case in CASES.values()}:
        monkeypatch.setattr(loss_kernels, kernel, lambda *_: pytest.fail("a kernel ran"))
    with loss_kernels.used_on():
        for case in CASES.values():
            value_and_gradient(case, make(1, 4, torch.float32, torch.contiguous_format))
    assert loss_kernels.gain(torch.zeros(1))
