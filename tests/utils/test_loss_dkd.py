"""DKD: every golden file of the released program, values and gradients, and the paper's form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load
from torch.nn import functional as F

from dataset.exemplars import balanced_choice
from modules.dkd_head import DKDHead
from session.optimizer import warmup_poly_factor
from utils import loss as L


@pytest.mark.parametrize("name", cases("dkd_mbce_*"))
def test_mbce(name, device):
    z, meta = load(name, device)
    x = leaf(z["logits"])
    maps, classes, mean = (
        L.MBCELoss(meta["old_classes"], meta["pos_weight"], reduction=reduction)(x, z["labels"])
        for reduction in ("none", "classes", "mean")
    )
    assert_close(maps, z["loss_map"])
    assert_close(classes, z["loss_per_class"])
    assert_close(mean, z["loss"])
    assert_close(gradient(mean, x)[0], z["grad"])


@pytest.mark.parametrize("name", cases("dkd_kd*"))
def test_sigmoid_distillation(name, device):
    z, _ = load(name, device)
    x = leaf(z["logits"])
    loss = L.SigmoidDistillationLoss()(x, z["teacher_logits"])
    assert_close(loss, z["loss"])
    assert_close(gradient(loss, x)[0], z["grad"])
    maps = L.SigmoidDistillationLoss(reduction="none")(x, z["teacher_logits"])
    assert_close(maps, z["loss_map"])
    assert_close(maps.mean((0, 2, 3)), z["loss_per_class"])


@pytest.mark.parametrize("name", cases("dkd_dkd_*"))
def test_decomposed_distillation(name, device):
    z, meta = load(name, device)
    f, w = leaf(z["features"]), leaf(z["weight"])
    assert_close(L.reasoning_scores(f, w, meta["sign"], fidelity="released"), z["scores"])
    assert_close(L.reasoning_scores(f, w, meta["sign"]), z["scores_paper"])
    released, paper = (
        L.DecomposedDistillationLoss(meta["sign"], fidelity)(f, z["features_old"], w, z["weight_old"])
        for fidelity in ("released", "paper")
    )
    assert_close(released, z["loss"])
    assert_close(paper, z["loss_paper"])
    gradients = gradient(released, f, w)
    assert_close(gradients[0], z["grad_features"])
    assert_close(gradients[1], z["grad_weight"])
    if meta["relu"]:  # behind a ReLU both forms are the same, gradients at features of 0 too
        for of_paper, of_released in zip(gradient(paper, f, w), gradients, strict=True):
            assert_close(of_paper, of_released)


def test_both_signs_of_the_reasoning_scores_are_the_logits():
    features, weight = torch.randn(2, 5, 3, 4), torch.randn(6, 5)
    total = sum(L.reasoning_scores(features, weight, sign) for sign in ("positive", "negative"))
    assert_close(total, F.conv2d(features, weight[:, :, None, None]))


def test_scores_are_float32_where_networks_are_not(device, monkeypatch):
    """Under autocast, and on CUDA where convolutions are computed in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    f, w = leaf(torch.randn(2, 64, 9, 8, device=device)), leaf(torch.randn(5, 64, device=device))
    exact = [leaf(each.detach().double()) for each in (f, w)]
    expected = (F.relu(exact[0][:, None] * exact[1][:, :, None, None])).sum(dim=2)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        scores = L.reasoning_scores(f, w, "positive")
    weights = torch.randn_like(scores)
    assert scores.dtype == torch.float32
    assert_close(scores, expected.float())
    gradients = gradient((scores * weights).sum(), f, w)
    for found, value in zip(gradients, gradient((expected * weights).sum(), *exact), strict=True):
        assert_close(found, value.float())


@pytest.mark.parametrize("name", cases("dkd_ac*"))
def test_auxiliary(name, device):
    z, _ = load(name, device)
    x = leaf(z["logits"])
    loss = L.AuxiliaryLoss()(x)
    assert_close(loss, z["loss"])
    assert_close(gradient(loss, x)[0], z["grad"])
    assert_close(F.softplus(x[:, :1]), z["loss_map"])


@pytest.mark.parametrize("name", cases("dkd_total_*"))
def test_all_terms_of_a_batch(name, device):
    z, meta = load(name, device)
    weights, old = meta["weights"], meta["old_classes"]
    steps = range(len(meta["widths"]))
    f = leaf(z["features"])
    w, b = ([leaf(z[f"{kind}_{k}"]) for k in steps] for kind in ("weight", "bias"))

    def logits(features, weight, bias):
        inputs = [features.detach() if k == 0 else features for k in range(len(weight))]
        maps = [F.conv2d(inputs[k], weight[k][:, :, None, None], bias[k]) for k in range(len(weight))]
        size = z["labels"].shape[-2:]
        return F.interpolate(torch.cat(maps, dim=1), size=size, mode="bilinear", align_corners=False)

    x = logits(f, w, b)
    terms = {
        "mbce": L.MBCELoss(old, weights["pos_weight"])(x[:, old:], z["labels"]),
        "ac": L.AuxiliaryLoss()(x),
    }
    if old > 1:
        assert_close(x.sum((2, 3)), z["logits_sum"], rounding=1e-3)  # sums over 1,008 float32 numbers
        w_old, b_old = ([z[f"{kind}_old_{k}"] for k in steps[:-1]] for kind in ("weight", "bias"))
        terms["kd"] = L.SigmoidDistillationLoss()(x, logits(z["features_old"], w_old, b_old))
        for sign in ("pos", "neg"):
            terms[f"dkd_{sign}"] = L.DecomposedDistillationLoss({"pos": "positive", "neg": "negative"}[sign])(
                f, z["features_old"], torch.cat(w[1:]), torch.cat(w_old[1:])
            )
    for term, value in terms.items():
        assert_close(value, z[f"loss_{term}"])
    total = sum(weights[term] * value for term, value in terms.items())
    assert_close(total, z["loss"])
    gradients = gradient(total, f, *w, *b)
    expected = [z["grad_features"], *(z[f"grad_{kind}_{k}"] for kind in ("weight", "bias") for k in steps)]
    for found, value in zip(gradients, expected, strict=True):
        assert_close(found, value)


@pytest.mark.parametrize("name", cases("dkd_scores*"))
def test_sigmoid_prediction(name, device):
    z, meta = load(name, device)
    first, threshold = meta["first"], meta["threshold"]
    released = L.sigmoid_prediction(z["logits"], first, threshold, fidelity="released")
    assert torch.equal(released, z["prediction"].long())
    paper = L.sigmoid_prediction(z["logits"].double(), first=first)
    assert torch.equal(paper, z["prediction_paper"].long())


@pytest.mark.parametrize("name", cases("dkd_init*"))
def test_new_classes_start_from_the_auxiliary_classifier(name, device):
    z, _ = load(name, device)
    weight, bias = L.initialise_from_auxiliary(z["weight_aux"], z["bias_aux"], len(z["bias_new"]))
    assert torch.equal(weight, z["weight_new"]) and torch.equal(bias, z["bias_new"])


@pytest.mark.parametrize("name", cases("dkd_memory_labels*"))
def test_classes_of_exemplars(name, device):
    z, meta = load(name, device)
    for fidelity in ("paper", "released"):
        threshold = meta["threshold"] if meta["used"] else 2.0  # not used at step 1
        labels = L.exemplar_labels(z["labels"], z["logits"], meta["first"], threshold, fidelity=fidelity)
        assert torch.equal(labels, z["pseudo_labels"].long())


@pytest.mark.parametrize("name", cases("dkd_memory_labels*"))
def test_choice_of_exemplars(name):
    z, meta = load(name, torch.device("cpu"))
    # The candidates' classes are those of the (pseudo-)labels: void stays in the released lists.
    labels = z["pseudo_labels"] if meta["used"] else z["labels"]
    found = {f"new{i}": sorted(set(image.unique().tolist()) - {0}) for i, image in enumerate(labels)}
    listed = {name.split("/")[2].split(".")[0]: classes for name, classes in meta["candidates"]}
    assert {name: listed[name] for name in found} == found
    chosen = balanced_choice(meta["candidates"], meta["class_order"], meta["memory"])
    assert chosen == meta["memory_candidates"]


def test_choice_of_exemplars_ends_when_nothing_fits():
    candidates = [["a", [1]], ["b", [2]], ["c", []], ["d", [1, 2]]]
    assert balanced_choice(candidates, [2, 1, 3], 10) == [["a", [1]], ["b", [2]], ["d", [1, 2]]]
    assert balanced_choice([], [1], 10) == [] == balanced_choice(candidates, [1], 0)


@pytest.mark.parametrize("name", cases("dkd_warmup_poly*"))
def test_warmup_poly(name):
    z, meta = load(name, torch.device("cpu"))
    n = meta["iterations"]
    arguments = {"warmup_factor": meta["warmup_factor"], "power": meta["power"]}
    for key, warmup, base in (
        ("lr", meta["warmup"], torch.tensor(meta["base_lr"])),
        ("lr_poly", 0.0, z["lr_poly"][0]),
    ):
        factors = [warmup_poly_factor(i, n, warmup=warmup, **arguments) for i in range(n)]
        assert_close(torch.tensor(factors)[:, None] * base, z[key])


@pytest.mark.parametrize("name", cases("dkd_head*"))
def test_head(name, device):
    z, meta = load(name, device)
    head = DKDHead(meta["in_channels"], meta["channels"], tuple(meta["rates"])).to(device)
    state = {key: z[f"state_{i}"] for i, key in enumerate(meta["keys"])}
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    assert_close(head.eval()(z["x"]), z["output"])


def test_mean_over_nothing_is_zero():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = L.negatives_loss(x, torch.zeros(1, 4, 4, dtype=torch.bool))
    assert loss.item() == 0 and gradient(loss, x)[0].abs().sum() == 0
    assert np.isfinite(L.MBCELoss(3)(x, torch.full((1, 4, 4), 255)).item())
