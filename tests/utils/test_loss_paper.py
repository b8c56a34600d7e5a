"""The published formulas: small cases worked by hand, and slow formulations with loops, from the papers.

The slow formulations share nothing with ``utils/loss.py``: Python loops over images, pixels and classes, in
float64, differentiated by autograd. Values and gradients must agree.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from utils import loss as L
from utils import loss_kernels

LN2, LN3 = math.log(2), math.log(3)


def assert_matches(fast, slow, inputs):
    """Same value and gradients; fast in float32, slow in float64, on leaves ``inputs`` (float64)."""
    singles = [x.detach().float().requires_grad_() for x in inputs]
    value, reference = fast(*singles), slow(*inputs)
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-7)
    gradients = torch.autograd.grad(value, singles, allow_unused=True)
    expected = torch.autograd.grad(reference, inputs, allow_unused=True)
    for actual, wanted in zip(gradients, expected, strict=True):
        wanted = torch.zeros_like(inputs[0]) if wanted is None else wanted
        actual = torch.zeros_like(wanted) if actual is None else actual.double()
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item() + 1e-7)


def randn(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def rand_labels(*shape, classes, seed=0, void=0.15):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < void, 255)


def pixel(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


# --- worked by hand ------------------------------------------------------------------------------------


def test_unbiased_cross_entropy_by_hand():
    # softmax = (1/2, 1/4, 1/8, 1/8); old classes 0 and 1 together: 3/4.
    x = pixel(2 * LN2, LN2, 0.0, 0.0)
    criterion = L.UnbiasedCrossEntropy(old_cl=2, reduction="sum")
    for label, probability in ((0, 3 / 4), (1, 3 / 4), (2, 1 / 8), (3, 1 / 8)):
        assert criterion(x, torch.tensor([[[label]]])).item() == pytest.approx(
            -math.log(probability), rel=1e-6
        )


def test_unbiased_cross_entropy_keeps_far_logits():
    # P(old) = e^-200 has no float32; the loss and its gradient still have.
    x = pixel(-100.0, -100.0, 100.0).requires_grad_()
    loss = L.UnbiasedCrossEntropy(old_cl=2)(x, torch.tensor([[[0]]]))
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == pytest.approx(200 - LN2, rel=1e-6)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([-0.5, -0.5, 1.0]))


def test_distillation_by_hand():
    # Teacher (3/4, 1/4); student's old logits equal: log-softmax = −log 2 each; mean over two classes.
    loss = L.KnowledgeDistillationLoss()(pixel(0.0, 0.0, 7.0), pixel(LN3, 0.0))
    assert loss.item() == pytest.approx(LN2 / 2, rel=1e-6)


def test_unbiased_distillation_by_hand():
    # Student softmax (1/4, 1/2, 1/4): background with the new class 1/2, old class 1/2; teacher (3/4, 1/4).
    loss = L.UnbiasedKnowledgeDistillationLoss()(pixel(0.0, LN2, 0.0), pixel(LN3, 0.0))
    assert loss.item() == pytest.approx(LN2 / 2, rel=1e-6)


def test_alpha_sharpens_the_teacher():
    # softmax(2·log 3, 0) = (9/10, 1/10); student (1/4, 3/4).
    loss = L.KnowledgeDistillationLoss(alpha=2.0)(pixel(0.0, LN3), pixel(LN3, 0.0))
    assert loss.item() == pytest.approx((0.9 * math.log(4) + 0.1 * math.log(4 / 3)) / 2, rel=1e-6)


def test_cil_by_hand():
    # Teacher uniform over 2: entropy₂ 1, so w = 1 + gs. Student (1/4, 1/2, 1/4).
    x, teacher = pixel(0.0, LN2, 0.0), pixel(0.0, 0.0)
    expected = 3.0 * (math.log(4) + LN2) / 2
    for label, value in ((0, expected), (1, expected), (255, expected), (2, 0.0)):
        loss = L.CILDistillationLoss(gs=2.0)(x, teacher, torch.tensor([[[label]]]))
        assert loss.item() == pytest.approx(value, rel=1e-6)


def test_contrastive_by_hand():
    # Class 0: features (0,0), (2,0), prototype (1,0): MSE (1+0+1+0)/4. Class 1: (1,3), (1,5), prototype
    # (1,3): MSE (0+0+0+4)/4. Means (1,0) and (1,4): distance 4.
    features = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]], [[0.0, 0.0], [3.0, 5.0]]]])
    labels = torch.tensor([[[0, 0], [1, 1]]])
    prototypes = torch.tensor([[1.0, 0.0], [1.0, 3.0], [9.0, 9.0]])
    attraction, repulsion = L.FeaturesClusteringSeparationLoss()(features, labels, prototypes)
    assert attraction.item() == pytest.approx((0.5 + 1.0) / 2)
    assert repulsion.item() == pytest.approx(1 / 4)
    attraction, repulsion = L.FeaturesClusteringSeparationLoss(lfc_nobgr=True)(features, labels, prototypes)
    assert attraction.item() == pytest.approx(1.0)
    assert repulsion.item() == 0.0


def test_released_attraction_divides_in_the_loop():
    features = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]], [[0.0, 0.0], [3.0, 5.0]]]])
    labels = torch.tensor([[[0, 0], [1, 1]]])
    prototypes = torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    criterion = L.FeaturesClusteringSeparationLoss(fidelity="released")
    attraction, _ = criterion(features, labels, prototypes)
    assert attraction.item() == pytest.approx((0.5 / 2 + 1.0) / 2)


def test_released_background_is_the_lowest_class():
    features = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]], [[0.0, 0.0], [3.0, 5.0]]]])
    labels = torch.tensor([[[1, 1], [2, 2]]])
    prototypes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 3.0]])
    paper, _ = L.FeaturesClusteringSeparationLoss(lfc_nobgr=True)(features, labels, prototypes)
    released, _ = L.FeaturesClusteringSeparationLoss(lfc_nobgr=True, fidelity="released")(
        features, labels, prototypes
    )
    assert paper.item() == pytest.approx((0.5 + 1.0) / 2)
    assert released.item() == pytest.approx(1.0)


def test_matching_by_hand():
    # The teacher sees class 1 on both background pixels and on the pixel of class 2, which is not background.
    features = torch.tensor([[[[0.0, 2.0, 7.0]], [[0.0, 4.0, 7.0]]]])
    labels = torch.tensor([[[0, 0, 2]]])
    outputs_old = torch.tensor([[[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]]])
    prototypes = torch.tensor([[5.0, 5.0], [1.0, 1.0], [5.0, 5.0]])
    mean_first = L.DistillationEncoderPrototypesLoss(sumafter=True)
    assert mean_first(features, labels, outputs_old, prototypes, 2).item() == pytest.approx((0 + 1) / 2)
    each = L.DistillationEncoderPrototypesLoss(sumafter=False)
    assert each(features, labels, outputs_old, prototypes, 2).item() == pytest.approx((1 + 1 + 1 + 9) / 4)
    # Sequential protocol: the label itself is the old class.
    assert mean_first(features, labels, None, prototypes, 3).item() == pytest.approx(4.0)


def test_sparsity_by_hand():
    # Class 0 has maximum 4, class 1 maximum 1: normalised (1, 1/2) and (1, 1/2).
    features = torch.tensor([[[[4.0, 1.0]], [[2.0, 0.5]]]])
    labels = torch.tensor([[[0, 1]]])
    criterion = L.FeaturesSparsificationLoss("max_maskedforclass", "squared", "ratio")
    assert criterion(features, labels).item() == pytest.approx((1 + 1 / 4) / 1.5)
    criterion = L.FeaturesSparsificationLoss("max_maskedforclass", "exponential", "ratio")
    assert criterion(features, labels).item() == pytest.approx((math.e + math.exp(0.5)) / 1.5)


def test_prototypes_by_hand():
    table = L.Prototypes(3, 1)
    features = torch.tensor([1.0, 3.0, 10.0, 20.0]).view(2, 1, 1, 2)
    table.update(features, torch.tensor([[[1, 1]], [[0, 255]]]))
    table.update(features, torch.tensor([[[2, 1]], [[1, 0]]]), skip_background=True)
    assert table.prototypes.flatten().tolist() == pytest.approx([10.0, (1 + 3 + 3 + 10) / 4, 1.0])
    assert table.count_features.tolist() == [1, 4, 1]


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_snnl_of_many_channels_does_not_underflow(fidelity):
    """At ResNet's 2048 channels exp(-d²) is 0, and its quotient in SDR's program not a number."""
    torch.manual_seed(0)
    features = torch.randn(2, 2048, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    squares = torch.cdist(features[:, :, 0, 0], features[:, :, 1, 1]).square()
    assert (-squares).exp().max() == 0
    loss = L.SNNL(fidelity=fidelity)(features, labels)
    loss.backward()
    assert loss.isfinite() and loss > 0 and features.grad.isfinite().all()


def test_snnl_by_hand():
    # Points 0, 1 (class 0) and 3 (class 1): the lone point has no neighbour of its class.
    features = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 1, 3)
    loss = L.SNNL(temperature=2.0)(features, torch.tensor([[[0, 0, 1]]]))
    near, far0, far1 = math.exp(-1 / 2), math.exp(-9 / 2), math.exp(-4 / 2)
    expected = -(math.log(near / (near + far0)) + math.log(near / (near + far1))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_local_pod_by_hand():
    # 2×2 map, scale 1: row means and column means of squares; teacher zero. Squares ((1, 4), (9, 16)).
    new = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    criterion = L.LocalPODLoss(pod_factor=0.5, spp_scales=[1])
    loss = criterion([torch.zeros_like(new)], [new], 6, 2, 4)
    expected = math.sqrt(2.5**2 + 12.5**2 + 5**2 + 10**2) * 0.5 * math.sqrt(3)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_attention_transfer_by_hand():
    # One image, one head, 4 queries, 1 key; differences 1, 3, 5, 7. Class 1 on the first two, class 2 on 5.
    old, new = torch.zeros(1, 1, 4, 1), torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 4, 1)
    labels = torch.tensor([[[1, 1], [2, 255]]])
    assert L.AttentionTransferLoss()([old], [new], labels).item() == pytest.approx((2 + 5) / 2)
    assert L.AttentionTransferLoss("sats-selfattn-GP")([old], [new], labels).item() == pytest.approx(4)
    assert L.AttentionTransferLoss("sats-selfattn-NP")([old], [new], labels).item() == pytest.approx(4)


def test_entropy_by_hand():
    assert L.entropy(torch.full((1, 4, 1, 1), 0.25)).item() == pytest.approx(1.0)
    assert L.entropy(pixel(1.0, 0.0, 0.0)).item() == 0.0
    assert L.entropy(pixel(0.5, 0.5, 0.0, 0.0)).item() == pytest.approx(0.5)


def test_median_by_hand():
    histogram = torch.tensor([[0, 0, 0, 0], [4, 0, 0, 0], [1, 1, 2, 0], [0, 0, 0, 8]])
    # Half of class 2 is reached at the end of its second bin; class 0 has no pixel.
    medians = L.class_median_thresholds(histogram, 0.05)
    assert medians.tolist() == pytest.approx([0.05, 0.125, 0.5, 0.875])
    assert L.class_median_thresholds(histogram, 0.6, mode="probability").tolist() == pytest.approx(
        [0.0, 0.125, 0.5, 0.6]
    )


def test_median_is_the_samples_median():
    values = torch.rand(10_001, generator=torch.Generator().manual_seed(3)) ** 2
    histogram = torch.histc(values, bins=100, min=0, max=1)[None].long()
    assert L.class_median_thresholds(histogram, 0.0).item() == pytest.approx(values.median().item(), abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_released_median_is_the_loop(seed):
    """PLOP's loop as its description has it: the index joins the sum, the bin is read through a product."""
    generator = torch.Generator().manual_seed(seed)
    histogram = torch.randint(0, 10 ** (seed + 1), (6, 100), generator=generator)
    histogram[0] = 0
    expected = []
    for counts in histogram.tolist():
        half, running, border, index = sum(counts) / 2, 0.0, 0.0, 0
        if sum(counts) == 0:
            expected.append(1e-3)
            continue
        for step in range(100):
            border = step / 100
            index = int(border * 100)
            if running <= half <= running + counts[index]:
                break
            running += border * 100
        median = math.inf if counts[index] == 0 else border + (half - running) / counts[index] / 100
        expected.append(max(median, 1e-3))
    actual = L.class_median_thresholds(histogram, fidelity="released")
    assert actual.tolist() == pytest.approx(expected, rel=1e-5)


def test_infinite_thresholds_are_replaced():
    histogram = torch.zeros(1, 100, dtype=torch.long)
    histogram[0, 3:6] = 10**6
    assert L.class_median_thresholds(histogram, fidelity="released").item() == math.inf
    thresholds = L.class_median_thresholds(histogram, fidelity="released", infinite_threshold=0.005)
    assert thresholds.item() == pytest.approx(0.005)


def test_entropy_pseudo_labels_by_hand():
    # Four pixels: sure of 1, unsure, a new class, void.
    outputs_old = torch.tensor([[[[0.0, 0.0, 9.0, 9.0]], [[9.0, 0.1, 0.0, 0.0]]]])
    labels = torch.tensor([[[0, 0, 2, 255]]])
    thresholds = torch.tensor([0.5, 0.5, 0.5])
    result, factor = L.entropy_pseudo_labels(outputs_old, labels, thresholds, nb_current_classes=3)
    assert result.flatten().tolist() == [1, 255, 2, 255]
    assert factor.tolist() == [0.5]
    _, factor = L.entropy_pseudo_labels(outputs_old, labels, thresholds, nb_current_classes=3, min_factor=0.8)
    assert factor.tolist() == pytest.approx([0.8])


def test_other_pseudo_labels_by_hand():
    outputs_old = torch.tensor([[[[0.0, 0.1, 9.0, 9.0]], [[9.0, 0.0, 0.0, 0.0]]]])
    labels = torch.tensor([[[0, 1, 2, 255]]])
    assert L.probability_pseudo_labels(outputs_old, labels).flatten().tolist() == [1, 0, 2, 255]
    assert L.probability_pseudo_labels(outputs_old, labels, 0.8).flatten().tolist() == [1, 255, 2, 255]
    per_class = torch.tensor([0.5, 1.1])
    assert L.probability_pseudo_labels(outputs_old, labels, per_class).flatten().tolist() == [255, 0, 2, 255]
    result, weights = L.confidence_pseudo_labels(outputs_old, labels)
    assert result.flatten().tolist() == [1, 0, 2, 255]
    assert weights.flatten().tolist() == pytest.approx([0.99988, 0.52498, 1, 1], abs=1e-4)


def test_sigmoid_pseudo_labels_by_hand():
    # Indices 0 background, 1 unknown, 2 and 3 old classes; 4 is new.
    outputs_old = torch.full((1, 4, 1, 4), -9.0)
    outputs_old[0, 2, 0, 0] = 2.0  # sigmoid 0.88 on background
    outputs_old[0, 3, 0, 1] = 0.5  # 0.62: not sure enough
    outputs_old[0, 1, 0, 2] = 9.0  # unknown is no class
    outputs_old[0, 2, 0, 3] = 9.0  # labelled already
    labels = torch.tensor([[[0, 1, 0, 4]]])
    assert L.sigmoid_pseudo_labels(outputs_old, labels, reserved=2).flatten().tolist() == [2, 1, 0, 4]
    # Channel 2 is the teacher's unknown class: it is not handed on.
    assert L.sigmoid_pseudo_labels(outputs_old, labels, reserved=1, end=2).flatten().tolist() == [0, 1, 1, 4]


@pytest.mark.parametrize("pod", ["local", "spatial", "global"])
@pytest.mark.parametrize("size", [(16, 16), (9, 9)])
def test_pod_is_the_same_in_any_memory_layout(pod, size):
    criterion = L.LocalPODLoss(pod=pod, spp_scales=(1, 2, 4))
    found = []
    maps = [torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for layout in (torch.contiguous_format, torch.channels_last):
        old, new = (m.clone(memory_format=layout) for m in maps)
        new.requires_grad_()
        loss = criterion([old], [new], nb_current_classes=4, nb_new_classes=2, index_new_class=2)
        found.append((loss.detach(), *torch.autograd.grad(loss, new)))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


# --- slow formulations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "classes"), [(1, 5), (3, 5), (5, 5)])
def test_unbiased_cross_entropy(old, classes):
    labels = rand_labels(2, 3, 4, classes=classes)

    def slow(x):
        terms = []
        for b, i, j in (labels != 255).nonzero().tolist():
            p = x[b, :, i, j].softmax(0)
            terms.append(-(p[:old].sum() if labels[b, i, j] < old else p[labels[b, i, j]]).log())
        return torch.stack(terms).mean()

    assert_matches(lambda x: L.UnbiasedCrossEntropy(old_cl=old)(x, labels), slow, [randn(2, classes, 3, 4)])


@pytest.mark.parametrize(("old", "classes"), [(1, 4), (3, 5), (4, 4)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_distillation(old, classes, unbiased):
    teacher = randn(2, old, 3, 4, seed=1).detach()
    mask = rand_labels(2, 3, 4, classes=2, void=0.0).bool()

    def slow(x):
        total = x.new_zeros(())
        for b, i, j in mask.nonzero().tolist():
            p = teacher[b, :, i, j].mul(1.5).softmax(0)
            q = x[b, :, i, j].softmax(0) if unbiased else x[b, :old, i, j].softmax(0)
            for c in range(old):
                mass = q[c] + q[old:].sum() if unbiased and c == 0 else q[c]
                total = total - p[c] * mass.log() / old
        return total / mask.numel()

    cls = L.UnbiasedKnowledgeDistillationLoss if unbiased else L.KnowledgeDistillationLoss
    fast = cls(alpha=1.5)
    assert_matches(lambda x: fast(x, teacher, mask=mask), slow, [randn(2, classes, 3, 4)])


@pytest.mark.parametrize("gs", [0.0, 0.7])
def test_cil(gs):
    teacher, targets = randn(2, 3, 3, 4, seed=1).detach(), rand_labels(2, 3, 4, classes=5)

    def slow(x):
        total, number = x.new_zeros(()), 0
        for b, i, j in ((targets < 3) | (targets == 255)).nonzero().tolist():
            p, q = teacher[b, :, i, j].softmax(0), x[b, :, i, j].softmax(0)
            weight = 1 + gs * -(p * p.log2()).sum()
            total = total - weight * (p * q[:3].log()).sum()
            number += 1
        return total / number

    assert_matches(lambda x: L.CILDistillationLoss(gs=gs)(x, teacher, targets), slow, [randn(2, 5, 3, 4)])


def class_vectors(features, labels, c):
    """n×D: the feature vectors of class c, gathered one by one."""
    return torch.stack([features[b, :, i, j] for b, i, j in (labels == c).nonzero().tolist()])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lfc_L2normalized": True},
        {"lfc_nobgr": True},
        {"lfc_sep_clust_ison_proto": True},
        {"lfc_orth_sep": True},
        {"lfc_orth_sep": True, "lfc_orth_maxonly": True},
        {"lfc_L2normalized": True, "lfc_sep_clust_ison_proto": True},
    ],
)
def test_contrastive(options, batch):
    labels = rand_labels(batch, 4, 5, classes=5)
    table = randn(6, 7, seed=2, scale=1.0).detach()
    present = [c for c in range(1 if options.get("lfc_nobgr") else 0, 6) if (labels == c).any()]

    def slow(features, pick):
        prototypes = table
        if options.get("lfc_L2normalized"):
            features, prototypes = F.normalize(features, dim=1), F.normalize(table, dim=1)
        vectors = {c: class_vectors(features, labels, c) for c in present}
        if pick == 0:
            return sum(F.mse_loss(v, prototypes[c].expand_as(v)) for c, v in vectors.items()) / len(present)
        means = {c: v.mean(0) for c, v in vectors.items()}
        if options.get("lfc_orth_sep"):
            products = torch.stack([prototypes[k] @ means[c] for c in present for k in range(6) if k != c])
            return products.max().clamp(min=0) if options.get("lfc_orth_maxonly") else products.mean()
        if options.get("lfc_sep_clust_ison_proto"):
            pairs = [(means[a], prototypes[b]) for a in present for b in present]
        else:
            pairs = [(means[a], means[b]) for a in present for b in present if a != b]
        return torch.stack([1 / (a - b).norm() for a, b in pairs]).mean()

    criterion = L.FeaturesClusteringSeparationLoss(**options)
    for pick in (0, 1):
        assert_matches(
            lambda f, pick=pick: criterion(f, labels, table.float())[pick],
            lambda f, pick=pick: slow(f, pick),
            [randn(batch, 7, 4, 5)],
        )


@pytest.mark.parametrize("sumafter", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_matching(sumafter, sequential):
    labels = rand_labels(2, 4, 5, classes=2 if not sequential else 5)
    teacher, table = randn(2, 4, 4, 5, seed=3).detach(), randn(6, 7, seed=2).detach()
    pseudo = torch.where(labels < 4, labels, 0) if sequential else teacher.argmax(1) * (labels == 0)
    present = [c for c in range(1, 4) if (pseudo == c).any()]

    def slow(features):
        total = features.new_zeros(())
        for c in present:
            vectors = class_vectors(features, pseudo, c)
            if sumafter:
                total = total + F.mse_loss(vectors.mean(0), table[c]) / len(present)
            else:
                total = total + torch.stack([F.mse_loss(v, table[c]) for v in vectors]).mean()
        return total

    criterion = L.DistillationEncoderPrototypesLoss(sumafter=sumafter)
    outputs_old = None if sequential else teacher
    assert_matches(lambda f: criterion(f, labels, outputs_old, table.float(), 4), slow, [randn(2, 7, 4, 5)])


@pytest.mark.parametrize("shrinking", ["squared", "power3", "exponential"])
@pytest.mark.parametrize("normalization", ["max_foreachfeature", "max_maskedforclass", "max_overall"])
def test_sparsity(normalization, shrinking):
    labels = rand_labels(2, 4, 5, classes=3)
    shrink = {"squared": lambda v: v**2, "power3": lambda v: v**3, "exponential": torch.exp}[shrinking]

    def slow(raw):
        features = raw.abs()  # positive, as after a ReLU, without ties at zero
        terms = []
        for b, i, j in torch.ones_like(labels).nonzero().tolist():
            if normalization == "max_overall":
                highest = features.max()
            elif normalization == "max_foreachfeature":
                highest = features[b, :, i, j].max()
            else:
                highest = class_vectors(features, labels, labels[b, i, j]).max()
            g = features[b, :, i, j] / highest
            terms.append(shrink(g).sum() / g.sum())
        return torch.stack(terms).mean()

    criterion = L.FeaturesSparsificationLoss(normalization, shrinking, "ratio")
    assert_matches(lambda f: criterion(f.abs(), labels), slow, [randn(2, 7, 4, 5)])


def test_sparsity_shares_the_gradient_of_a_tied_maximum():
    features = torch.tensor([[[[2.0, 2.0]], [[1.0, 1.0]]]], requires_grad=True)
    loss = L.FeaturesSparsificationLoss("max_maskedforclass", "squared", "ratio")(
        features, torch.zeros(1, 1, 2, dtype=torch.long)
    )
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient[..., 0], gradient[..., 1])


@pytest.mark.parametrize("chunk", [3, 512])
def test_snnl(chunk):
    labels = rand_labels(2, 3, 4, classes=3)

    def slow(features):
        points = [(features[b, :, i, j], labels[b, i, j]) for b, i, j in (labels != 255).nonzero().tolist()]
        terms = []
        for a, (x, y) in enumerate(points):
            near = [
                ((x - z).square().sum() / -5.0).exp() for b, (z, k) in enumerate(points) if b != a and k == y
            ]
            every = [((x - z).square().sum() / -5.0).exp() for b, (z, _) in enumerate(points) if b != a]
            if near:
                terms.append(-(sum(near) / sum(every)).log())
        return torch.stack(terms).mean()

    criterion = L.SNNL(temperature=5.0, chunk=chunk)
    assert_matches(lambda f: criterion(f, labels), slow, [randn(2, 7, 3, 4, scale=1.0)])


def local_pod_numbers(image, divisors):
    """Row and column means of the cells of a C×h×h map, over the grid's divisor; grids as {s: divisor}."""
    parts = []
    for s, divisor in divisors.items():
        k = image.shape[-1] // s
        for i in range(s):
            for j in range(s):
                cell = image[:, i * k : (i + 1) * k, j * k : (j + 1) * k]
                parts += [cell.mean(2).flatten() / divisor, cell.mean(1).flatten() / divisor]
    return torch.cat(parts)


POD_DIVISORS = {False: {1: 1, 2: 1, 4: 1}, True: {1: 1, 2: 4, 4: 16}, "spm": {1: 4, 2: 4, 4: 2}}
POD_PREPROS = {"pow": torch.square, "none": lambda v: v, "abs": torch.abs, "relu": torch.relu}


def pod_options(per_scale, difference, **last):
    return {
        "switch": {"normalize_per_scale": per_scale, "after": last},
        "difference_function": difference,
    }


@pytest.mark.parametrize("prepro", ["pow", "none", "abs", "relu"])
@pytest.mark.parametrize("kind", ["local", "spatial", "global"])
@pytest.mark.parametrize("side", [8, 6])
def test_pod(kind, prepro, side):
    scales = (1, 2, 4) if kind == "local" else (1, 2)
    old = randn(2, 3, side, side, seed=4).detach()

    def pooled(image):
        numbers = []
        for channel in POD_PREPROS[prepro](image):
            if kind == "spatial":
                numbers += [*channel.sum(0), *channel.sum(1)]
                continue
            for s in scales:
                k = side // s
                cells = [
                    [channel[i * k : (i + 1) * k, j * k : (j + 1) * k] for j in range(s)] for i in range(s)
                ]
                if kind == "local":
                    numbers += [n for line in cells for cell in line for n in (*cell.mean(0), *cell.mean(1))]
                else:
                    means = torch.stack([torch.stack([cell.mean() for cell in line]) for line in cells])
                    numbers += [*means.sum(0), *means.sum(1)]
        return torch.stack(numbers)

    def slow(new):
        return torch.stack([(pooled(n) - pooled(o)).norm() for n, o in zip(new, old, strict=True)]).mean()

    criterion = L.LocalPODLoss(spp_scales=scales, pod=kind, pod_prepro=prepro, use_pod_schedule=False)
    assert_matches(lambda f: criterion([old.float()], [f], 6, 2, 4), slow, [randn(2, 3, side, side)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_scale", POD_DIVISORS)
@pytest.mark.parametrize("difference", ["frobenius", "l1"])
@pytest.mark.parametrize("prepro", POD_PREPROS)
@pytest.mark.parametrize("block", [2**20, 3 * 64])
def test_local_pod_gradient(monkeypatch, prepro, difference, per_scale, layout, block):
    """The gradient by hand, in one block of channels and in several, the last of them smaller."""
    monkeypatch.setattr(loss_kernels, "BLOCK", block)
    old, new = (randn(2, 4, 8, 8, seed=s).detach().contiguous(memory_format=layout) for s in (5, 6))

    def slow(new):
        pooled = [
            [local_pod_numbers(POD_PREPROS[prepro](image), POD_DIVISORS[per_scale]) for image in maps]
            for maps in (new, old)
        ]
        return torch.stack(
            [(n - o).norm(p=1 if difference == "l1" else 2) for n, o in zip(*pooled, strict=True)]
        ).mean()

    criterion = L.LocalPODLoss(
        pod_options=pod_options(per_scale, difference), pod_prepro=prepro, use_pod_schedule=False
    )
    assert_matches(lambda f: criterion([old.float()], [f], 6, 2, 4), slow, [new.requires_grad_()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("per_scale", POD_DIVISORS)
@pytest.mark.parametrize("size", [(12, 14), (14, 12), (9, 10), (10, 9), (13, 13), (4, 15), (15, 4)])
def test_local_pod_of_any_size(size, per_scale, norm, layout):
    """Square cells by the width; the released loop slices, so lower ones are cut off. Empty: left out."""
    old, new = (randn(2, 3, *size, seed=s).detach().contiguous(memory_format=layout) for s in (5, 6))

    def numbers(image):
        parts = []
        for s, divisor in POD_DIVISORS[per_scale].items():
            k = size[1] // s
            for i in range(s):
                for j in range(s):
                    cell = image.square()[:, i * k : (i + 1) * k, j * k : (j + 1) * k]
                    if cell.shape[1]:
                        parts += [cell.mean(2).flatten() / divisor, cell.mean(1).flatten() / divisor]
        joined = torch.cat(parts)
        return joined / joined.norm() if norm else joined

    def slow(new):
        return torch.stack([(numbers(n) - numbers(o)).norm() for n, o in zip(new, old, strict=True)]).mean()

    criterion = L.LocalPODLoss(
        pod_options=pod_options(per_scale, "frobenius", norm=norm), use_pod_schedule=False
    )
    assert_matches(lambda f: criterion([old.float()], [f], 6, 2, 4), slow, [new.requires_grad_()])


def test_local_pod_grid_finer_than_the_map():
    maps = torch.zeros(1, 2, 9, 3)
    with pytest.raises(ValueError, match="4×4 grid does not fit maps of width 3"):
        L.LocalPODLoss()([maps], [maps], 2, 1, 1)


@pytest.mark.parametrize("difference", ["frobenius", "l1"])
@pytest.mark.parametrize("prepro", POD_PREPROS)
@pytest.mark.parametrize("scales", [(1, 2, 4), (2,), (4, 1, 1), (1, 3)])  # the last: grids that do not nest
def test_local_pod_gradcheck(monkeypatch, prepro, difference, scales):
    """Numerical derivatives in float64; maps in two other memory layouts have the same gradients."""
    monkeypatch.setattr(loss_kernels, "BLOCK", 16)
    criterion = L.LocalPODLoss(
        spp_scales=scales, pod_prepro=prepro, pod_options=pod_options("spm", difference)
    )
    old = randn(2, 2, 4, 4, seed=7).detach()
    plain = randn(2, 2, 4, 4, seed=8)

    def distance(new):
        return L._pod_distance(old, new, criterion.last)

    assert torch.autograd.gradcheck(distance, plain)
    (expected,) = torch.autograd.grad(distance(plain).sum(), plain)
    channels_last = plain.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    part = torch.cat([plain[:, :1], plain], dim=1).detach()[:, 1:].requires_grad_()
    for other in (channels_last, part):
        (found,) = torch.autograd.grad(distance(other).sum(), other)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("difference", ["frobenius", "l1"])
@pytest.mark.parametrize("prepro", POD_PREPROS)
def test_local_pod_of_equal_maps_is_zero(prepro, difference):
    """An image on which the student is the teacher has distance 0 and gradient 0; the others keep theirs."""
    old, new = (randn(2, 3, 8, 8, seed=s).detach().float() for s in (0, 1))
    criterion = L.LocalPODLoss(
        pod_options=pod_options(False, difference), pod_prepro=prepro, use_pod_schedule=False
    )

    def differentiate(old, new):
        leaf = new.clone().requires_grad_()
        value = criterion([old], [leaf], 6, 2, 4)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    value, gradient = differentiate(old, torch.stack([old[0], new[1]]))
    alone, gradient_alone = differentiate(old[1:], new[1:])
    assert not gradient[0].any()
    torch.testing.assert_close(value, alone / 2)
    torch.testing.assert_close(gradient[1:], gradient_alone / 2)


def test_pod_options():
    old = [randn(2, 3, 4, 4, seed=1).detach().float(), randn(2, 2, 4, 4, seed=2).detach().float()]
    new = [randn(2, 3, 4, 4, seed=3).detach().float(), randn(2, 4, 4, 4, seed=4).detach().float()]

    def value(first, last, options=None, **keywords):
        keywords = {"pod_factor": 1.0, "use_pod_schedule": False, **keywords}
        return L.LocalPODLoss(pod_options=options, **keywords)(old[first:last], new[first:last], 9, 1, 2)

    folded = torch.cat([new[1][:, :1] + new[1][:, 2:].sum(1, keepdim=True), new[1][:, 1:2]], 1)
    alone = L.LocalPODLoss(use_pod_schedule=False)([old[1]], [folded], 9, 1, 2)
    torch.testing.assert_close(value(1, 2), alone)
    trimmed = L.LocalPODLoss(use_pod_schedule=False)([old[1]], [new[1][:, :2]], 9, 1, 2)
    torch.testing.assert_close(value(1, 2, {"switch": {"after": {"extra_channels": "trim"}}}), trimmed)
    # A factor of "after" is the last map's; one of "before" holds for the last too, unless "after" has one.
    first = L.LocalPODLoss(use_pod_schedule=False)(old[:1], new[:1], 9, 1, 2)
    torch.testing.assert_close(value(0, 2, {"switch": {"after": {"factor": 0.5}}}), (first + alone / 2) / 2)
    torch.testing.assert_close(value(0, 2, {"switch": {"before": {"factor": 3.0}}}), (first + alone) * 3 / 2)
    after = {"switch": {"after": {"use_pod_schedule": True}}}
    torch.testing.assert_close(value(0, 2, after), (first + 3 * alone) / 2)
    torch.testing.assert_close(value(0, 2, pod_apply="backbone", backbone_maps=1), first)
    torch.testing.assert_close(value(0, 2, pod_apply="deeplab", backbone_maps=1), alone)
    normalised = value(0, 1, {"switch": {"after": {"norm": True}}})
    assert 0 < normalised < 2  # unit vectors are at most 2 apart
    with pytest.raises(ValueError, match="mix_new_old"):
        L.LocalPODLoss(pod_options={"switch": {"after": {"mix_new_old": 0.5}}})
    with pytest.raises(ValueError, match="map 0"):
        L.LocalPODLoss()([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 2, 2)], 2, 1, 1)


@pytest.mark.parametrize("distill_object", ["sats-selfattn", "sats-selfattn-GP", "sats-selfattn-NP"])
@pytest.mark.parametrize("size", [(16, 16), (8, 16)])
def test_attention_transfer(distill_object, size):
    labels = rand_labels(2, *size, classes=4)
    grids = [(size[0] // 2, size[1] // 2, 1), (size[0] // 4, size[1] // 4, 3)]
    old = [randn(2, heads, h * w, 4, seed=h).detach() for h, w, heads in grids]
    new = [randn(2, heads, h * w, 4, seed=h + 1) for h, w, heads in grids]

    def image(a, b, small):
        """Loss of one image at one stage: a, b heads×L×S, small h×w."""
        if distill_object.endswith("GP"):
            return torch.stack([(x.mean(0) - y.mean(0)).norm() for x, y in zip(a, b, strict=True)]).mean()
        if distill_object.endswith("NP"):
            return torch.stack(
                [
                    torch.stack([(p - q).norm() for p, q in zip(x, y, strict=True)]).mean()
                    for x, y in zip(a, b, strict=True)
                ]
            ).mean()
        terms = []
        for c in range(1, 4):
            queries = (small.flatten() == c).nonzero().flatten().tolist()
            if queries:
                gaps = [
                    torch.stack([x[q] - y[q] for q in queries]).mean(0).norm()
                    for x, y in zip(a, b, strict=True)
                ]
                terms.append(sum(gaps) / len(gaps))
        return sum(terms) / len(terms) if terms else a.sum() * 0

    def slow(*maps):
        stages = []
        for (h, _, _), a, b in zip(grids, maps, old, strict=True):
            step = size[0] // h
            small = labels[:, step // 2 :: step, step // 2 :: step]
            stages.append(sum(image(a[i], b[i], small[i]) for i in range(2)) / 2)
        return sum(stages) / len(stages)

    for num_classes in (None, 4):
        criterion = L.AttentionTransferLoss(distill_object, num_classes=num_classes)
        assert_matches(lambda *maps: criterion([o.float() for o in old], list(maps), labels), slow, new)  # noqa: B023


def test_feature_transfer():
    labels = rand_labels(2, 8, 8, classes=4)
    old, new = randn(2, 5, 4, 4, seed=1).detach(), randn(2, 5, 4, 4)
    small = labels[:, 1::2, 1::2]

    def slow(maps):
        total = maps.new_zeros(())
        for i in range(2):
            gaps = [
                (
                    class_vectors(maps[i : i + 1], small[i : i + 1], c).mean(0)
                    - class_vectors(old[i : i + 1], small[i : i + 1], c).mean(0)
                ).norm()
                for c in range(1, 4)
                if (small[i] == c).any()
            ]
            total = total + sum(gaps) / len(gaps)
        return total / 2

    criterion = L.AttentionTransferLoss("sats-feature-CNN")
    assert_matches(lambda maps: criterion([old.float()], [maps], labels), slow, [new])


# --- the released readings, where no golden file reaches -----------------------------------------------


@pytest.mark.parametrize("skip_background", [False, True])
def test_released_prototypes_of_several_images(skip_background):
    features, labels = randn(3, 7, 4, 5).detach().float(), rand_labels(3, 4, 5, classes=5)
    labels[labels == 0] = 1  # the lowest class present is not the background
    table = L.Prototypes(6, 7, fidelity="released")
    table.update(features, labels, skip_background=skip_background)
    for c in range(6):
        mask = labels == c
        taken = mask.any() and not (skip_background and c == 1)
        expected = torch.zeros(7)
        if taken:
            expected = features[mask[:, None].expand_as(features)].view(7, -1).mean(-1)
        torch.testing.assert_close(table.prototypes[c], expected, rtol=1e-5, atol=1e-6)
        assert table.count_features[c] == (mask.sum() if taken else 0)


def test_released_cil_has_no_logarithm():
    x, teacher = randn(2, 5, 3, 4).detach().float(), randn(2, 3, 3, 4, seed=1).detach().float()
    targets = rand_labels(2, 3, 4, classes=5)
    loss = L.CILDistillationLoss(gs=0.0, fidelity="released")(x, teacher, targets)
    p = torch.cat([teacher, torch.zeros(2, 2, 3, 4)], 1).softmax(1)
    kept = (targets == 0) | (targets == 255)
    expected = ((p * x.softmax(1)).sum(1) * kept).sum() / kept.sum()
    torch.testing.assert_close(loss, expected)


def test_released_sparsity_of_background_alone_is_zero():
    features, labels = randn(2, 5, 3, 4).detach().float().abs(), torch.zeros(2, 3, 4, dtype=torch.long)
    arguments = ("max_maskedforclass", "exponential", "ratio")
    assert L.FeaturesSparsificationLoss(*arguments, fidelity="released")(features, labels) == 0
    assert L.FeaturesSparsificationLoss(*arguments)(features, labels) > 0


def test_released_feature_transfer_divides_by_four():
    maps = [randn(2, 5, 4, 4, seed=s).detach().float() for s in range(10)]
    labels = rand_labels(2, 8, 8, classes=4)
    paper = L.AttentionTransferLoss("sats-feature-CNN")(maps[:5], maps[5:], labels)
    released = L.AttentionTransferLoss("sats-feature-CNN", fidelity="released")(maps[:5], maps[5:], labels)
    torch.testing.assert_close(released, paper * 5 / 4)


@pytest.mark.parametrize(("size", "target"), [((513, 513), (33, 33)), ((48, 64), (6, 8)), ((7, 5), (3, 4))])
def test_labels_shrink_by_torch_s_rule(size, target):
    labels = torch.randint(0, 256, (2, *size), generator=torch.Generator().manual_seed(0))
    for mode in ("nearest", "nearest-exact"):
        expected = F.interpolate(labels[:, None].double(), size=target, mode=mode)[:, 0].long()
        assert torch.equal(L.downsample_labels(labels.to(torch.int32), target, mode), expected)


@pytest.mark.parametrize("per_scale", [True, "spm"])
@pytest.mark.parametrize("difference", ["frobenius", "l1"])
@pytest.mark.parametrize("norm", [False, True])
def test_pod_options_of_the_released_code(per_scale, difference, norm):
    """Weights per scale, L1 and unit vectors, as the released code reads ``pod_options``."""
    old, new = (randn(2, 3, 8, 8, seed=s).detach().float() for s in (0, 1))

    def pooled(image):
        joined = local_pod_numbers(image.square(), POD_DIVISORS[per_scale])
        return joined / joined.norm() if norm else joined

    gaps = [pooled(n) - pooled(o) for n, o in zip(new, old, strict=True)]
    expected = sum(gap.norm(p=1 if difference == "l1" else 2) for gap in gaps) / 2
    options = pod_options(per_scale, difference, norm=norm)
    criterion = L.LocalPODLoss(pod_options=options, use_pod_schedule=False)
    torch.testing.assert_close(criterion([old], [new], 6, 2, 4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distill_object", ["sats-selfattn-GP", "sats-selfattn-NP"])
def test_released_attention_mixes_heads_and_positions(distill_object):
    old, new = (randn(2, 3, 16, 5, seed=s).detach().float() for s in (0, 1))
    # The released reshape: B×√L×√L×heads×S straight from B×heads×L×S.
    a, b = new.reshape(2, 4, 4, 3, 5), old.reshape(2, 4, 4, 3, 5)
    if distill_object.endswith("GP"):
        expected = (a.mean((1, 2)) - b.mean((1, 2))).norm(dim=-1).mean()
    else:
        expected = (a - b).norm(dim=-1).mean()
    criterion = L.AttentionTransferLoss(distill_object, fidelity="released")
    labels = rand_labels(2, 8, 8, classes=4)
    torch.testing.assert_close(criterion([old] * 4, [new] * 4, labels), expected, rtol=1e-5, atol=1e-6)
