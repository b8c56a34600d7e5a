"""DFT*'s golden files: three steps of the released trainer, values and gradients to 1e-5 relative."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load
from torch import nn
from torch.nn import functional as F

from utils import loss as L


@pytest.mark.parametrize("name", cases("dft_step*"))
def test_step(name, device):
    z, meta = load(name, device)
    steps = len(meta["widths"])
    parts = L.trainable_parts(step=meta["step"], steps=steps)
    names = {"body": parts["body"], "head": parts["head"]}
    names |= {f"cls.{k}": trained for k, trained in enumerate(parts["classifiers"])}
    assert {n.rpartition(".")[0] for n in meta["trainable"]} == {n for n, trained in names.items() if trained}
    assert set(meta["in_eval_mode"]) == {part for part in ("body", "head") if not parts[part]}
    assert all(parts[buffer.partition(".")[0]] for buffer in meta["buffers_moved"])

    features = leaf(z["features"])
    classifiers = [leaf(z[f"{kind}_{k}"]) for kind in ("weight", "bias") for k in range(steps)]
    weight, bias = torch.cat(classifiers[:steps]), torch.cat(classifiers[steps:])
    logits = F.conv2d(features, weight[:, :, None, None], bias)
    logits = F.interpolate(logits, size=z["labels"].shape[1:], mode="bilinear", align_corners=False)
    assert_close(logits.sum((2, 3)), z["logits_sum"])
    loss = nn.CrossEntropyLoss(ignore_index=L.VOID, reduction="none")(logits, z["labels"].long()).mean()
    assert_close(loss, z["loss"])
    assert_close(gradient(loss, features)[0], z["grad_features"])
    grads = dict(
        zip(
            [f"{kind}_{k}" for kind in ("weight", "bias") for k in range(steps)],
            gradient(loss, *classifiers),
            strict=True,
        )
    )
    for key, grad in grads.items():
        assert parts["classifiers"][int(key[-1])] == (f"grad_{key}" in z)
        if f"grad_{key}" in z:
            assert_close(grad, z[f"grad_{key}"])
    # The released prediction is over all channels, those of later steps too.
    assert torch.equal(logits.argmax(1), z["prediction"].long())
