"""STAR: every golden file of the released program, values and gradients, and the paper's form."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load
from torch.nn import functional as F

from utils import loss as L

STATISTICS = ("prototypes", "norm_mean_and_std", "noise")


def previous_of(z):
    return dict(zip(STATISTICS, (z["prev_prototypes"], z["prev_norm"], z["prev_noise"]), strict=True))


@pytest.mark.parametrize("name", cases("star_statistics_step*"))
def test_statistics(name, device):
    z, meta = load(name, device)
    previous = previous_of(z) if meta["step"] else None
    statistics = L.FeatureStatistics(meta["old_classes"], meta["new_classes"], 16, previous)
    for features, labels in zip(z["features"], z["labels"], strict=True):
        statistics.update(features, labels)
    released, paper = statistics.compute(fidelity="released"), statistics.compute()
    for key in ("numbers", *STATISTICS):
        assert_close(released[key], z[key])
        assert_close(paper[key], z["noise_paper" if key == "noise" else key].float())


def test_a_class_without_a_position_has_zeros():
    statistics = L.FeatureStatistics(1, 2, 3)
    statistics.update(torch.ones(1, 3, 2, 2), torch.tensor([[[1, 0], [0, 255]]]))
    computed = statistics.compute()
    assert computed["numbers"].tolist() == [2, 1, 0]
    assert all(torch.isfinite(values).all() for values in computed.values())
    assert computed["norm_mean_and_std"][1].tolist() == [0, 0]  # a deviation of one feature is 0
    assert computed["prototypes"][1].tolist() == [0, 0, 0]
    fake = L.replay_features(*(computed[k] for k in ("prototypes", "noise", "norm_mean_and_std")), [1, 0])
    assert_close(fake, torch.ones(1, 3))


@pytest.mark.parametrize("name", cases("star_pkd*"))
def test_features_maintaining(name, device):
    z, _ = load(name, device)
    f = leaf(z["features"])
    loss = L.OldClassFeaturesMaintainingLoss()(f, z["features_old"], z["labels"], z["prediction_old"])
    assert_close(loss, z["loss"])
    assert_close(gradient(loss, f)[0], z["grad"])


def test_features_maintaining_without_a_pixel():
    f = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.ones(1, 8, 8, dtype=torch.long)
    loss = L.OldClassFeaturesMaintainingLoss()(f, torch.zeros_like(f), labels, labels)
    assert loss.item() == 0 and gradient(loss, f)[0].abs().sum() == 0


@pytest.mark.parametrize("name", cases("star_cont*"))
def test_discriminative(name, device):
    z, meta = load(name, device)
    f = leaf(z["features"])
    sizes = meta["old_classes"], meta["new_classes"]
    released = L.SimilarityAwareDiscriminativeLoss(*sizes, fidelity="released")
    loss = released(f, z["labels"], z["prototypes"])
    assert_close(loss, z["loss"])
    assert_close(gradient(loss, f)[0], z["grad"])
    paper = L.SimilarityAwareDiscriminativeLoss(*sizes)(f, z["labels"], z["prototypes"])
    assert_close(paper, z["loss_present_paper"])


def test_discriminative_leaves_out_classes_without_a_prototype():
    f, labels = torch.rand(1, 3, 2, 2), torch.full((1, 8, 8), 3)
    loss = L.SimilarityAwareDiscriminativeLoss(3, 1)
    prototypes = F.normalize(torch.tensor([[-1.0, 2, 0], [0, 0, 0]]), dim=1)
    assert_close(loss(f, labels, prototypes), loss(f, labels, prototypes[:1]))
    assert loss(f, labels, prototypes[1:]).item() == 0


@pytest.mark.parametrize("name", cases("star_schedule_*"))
def test_schedule(name, device):
    z, meta = load(name, device)
    schedule = L.replay_schedule(
        z["prev_numbers"],
        z["pred_numbers"],
        z["numbers"],
        meta["iterations"],
        setting=meta["setting"],
        new_classes=meta["new_classes"],
    )
    assert torch.equal(schedule["per_iteration"], z["per_iter_prev_number"])
    assert_close(schedule["extra_background_ratio"], z["extra_bg_ratio"])
    assert_close(schedule["numbers"], z["numbers_total"])


def test_schedule_without_predicted_background():
    numbers = torch.tensor([5.0, 3])
    schedule = L.replay_schedule(numbers, torch.tensor([0.0, 9]), numbers, 2, "overlap", 1)
    assert schedule["extra_background_ratio"].item() == 0
    assert schedule["per_iteration"].tolist() == [0]


@pytest.mark.parametrize("name", cases("star_scores*"))
def test_predictions(name, device):
    z, meta = load(name, device)
    evaluated = L.sigmoid_prediction(z["logits"], first=meta["first"], fidelity="released")
    assert torch.equal(evaluated, z["prediction"].long())
    assert torch.equal(L.old_prediction(z["logits"], fidelity="released"), z["prediction_training"].long())
    assert torch.equal(L.old_prediction(z["logits"]), L.sigmoid_prediction(z["logits"]))


@pytest.mark.parametrize("name", cases("star_memory_labels*"))
def test_classes_of_exemplars(name, device):
    z, meta = load(name, device)
    for fidelity, key in (("released", "pseudo_labels"), ("paper", "pseudo_labels_paper")):
        labels = L.exemplar_labels(z["labels"], z["logits"], 0, meta["threshold"], fidelity=fidelity)
        assert torch.equal(labels, z[key].long())


def classify(features, weights, biases):
    return F.conv2d(features, torch.cat(weights)[:, :, None, None], torch.cat(biases))


def to_labels(maps, labels):
    return F.interpolate(maps, size=labels.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("name", cases("star_total_*"))
def test_all_terms_of_an_epoch(name, device):
    z, meta = load(name, device)
    weights, old, iterations = meta["weights"], meta["old_classes"], meta["iterations"]
    steps = range(len(meta["widths"]))
    w, b = ([leaf(z[f"{kind}_{k}"]) for k in steps] for kind in ("weight", "bias"))
    old_w, old_b = ([z[f"{kind}_old_{k}"] for k in steps[:-1]] for kind in ("weight", "bias"))
    predictions = [
        L.old_prediction(to_labels(classify(f, old_w, old_b), y), fidelity="released")
        for f, y in zip(z["features_old"], z["labels"], strict=True)
    ]
    predicted = sum(L.predicted_numbers(p, y, old) for p, y in zip(predictions, z["labels"], strict=True))
    assert torch.equal(predicted, z["pred_numbers"])
    schedule = L.replay_schedule(
        z["prev_numbers"], predicted, z["numbers"], iterations, meta["setting"], meta["new_classes"]
    )
    assert torch.equal(schedule["per_iteration"], z["per_iter_prev_number"])
    assert_close(schedule["extra_background_ratio"], z["extra_bg_ratio"])
    assert_close(schedule["numbers"], z["numbers_total"])
    summed = None
    for i, labels in enumerate(z["labels"]):
        f = leaf(z["features"][i])
        fake = L.replay_features(
            *(z[f"prev_{key}"] for key in ("prototypes", "noise", "norm")),
            schedule["per_iteration"],
            eps=z["eps"][i].T,
            eta=z["eta"][i].T,
            fidelity="released",
        )
        assert_close(fake.T, z["fake_features"][i])
        small = classify(f, w, b)[:, old - 1 :]
        positions = L.downsample_labels(labels, f.shape[-2:], "nearest-exact") == 0
        positions &= L.downsample_labels(predictions[i], f.shape[-2:], "nearest-exact") == 0
        real = L.MBCELoss(old, weights["pos_weight"])(to_labels(small, labels), labels)
        of_fake = L.negatives_loss(classify(fake.T[None, :, :, None], w, b)[:, old - 1 :])
        extra = L.negatives_loss(small, positions)
        share = schedule["extra_background_ratio"] * positions.sum() / positions.numel()
        mbce = L.replay_mbce(real, of_fake, extra, len(fake) / positions.numel(), share)
        pkd = L.OldClassFeaturesMaintainingLoss()(f, z["features_old"][i], labels, predictions[i])
        discriminative = L.SimilarityAwareDiscriminativeLoss(old, meta["new_classes"], fidelity="released")
        cont = discriminative(f, labels, z["prev_prototypes"])
        terms = {"real": real, "fake": of_fake, "extra": extra, "mbce": mbce, "pkd": pkd, "cont": cont}
        for term, value in terms.items():
            assert_close(value, z[f"loss_{term}"][i])
        total = weights["mbce"] * mbce + weights["pkd"] * pkd + weights["cont"] * cont
        assert_close(total, z["loss"][i])
        grad, *others = gradient(total, f, *w, *b)
        assert_close(grad, z["grad_features"][i])
        summed = others if summed is None else [a + g for a, g in zip(summed, others, strict=True)]
    expected = [z[f"grad_{kind}_{k}"] for kind in ("weight", "bias") for k in steps]
    for found, value in zip(summed, expected, strict=True):
        assert_close(found, value)


def test_replayed_norm_is_one_number_per_feature_in_the_paper_form():
    prototypes = F.normalize(torch.rand(2, 8), dim=1)
    zeros, norms = torch.zeros(2, 8), torch.tensor([[3.0, 4], [1, 1]])
    for fidelity, parallel in (("paper", True), ("released", False)):
        fake = L.replay_features(prototypes, zeros, norms, [5, 3], fidelity=fidelity)
        cosine = F.cosine_similarity(fake, prototypes.repeat_interleave(torch.tensor([5, 3]), dim=0)).abs()
        assert fake.shape == (8, 8) and bool((cosine > 0.9999).all()) is parallel
