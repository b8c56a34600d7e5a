"""LGKD's golden files: values and gradients of the released code; void, and labels of any size."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load

from utils.loss import LabelGuidedKnowledgeDistillationLoss

NAMES = [name for name in cases("lgkd_*") if "step" not in name]


def criterion(meta, **more):
    return LabelGuidedKnowledgeDistillationLoss(
        prev_kd=meta["prev_kd"], novel_kd=meta["novel_kd"], alpha=meta["alpha"], **more
    )


@pytest.mark.parametrize("labels", ["labels", "labels_full"])
@pytest.mark.parametrize("name", NAMES)
def test_label_guided_distillation(name, labels, device):
    z, meta = load(name, device)
    x, teacher = leaf(z["logits"]), z["teacher_logits"]
    loss = criterion(meta)(logits=x, logits_old=teacher, labels=z[labels])
    assert_close(loss, z["loss"])
    assert_close(gradient(loss, x)[0], z["grad"])
    assert_close(criterion(meta, reduction="sum")(x, teacher, z[labels]), z["loss_sum"])
    assert_close(criterion(meta, reduction="none")(x, teacher, z[labels]), z["loss_none"])


def test_only_void_is_0_with_gradient_0(device):
    x = torch.randn(2, 5, 4, 4, device=device, requires_grad=True)
    labels = torch.full((2, 4, 4), 255, device=device)
    loss = criterion({"prev_kd": 1, "novel_kd": 1, "alpha": 1})(
        x, torch.randn(2, 3, 4, 4, device=device), labels
    )
    assert loss == 0
    assert not gradient(loss, x)[0].any()
