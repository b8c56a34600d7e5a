"""What must hold for any input: symmetries, empty sets, void, duplicates, precision and memory layout."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from utils import loss as L
from utils import loss_kernels

OLD, CLASSES, DEPTH, SIDE = 3, 5, 6, 4

seeds = st.integers(0, 2**32 - 1)
batches = st.integers(1, 4)


class Problem:
    """A random batch with everything that a loss may ask for."""

    def __init__(self, seed, batch, void=0.2, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(batch, CLASSES, SIDE, SIDE, generator=g).mul(2).to(dtype)
        self.teacher = torch.randn(batch, OLD, SIDE, SIDE, generator=g).mul(2).to(dtype)
        self.features = torch.randn(batch, DEPTH, SIDE, SIDE, generator=g).abs().to(dtype)
        self.features_old = torch.randn(batch, DEPTH, SIDE, SIDE, generator=g).abs().to(dtype)
        self.attention = torch.randn(batch, 2, SIDE * SIDE, 3, generator=g).to(dtype)
        self.attention_old = torch.randn(batch, 2, SIDE * SIDE, 3, generator=g).to(dtype)
        self.prototypes = torch.randn(CLASSES, DEPTH, generator=g).abs()
        labels = torch.randint(0, CLASSES, (batch, SIDE, SIDE), generator=g)
        self.labels = labels.masked_fill(torch.rand(labels.shape, generator=g) < void, 255)

    _PER_IMAGE = (
        "logits", "teacher", "features", "features_old", "attention", "attention_old", "labels"
    )  # fmt: skip

    def pick(self, images):
        """The same problem with other images: a permutation or copies."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in self._PER_IMAGE:
            setattr(other, name, getattr(self, name)[images])
        return other


@pytest.fixture(params=["kernels", "formulas"])
def forms(request):
    """Twice: as the CPU computes, and as other devices do."""
    with loss_kernels.used_on() if request.param == "formulas" else contextlib.nullcontext():
        yield


def contrastive(which, **options):
    def run(p):
        return L.FeaturesClusteringSeparationLoss(**options)(p.features, p.labels, p.prototypes)[which]

    return run


def attention(distill_object):
    criterion = L.AttentionTransferLoss(distill_object)
    if distill_object.endswith("CNN"):
        return lambda p: criterion([p.features_old], [p.features], p.labels)
    return lambda p: criterion([p.attention_old], [p.attention], p.labels)


def sparsity(normalization, function="ratio"):
    criterion = L.FeaturesSparsificationLoss(normalization, "exponential", function)
    return lambda p: criterion(p.features, p.labels)


def decomposed(sign):
    criterion = L.DecomposedDistillationLoss(sign)
    return lambda p: criterion(p.features, p.features_old, p.prototypes - 0.5, p.prototypes[:OLD] - 0.7)


def pckd_maps(problem):
    return [problem.features_old, problem.teacher], [problem.features, problem.logits]


# name: (loss of a problem, the tensor that it trains)
MEANS = {
    "ce": (lambda p: L.UnbiasedCrossEntropy(old_cl=OLD)(p.logits, p.labels), "logits"),
    "bce": (lambda p: L.BCEWithLogitsLossWithIgnoreIndex()(p.logits, p.labels), "logits"),
    "focal": (lambda p: L.FocalLoss()(p.logits, p.labels), "logits"),
    "icarl": (lambda p: L.IcarlLoss()(p.logits, p.labels, p.teacher.sigmoid()), "logits"),
    "kd": (lambda p: L.KnowledgeDistillationLoss()(p.logits, p.teacher), "logits"),
    "unkd": (lambda p: L.UnbiasedKnowledgeDistillationLoss()(p.logits, p.teacher), "logits"),
    "lgkd": (
        lambda p: L.LabelGuidedKnowledgeDistillationLoss(5, 0.5)(p.logits, p.teacher, p.labels), "logits"
    ),
    "cil": (lambda p: L.CILDistillationLoss(gs=1)(p.logits, p.teacher, p.labels), "logits"),
    "encoder": (
        lambda p: L.DistillationEncoderLoss()(p.features, p.features_old, p.labels, OLD), "features"
    ),
    "encoder masked": (
        lambda p: L.DistillationEncoderLoss(mask=True)(p.features, p.features_old, p.labels, OLD), "features"
    ),
    "encoder cosine": (
        lambda p: L.DistillationEncoderLoss(mask=True, loss_de_cosine=True)(
            p.features, p.features_old, p.labels, OLD
        ),
        "features",
    ),
    "attraction": (contrastive(0), "features"),
    "attraction l2": (contrastive(0, lfc_L2normalized=True), "features"),
    "repulsion": (contrastive(1), "features"),
    "repulsion on prototypes": (contrastive(1, lfc_sep_clust_ison_proto=True), "features"),
    "orthogonality": (contrastive(1, lfc_orth_sep=True), "features"),
    "orthogonality max": (contrastive(1, lfc_orth_sep=True, lfc_orth_maxonly=True), "features"),
    "matching": (
        lambda p: L.DistillationEncoderPrototypesLoss()(p.features, p.labels, p.teacher, p.prototypes, OLD),
        "features",
    ),
    "matching sumafter": (
        lambda p: L.DistillationEncoderPrototypesLoss(sumafter=True)(
            p.features, p.labels, p.teacher, p.prototypes, OLD
        ),
        "features",
    ),
    **{f"sparsity {n}": (sparsity(n), "features") for n in L.NORMALIZATIONS},
    "sparsity entropy": (sparsity("softmax", "entropy"), "features"),
    "pod": (lambda p: L.LocalPODLoss()([p.features_old], [p.features], 5, 2, OLD), "features"),
    "pod logits": (lambda p: L.LocalPODLoss()([p.teacher], [p.logits], 5, 2, OLD), "logits"),
    "pckd": (lambda p: sum(L.PooledCubeDistillationLoss()(*pckd_maps(p), 5, 2, OLD)), "features"),
    **{
        name: (attention(name), "features" if name.endswith("CNN") else "attention")
        for name in L.DISTILL_OBJECTS
    },
    "mbce": (lambda p: L.MBCELoss(OLD, 2.0)(p.logits[:, OLD:], p.labels), "logits"),
    "sigmoid kd": (lambda p: L.SigmoidDistillationLoss()(p.logits, p.teacher), "logits"),
    "auxiliary": (lambda p: L.AuxiliaryLoss()(p.logits), "logits"),
    "negatives": (lambda p: L.negatives_loss(p.logits, p.labels == 0), "logits"),
    "dkd positive": (decomposed("positive"), "features"),
    "dkd negative": (decomposed("negative"), "features"),
    "ocfm": (
        lambda p: L.OldClassFeaturesMaintainingLoss()(
            p.features, p.features_old, p.labels, L.old_prediction(p.teacher)
        ),
        "features",
    ),
    "sad": (
        lambda p: L.SimilarityAwareDiscriminativeLoss(OLD, CLASSES - OLD)(
            p.features, p.labels, F.normalize(p.prototypes[1:OLD], dim=1)
        ),
        "features",
    ),
}  # fmt: skip
SUMS = {
    "snnl": (lambda p: L.SNNL(temperature=3.0)(p.features, p.labels), "features"),
    "lasso": (sparsity("L1", "lasso"), "features"),
}
ALL = {**MEANS, **SUMS}
# Losses without labels, or in which void takes part by design (see their docstrings).
VOID_COUNTS = (
    {"icarl", "kd", "unkd", "cil", "encoder", "pod", "pod logits", "pckd", "lasso"}
    | {name for name in ALL if name.startswith(("sparsity", "sats-selfattn-"))}
    | {"mbce", "sigmoid kd", "auxiliary", "dkd positive", "dkd negative"}
)
RELABELLED = {"bce", "focal", "attraction", "attraction l2", "repulsion", "repulsion on prototypes",
              "orthogonality", "orthogonality max", "snnl"}  # fmt: skip


def differentiate(name, problem):
    loss, trained = ALL[name]
    leaf = getattr(problem, trained).clone().requires_grad_()
    setattr(problem, trained, leaf)
    value = loss(problem)
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-5 * max(expected.abs().max().item(), 1.0))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8)
@given(seed=seeds, batch=batches)
def test_order_of_images_does_not_matter(name, seed, batch):
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    value, gradient = differentiate(name, Problem(seed, batch))
    permuted_value, permuted_gradient = differentiate(name, Problem(seed, batch).pick(order))
    close(permuted_value, value)
    close(permuted_gradient, gradient[order])


@pytest.mark.parametrize("name", MEANS)
@settings(max_examples=8)
@given(seed=seeds, batch=batches)
def test_twice_the_images_is_the_same_mean(name, seed, batch):
    twice = torch.arange(batch).repeat(2)
    value, gradient = differentiate(name, Problem(seed, batch))
    doubled_value, doubled_gradient = differentiate(name, Problem(seed, batch).pick(twice))
    close(doubled_value, value)
    close(doubled_gradient[:batch] + doubled_gradient[batch:], gradient)


@pytest.mark.parametrize("name", sorted(ALL.keys() - VOID_COUNTS))
@settings(max_examples=8)
@given(seed=seeds, batch=batches)
def test_void_has_no_gradient_and_no_influence(name, seed, batch):
    problem = Problem(seed, batch, void=0.4)
    void = problem.labels == 255
    value, gradient = differentiate(name, problem)
    at_void = gradient.mean(1) if gradient.dim() == 4 and gradient.shape[-1] == SIDE else None
    if at_void is None:  # attention: queries
        at_void = gradient.sum((1, 3)).view_as(void)
    assert not at_void[void].any()
    other = Problem(seed, batch, void=0.4)
    for tensor in (other.logits, other.features, other.features_old):
        tensor[void[:, None].expand_as(tensor)] = 0.123
    for tensor in (other.attention, other.attention_old):
        tensor[void.flatten(1)[:, None, :, None].expand_as(tensor)] = 0.123
    close(differentiate(name, other)[0], value)


@pytest.mark.parametrize("name", sorted(RELABELLED))
@settings(max_examples=8)
@given(seed=seeds, batch=batches)
def test_names_of_classes_do_not_matter(name, seed, batch):
    """Class c becomes order[c] in labels, channels and prototypes alike."""
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    back = torch.argsort(order)
    value, gradient = differentiate(name, Problem(seed, batch))
    other = Problem(seed, batch)
    other.labels = torch.where(other.labels == 255, 255, order[other.labels.clamp(max=CLASSES - 1)])
    other.logits, other.prototypes = other.logits[:, back], other.prototypes[back]
    permuted_value, permuted_gradient = differentiate(name, other)
    close(permuted_value, value)
    close(permuted_gradient, gradient[:, back] if name in ("bce", "focal") else gradient)


@pytest.mark.parametrize(
    "name", ["ce", "kd", "unkd", "cil", "matching", "matching sumafter", "sats-selfattn"]
)
@settings(max_examples=8)
@given(seed=seeds, batch=batches)
def test_names_of_old_classes_do_not_matter(name, seed, batch):
    """Old classes other than the background change places."""
    order = torch.arange(CLASSES)
    order[1:OLD] = order[1:OLD].flip(0)
    value, _ = differentiate(name, Problem(seed, batch))
    other = Problem(seed, batch)
    other.labels = torch.where(other.labels == 255, 255, order[other.labels.clamp(max=CLASSES - 1)])
    other.logits, other.prototypes = other.logits[:, order], other.prototypes[order]
    other.teacher = other.teacher[:, order[:OLD]]
    close(differentiate(name, other)[0], value)


@settings(max_examples=25)
@given(seed=seeds, batch=batches)
def test_unbiased_is_plain_where_there_is_nothing_to_unbias(seed, batch):
    p = Problem(seed, batch, void=0.1)
    close(
        L.UnbiasedCrossEntropy(old_cl=1)(p.logits, p.labels),
        F.cross_entropy(p.logits, p.labels, ignore_index=255),
    )
    no_new = L.UnbiasedCrossEntropy(old_cl=CLASSES)
    assert no_new(p.logits, p.labels).abs() < 1e-5  # only background: nothing to classify
    student = p.logits[:, :OLD]
    close(
        L.UnbiasedKnowledgeDistillationLoss()(student, p.teacher),
        L.KnowledgeDistillationLoss()(student, p.teacher),
    )


@settings(max_examples=25)
@given(seed=seeds, parts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_prototypes_do_not_depend_on_the_batches(seed, parts):
    problem = Problem(seed, sum(parts))
    whole, split, ranks = (L.Prototypes(CLASSES, DEPTH) for _ in range(3))
    whole.update(problem.features, problem.labels)
    for features, labels in zip(problem.features.split(parts), problem.labels.split(parts), strict=True):
        split.update(features, labels)
    statistics = []
    for features, labels in zip(problem.features.split(parts), problem.labels.split(parts), strict=True):
        L.Prototypes(CLASSES, DEPTH).update(
            features, labels, reduce=lambda tensor: statistics.append(tensor) or tensor
        )
    ranks.update(problem.features[:1], problem.labels[:1], reduce=lambda tensor: sum(statistics))
    for table in (split, ranks):
        close(table.prototypes, whole.prototypes)
        assert torch.equal(table.count_features, whole.count_features)


def test_prototypes_grow():
    table, grown = L.Prototypes(CLASSES, DEPTH), L.Prototypes(CLASSES + 2, DEPTH)
    problem = Problem(0, 2)
    table.update(problem.features, problem.labels)
    grown.load_state_dict(table.state_dict())
    assert torch.equal(grown.prototypes[:CLASSES], table.prototypes)
    assert not grown.prototypes[CLASSES:].any() and not grown.count_features[CLASSES:].any()
    with pytest.raises(ValueError, match="do not fit"):
        table.load_state_dict(grown.state_dict())


EMPTY = {
    "all void": lambda p: p.labels.fill_(255),
    "no class but background": lambda p: p.labels.fill_(0),
    "zero features": lambda p: [
        t.zero_() for t in (p.features, p.features_old, p.attention, p.attention_old)
    ],
    "equal student and teacher": lambda p: (
        p.features_old.copy_(p.features),
        p.attention_old.copy_(p.attention),
    ),
}


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("emptied", EMPTY)
@pytest.mark.parametrize("name", ALL)
def test_empty_sets_are_finite(name, emptied):
    problem = Problem(0, 2)
    EMPTY[emptied](problem)
    value, gradient = differentiate(name, problem)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    if emptied == "all void" and name not in VOID_COUNTS:
        assert value == 0
        assert not gradient.any()


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("fidelity", L.FIDELITIES)
@pytest.mark.parametrize("label", [0, 3, 255])
def test_sdr_losses_of_one_class_are_finite(label, fidelity):
    p = Problem(1, 2)
    p.labels.fill_(label)
    leaf = p.features.clone().requires_grad_()
    for options in ({}, {"lfc_L2normalized": True}, {"lfc_nobgr": True}, {"lfc_orth_sep": True}):
        criterion = L.FeaturesClusteringSeparationLoss(**options, fidelity=fidelity)
        attraction, repulsion = criterion(leaf, p.labels, p.prototypes)
        (gradient,) = torch.autograd.grad(attraction + repulsion, leaf)
        assert torch.isfinite(attraction) and torch.isfinite(repulsion) and torch.isfinite(gradient).all()
    for sumafter in (False, True):
        matching = L.DistillationEncoderPrototypesLoss(sumafter, fidelity)
        loss = matching(leaf, p.labels, p.teacher, p.prototypes, OLD)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_is_zero(name):
    value, gradient = differentiate(name, Problem(0, 2).pick(torch.zeros(0, dtype=torch.long)))
    assert value == 0
    assert gradient.shape[0] == 0


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("name", ALL)
def test_channels_last(name):
    expected = differentiate(name, Problem(3, 2))
    problem = Problem(3, 2)
    for tensor in ("logits", "teacher", "features", "features_old"):
        setattr(problem, tensor, getattr(problem, tensor).to(memory_format=torch.channels_last))
    for actual, wanted in zip(differentiate(name, problem), expected, strict=True):
        close(actual.contiguous(), wanted)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_autocast_computes_in_float32(name, dtype):
    """Half inputs give exactly what the same numbers give in float32, inside autocast."""
    low = Problem(4, 2, dtype=dtype)
    high = Problem(4, 2, dtype=dtype)
    for tensor in Problem._PER_IMAGE[:-1]:
        setattr(high, tensor, getattr(high, tensor).float())
    with torch.autocast("cpu", dtype=dtype):
        value, gradient = differentiate(name, low)
    expected, expected_gradient = differentiate(name, high)
    assert value.dtype == torch.float32
    close(value, expected)
    torch.testing.assert_close(
        gradient.float(),
        expected_gradient,
        rtol=0.02,
        atol=0.02 * expected_gradient.abs().max().item() + 1e-6,
    )


@pytest.mark.parametrize(
    "name",
    ["ce", "kd", "unkd", "attraction", "repulsion", "sparsity max_maskedforclass", "pod"],
)
def test_blocks_do_not_change_the_result(name, monkeypatch):
    whole = differentiate(name, Problem(5, 3))
    monkeypatch.setattr(loss_kernels, "BLOCK", 20)  # less than one image, more than one pixel
    for actual, wanted in zip(differentiate(name, Problem(5, 3)), whole, strict=True):
        close(actual, wanted)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("name", ALL)
def test_gradients_by_finite_differences(name):
    """Along a random direction, in float32."""
    problem = Problem(6, 2)
    loss, trained = ALL[name]
    _, gradient = differentiate(name, problem)
    point = getattr(Problem(6, 2), trained)
    direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(1)) * 2e-3
    values = []
    for sign in (-1, 1):
        shifted = Problem(6, 2)
        setattr(shifted, trained, point + sign * direction)
        values.append(loss(shifted).item())
    slope = (gradient * direction).sum().item() * 2
    assert values[1] - values[0] == pytest.approx(slope, rel=0.03, abs=2e-5 * max(abs(values[0]), 1))


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("name", ALL)
def test_teacher_under_inference_mode(name):
    expected = differentiate(name, Problem(8, 2))
    with torch.inference_mode():
        teacher = Problem(8, 2)
    problem = Problem(8, 2)
    for tensor in ("teacher", "features_old", "attention_old"):
        setattr(problem, tensor, getattr(teacher, tensor))
        assert getattr(problem, tensor).is_inference()
    for actual, wanted in zip(differentiate(name, problem), expected, strict=True):
        close(actual, wanted)


def test_no_host_copies(monkeypatch):
    """A training step must not wait for the device: no ``.item()``, ``.cpu()`` and the like."""
    problem = Problem(7, 2)
    for method in ("item", "cpu", "tolist", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("a copy to the host"))
    for name in ALL:
        differentiate(name, problem.pick(torch.arange(2)))
    L.Prototypes(CLASSES, DEPTH).update(problem.features, problem.labels)
    L.entropy_pseudo_labels(problem.teacher, problem.labels, torch.rand(CLASSES), nb_current_classes=CLASSES)


def test_bad_arguments_are_named():
    for make, word in (
        (lambda: L.UnbiasedCrossEntropy(old_cl=0), "old_cl"),
        (lambda: L.UnbiasedCrossEntropy(old_cl=1, reduction="median"), "reduction"),
        (lambda: L.AttentionTransferLoss("v4"), "distill_object"),
        (lambda: L.AttentionTransferLoss(fidelity="book"), "fidelity"),
        (lambda: L.FeaturesSparsificationLoss("L7"), "lfs_normalization"),
        (lambda: L.LocalPODLoss(pod="none"), "pod"),
        (lambda: L.entropy(torch.ones(1, 1, 1, 1), fidelity="book"), "fidelity"),
        (lambda: L.MBCELoss(1, reduction="median"), "reduction"),
        (lambda: L.reasoning_scores(torch.ones(1, 1, 1, 1), torch.ones(1, 1), "none"), "sign"),
        (lambda: L.replay_schedule(*3 * [torch.ones(2)], 1, "other"), "setting"),
        (
            lambda: L.KnowledgeDistillationLoss()(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1)),
            "3 classes",
        ),
        (lambda: L.AttentionTransferLoss()([], [], torch.zeros(1, 2, 2)), "0 maps"),
        (
            lambda: L.AttentionTransferLoss()(
                [torch.zeros(1, 1, 7, 1)], [torch.zeros(1, 1, 7, 1)], torch.zeros(1, 4, 4)
            ),
            "7 query positions",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            make()
