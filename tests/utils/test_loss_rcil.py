"""RCIL's golden files: values and gradients of the released code, to 1e-5 relative."""

from __future__ import annotations

import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load
from torch.nn import functional as F

from utils import loss as L

NORM = ("norm_weight", "norm_bias", "norm_running_mean", "norm_running_var")


@pytest.mark.parametrize("name", cases("rcil_merge-*") + cases("rcil_merge_second-*"))
def test_two_branches_become_one_convolution(name, device):
    z, meta = load(name, device)
    weights = [z[f"conv_weight_{i}"] for i in (0, 1)]
    norms = [tuple(z[f"{part}_{i}"] for part in NORM) for i in (0, 1)]
    weight, bias = L.fold_branches(weights, [z["conv_bias_0"], None], norms, meta["eps"])
    assert_close(weight, z["merged_weight"])
    assert_close(bias, z["merged_bias"])
    merged = F.conv2d(z["x"], weight, bias, padding=1)
    assert_close(merged, z["output_merged"])
    assert_close(merged, z["output"])
    assert not torch.allclose(merged, z["output_slope001"], rtol=1e-2)

    weight, bias = L.fold_branches(weights, [z["conv_bias_0"], None], norms, meta["eps"], absolute=False)
    assert_close(weight, z["weight_plain_paper"])
    assert_close(bias, z["bias_plain_paper"])


def test_branch_weights_by_thirds():
    draw = torch.tensor([0.0, 0.32, 0.33, 0.65, 0.66, 0.99])
    first, second = L.branch_weights(draw)
    assert first.tolist() == [1, 1, 0, 0, 0.5, 0.5]
    assert (first + second).tolist() == [1] * 6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", cases("rcil_pckd_*"))
def test_pooled_cube_distillation(name, channels_last, device):
    z, meta = load(name, device)
    order = torch.channels_last if channels_last else torch.contiguous_format
    number = meta["n"]
    old = [z[f"old_{i}"].contiguous(memory_format=order) for i in range(number)]
    new = [leaf(z[f"new_{i}"].contiguous(memory_format=order)) for i in range(number)]
    classes = {k: meta[k] for k in ("nb_current_classes", "nb_new_classes", "index_new_class")}
    spatial, channel = L.PooledCubeDistillationLoss(meta["factors"])(old, new, **classes)
    assert_close(spatial, z["loss_spatial"])
    assert_close(channel, z["loss_channel"])
    for i, grad in enumerate(gradient(spatial, *new)):
        assert_close(grad, z[f"grad_spatial_{i}"])
    for i, grad in enumerate(gradient(channel, *new[:-1])):
        assert_close(grad, z[f"grad_channel_{i}"])


def test_equal_maps_have_no_distance_and_no_gradient(device):
    maps = [leaf(torch.randn(2, 5, 4, 3, device=device)) for _ in range(2)]
    parts = L.PooledCubeDistillationLoss()([m.detach() for m in maps], maps, 4, 2, 2)
    for part in parts:
        assert part == 0
    assert all(not grad.any() for grad in gradient(sum(parts), *maps))


def test_the_small_logits_alone_have_no_channel_part(device):
    old, new = torch.randn(2, 2, 4, 3, device=device), leaf(torch.randn(2, 4, 4, 3, device=device))
    spatial, channel = L.PooledCubeDistillationLoss()([old], [new], 4, 2, 2)
    assert spatial > 0
    assert channel == 0
    assert gradient(spatial + channel, new)[0].isfinite().all()


def test_maps_of_other_sizes_or_numbers_are_refused():
    maps = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="1 maps of the teacher, 2"):
        L.PooledCubeDistillationLoss()([maps], [maps, maps], 2, 1, 1)
    with pytest.raises(ValueError, match="map 0"):
        L.PooledCubeDistillationLoss()([maps[..., :2]], [maps], 2, 1, 1)


def total(z: dict[str, torch.Tensor], meta: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole loss of a step as the released trainer forms it, and its leaves."""
    old_classes, new_classes = meta["old_classes"], meta["new_classes"]
    leaves = {k: leaf(v) for k, v in z.items() if k.startswith(("weight_", "bias_")) and "old" not in k}
    leaves |= {k: leaf(z[k]) for k in ("features", "map_0", "map_1", "map_2", "map_3")}
    weight = torch.cat([leaves["weight_0"], leaves["weight_1"]])
    bias = torch.cat([leaves["bias_0"], leaves["bias_1"]])
    small = F.conv2d(leaves["features"], weight[:, :, None, None], bias)
    small_old = F.conv2d(z["features_old"], z["weight_old_0"][:, :, None, None], z["bias_old_0"])
    large, large_old = (
        F.interpolate(m, size=z["labels"].shape[1:], mode="bilinear") for m in (small, small_old)
    )
    entropy = L.UnbiasedCrossEntropy(old_cl=old_classes, reduction="none")(large, z["labels"].long()).mean()
    distillation = L.UnbiasedKnowledgeDistillationLoss()(large, large_old)
    spatial, channel = L.PooledCubeDistillationLoss((0.01, 0.0005))(
        [*(z[f"map_old_{i}"] for i in range(4)), z["features_old"], small_old],
        [*(leaves[f"map_{i}"] for i in range(4)), leaves["features"], small],
        nb_current_classes=old_classes + new_classes,
        nb_new_classes=new_classes,
        index_new_class=old_classes,
    )
    assert_close(distillation, z["part_distillation"])
    assert_close(spatial, z["part_spatial"])
    assert_close(channel, z["part_channel"])
    return entropy + meta["options"]["loss_kd"] * distillation + spatial + channel, leaves


@pytest.mark.parametrize("name", cases("rcil_step_voc-*"))
def test_whole_step(name, device):
    z, meta = load(name, device)
    loss, leaves = total(z, meta)
    assert_close(loss, z["loss"])
    for key, grad in zip(leaves, gradient(loss, *leaves.values()), strict=True):
        assert_close(grad, z[f"grad_{key}"])
