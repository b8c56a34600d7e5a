"""NeST's golden files: initial matrices, transformation, and what is written back; values and gradients."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load
from torch.nn import functional as F

from utils.loss import ClassifierTransform, ImportanceMatrices, UnbiasedCrossEntropy


def update(matrices, z, images):
    features = z["features"][images]
    small = F.conv2d(features, z["weight_old"][:, :, None, None], z["bias_old"])
    logits = F.interpolate(small, size=z["labels"].shape[-2:], mode="bilinear", align_corners=False)
    matrices.update(
        features=features, logits_old=logits, labels=z["labels"][images], weight_old=z["weight_old"]
    )


@pytest.mark.parametrize("name", cases("nest_matrices*"))
def test_matrices(name, device):
    z, meta = load(name, device)
    counts = {"old_classes": meta["old_classes"], "new_classes": meta["new_classes"]}
    one_by_one, at_once, parts = (
        ImportanceMatrices(**counts, feat_dim=z["features"].shape[1], size=meta["size"]) for _ in range(3)
    )
    for i in range(len(z["features"])):
        update(one_by_one, z, slice(i, i + 1))
    update(at_once, z, slice(None))
    for images in (slice(0, 1), slice(1, None)):  # two processes
        process = ImportanceMatrices(**counts, feat_dim=z["features"].shape[1], size=meta["size"])
        update(process, z, images)
        parts.sums, parts.counts = (
            process.sums + parts.sums.to(device),
            process.counts + parts.counts.to(device),
        )
    for matrices in (one_by_one, at_once, parts):
        M, P = matrices.compute()
        assert_close(M, z["M"])
        assert_close(P, z["P"])
    transform = ClassifierTransform(z["weight_old"], z["bias_old"], M, P, z["bias"])
    assert_close(transform(z["features"]), z["logits_initial"])
    assert_written(transform, z, "initial")


def assert_written(transform, z, prefix):
    written = transform.finish()
    assert written.keys() == {"weight_new", "bias_new", "weight_background"}
    for key, value in written.items():
        assert_close(value, z[f"{prefix}_{key}"])


@pytest.mark.parametrize("name", cases("nest_transform*"))
def test_transform(name, device):
    z, meta = load(name, device)
    keys = ("M", "P", "bias", "M_bg", "P_bg")
    transform = ClassifierTransform(**{key: z[key] for key in ("weight_old", "bias_old", *keys)})
    assert [key for key, _ in transform.named_parameters()] == list(keys)
    small = transform(leaf(z["features"]))
    logits = F.interpolate(small, size=z["labels"].shape[-2:], mode="bilinear", align_corners=False)
    assert_close(logits.sum(dim=(2, 3)), z["logits_sum"])
    criterion = UnbiasedCrossEntropy(old_cl=meta["old_classes"], reduction="none")
    loss = criterion(logits, z["labels"]).mean()
    assert_close(loss, z["loss"])
    for key, found in zip(keys, gradient(loss, *transform.parameters()), strict=True):
        assert_close(found, z[f"grad_{key}"])
    assert_written(transform, z, "final")


def test_a_class_without_a_pixel_starts_at_0_and_can_be_trained(device):
    z, meta = load(cases("nest_matrices-*")[0], device)
    new = meta["new_classes"] + 1
    matrices = ImportanceMatrices(meta["old_classes"], new, z["features"].shape[1])
    update(matrices, z, slice(None))
    M, P = matrices.compute()
    assert_close(M[:-1], z["M"])
    assert not M[-1].any() and torch.equal(P[-1], torch.full_like(P[-1], 1 / meta["old_classes"]))
    transform = ClassifierTransform(z["weight_old"], z["bias_old"], M, P, torch.zeros(new, device=device))
    loss = transform(z["features"])[:, -1].sum()
    assert gradient(loss, transform.M)[0][-1].any()
    for value in (
        *transform.finish().values(),
        ClassifierTransform(
            z["weight_old"], z["bias_old"], 0 * M, P, torch.zeros(new, device=device)
        ).finish()["weight_new"],
    ):
        assert value.isfinite().all()
