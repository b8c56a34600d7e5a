"""Layers with two branches: RCIL's golden blocks and head, and the merge in whole networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import assert_close, cases, gradient, leaf, load
from torch import Tensor, nn

import modules.deeplab
from modules import NetworkSpec, build_network
from modules.branches import SECOND, TwoBranches, merge_branches, two_branch_layers
from modules.deeplab import TwoBranchHead
from modules.norm import NormAct
from modules.pretrained import load_pretrained, rename
from modules.resnet import TwoBranchBlock
from segmentation_module import IncrementalSegmentationModule, make_model
from utils.errors import UserError

SLOPE_1 = NormAct("iabn_sync_test")  # the arithmetic of in-place ABN, with which the released program runs


def released_state(z: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Tensor]:
    """The stored state, with this program's names."""
    own = {rename(f"mod2.block1.{key}"): z[f"state_{i}"] for i, key in enumerate(meta["keys"])}
    return {key.removeprefix("layer1.0."): value for key, value in own.items()}


def block_of(z: dict[str, Tensor], meta: dict[str, Any]) -> TwoBranchBlock:
    inputs, stride = z["x"].shape[1], meta["stride"]
    downsample = None
    if stride > 1:
        downsample = nn.Sequential(nn.Conv2d(inputs, 8, 1, stride, bias=False), SLOPE_1(8))
    block = TwoBranchBlock(inputs, 2, stride, downsample, base_width=128, norm_layer=SLOPE_1)
    missing, unknown = block.load_state_dict(released_state(z, meta), strict=False)
    assert unknown == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return block


@pytest.mark.parametrize("name", cases("rcil_block-*") + cases("rcil_block_stride-*"))
def test_block(name: str, either_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    z, meta = load(name, either_device)
    block = block_of(z, meta).to(either_device).eval()
    output = block(z["x"].clone())
    assert_close(output, z["output"])
    assert_close(output, z["attention"])  # the map that is distilled: after the last activation
    inner = block.activation(block.bn1(block.conv1(z["x"])))
    assert_close(block.bn2(block.conv2(inner)), z["branch_0"])
    assert_close(block.bn2_new(block.conv2_new(inner)), z["branch_1"])

    monkeypatch.setattr(torch, "rand", lambda *size, device: z["draw"].view(size))
    x = leaf(z["x"])
    trained = block.train()(x)
    assert_close(trained, z["output_train"])
    assert_close(gradient(trained.square().sum(), x)[0], z["grad_train"])


def head_of(z: dict[str, Tensor], meta: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> TwoBranchHead:
    """A head of eight channels per map."""
    monkeypatch.setattr(modules.deeplab, "HIDDEN_CHANNELS", 8)
    head = TwoBranchHead(4, SLOPE_1, 16, meta.get("pooling", 32))
    head.keep_first()
    state = released_state(z, meta)
    missing, unknown = head.load_state_dict(state, strict=False)
    assert unknown == []
    assert all(name.endswith("num_batches_tracked") or name not in state for name in missing)
    return head.eval()


@pytest.mark.parametrize("name", cases("rcil_head-*"))
def test_head(name: str, either_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    z, meta = load(name, either_device)
    head = head_of(z, meta, monkeypatch).to(either_device)
    assert set(released_state(z, meta)) == {k for k in head.state_dict() if "tracked" not in k}
    assert_close(head(z["x"]), z["output"])


@pytest.mark.parametrize("name", cases("rcil_merge_map-*"))
def test_the_four_maps_share_a_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z, meta = load(name, torch.device("cpu"))
    head = head_of(z, meta, monkeypatch)
    x = torch.randn(2, 4, 6, 7)
    expected = head(x)
    merged = merge_branches(
        nn.ModuleDict({"head": head}), {f"n.head.{k}": v for k, v in head.state_dict().items()}, "n."
    )
    for i in range(4):
        assert_close(merged[f"n.head.map_convs.{i}.weight"].float(), z[f"merged_weight_{i}"])
        assert_close(merged[f"n.head.map_convs.{i}.bias"].float(), z[f"merged_bias_{i}"])
    assert (merged["n.head.map_bn.weight"] == 1).all()
    assert (merged["n.head.map_bn.running_mean"] == 0).all()
    # With the second branch equal to the merged one, the head is what it was.
    head.load_state_dict({k.removeprefix("n.head."): v for k, v in merged.items()})
    head.mixed = lambda features: head._branch(features, "")  # type: ignore[method-assign]
    assert_close(head(x), expected)


def randomised(model: nn.Module) -> nn.Module:
    """With running statistics and affine weights that are not the identity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("running_var", "bn2.weight", "bn2_new.weight")):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.data.normal_(std=0.1)
    return model


SPECS = [
    NetworkSpec(backbone="resnet50", norm_act="iabn_sync_test", two_branches=True),
    NetworkSpec(backbone="resnet50", norm_act="std", two_branches=True),
    NetworkSpec(backbone="mobilenet_v2", norm_act="std", two_branches=True),
    NetworkSpec(backbone="mobilenet_v2", norm_act="abn", two_branches=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.backbone} {spec.norm_act}")
def test_a_step_starts_from_merged_branches(spec: NetworkSpec) -> None:
    """The first branches alone compute what the previous network did; the second keep their weights."""
    torch.manual_seed(0)
    before = randomised(make_model(spec, [3])).eval()
    after = make_model(spec, [3, 2])
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    after.load_previous(state)
    second = after.state_dict()
    kept = [name for name in state if f"{SECOND}." in name]
    assert len(kept) > 50
    for name in kept:
        assert torch.equal(second[name], state[name]), name
    for old, new in zip(layers(before), layers(after.eval()), strict=True):
        convolution = next(iter(new.convolutions().values()))
        features = torch.randn(2, convolution.in_channels, 6, 5)
        assert_close(new._branch(features, ""), old.mixed(features))


def layers(model: nn.Module) -> list[TwoBranches]:
    found = [layer for _, layer in two_branch_layers(model)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("spec", SPECS[1:3], ids=lambda spec: f"{spec.backbone} {spec.norm_act}")
def test_only_the_second_branch_is_trained_later(spec: NetworkSpec) -> None:
    torch.manual_seed(0)
    for model, later in ((make_model(spec, [3]), False), (make_model(spec, [3, 2]), True)):
        model.train()
        for layer in layers(model):
            convolutions, norm = layer.branch
            for suffix, trained in (("", not later), (SECOND, True)):
                parts = nn.ModuleList([getattr(layer, name + suffix) for name in (convolutions, norm)])
                assert all(p.requires_grad == trained for p in parts.parameters())
                assert parts[1].training == trained
        frozen = {n: b.clone() for n, b in model.named_buffers() if f"{SECOND}." not in n}
        model(torch.randn(2, 3, 64, 64))[0].sum().backward()
        buffers = dict(model.named_buffers())
        moved = {n for n, b in frozen.items() if not torch.equal(buffers[n], b)}
        first = {f"{n}.{layer.branch[1]}.running_mean" for n, layer in two_branch_layers(model)}
        assert first.isdisjoint(moved) if later else first <= moved


def test_the_mix_is_drawn_per_channel_and_batch() -> None:
    torch.manual_seed(0)
    block = TwoBranchBlock(8, 64, norm_layer=NormAct("std")).train()
    first, second = torch.randn(2, 64, 3, 3), torch.randn(2, 64, 3, 3)
    block._branch = lambda features, suffix: second if suffix else first  # type: ignore[method-assign]
    chosen = []
    for _ in range(20):
        mixed = block.mixed(first)
        kinds = torch.stack([first, second, (first + second) / 2])
        equal = (mixed - kinds).abs().amax((1, 3, 4)) < 1e-6  # one kind for a channel of the whole batch
        assert (equal.sum(0) == 1).all()
        chosen.append(equal.float().argmax(0))
    shares = torch.stack(chosen).flatten().bincount(minlength=3) / (20 * 64)
    assert ((shares - torch.tensor([0.33, 0.33, 0.34])).abs() < 0.05).all()
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(block.eval().mixed(first), (first + second) / 2)


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
def test_pretrained_weights_are_those_of_both_branches(backbone: str, tmp_path: Any) -> None:
    plain = build_network(NetworkSpec(backbone=backbone))
    torch.save(plain.body.state_dict(), tmp_path / "weights.pth")
    network = build_network(NetworkSpec(backbone=backbone, two_branches=True))
    report = load_pretrained(network, path=tmp_path / "weights.pth")
    assert report.missing == report.left_over == []
    state = network.body.state_dict()
    second = [name for name in state if f"{SECOND}." in name]
    assert second
    for name in second:
        assert torch.equal(state[name], state[name.replace(f"{SECOND}.", ".")]), name


def test_a_network_without_branches_is_refused() -> None:
    state = make_model(NetworkSpec(backbone="mobilenet_v2"), [3]).state_dict()
    model = make_model(NetworkSpec(backbone="mobilenet_v2", two_branches=True), [3, 2])
    with pytest.raises(UserError, match=r"lacks \d+ weights"):
        model.load_previous(state)


@pytest.mark.parametrize(
    "spec",
    [NetworkSpec(model="segformer_b0", two_branches=True), NetworkSpec(head="aspp", two_branches=True)],
)
def test_other_networks_have_no_branches(spec: NetworkSpec) -> None:
    with pytest.raises(UserError, match="--two_branches"):
        build_network(spec)


def test_names_are_the_released_ones() -> None:
    """Of the checkpoint of a later step, with ResNet-101."""
    spec = NetworkSpec(backbone="resnet101", norm_act="iabn_sync_test", two_branches=True)
    names = set(make_model(spec, [16, 5]).state_dict())
    wanted = {
        "network.body.layer3.5.conv2.bias": True,
        "network.body.layer3.5.conv2_new.weight": True,
        "network.body.layer3.5.conv2_new.bias": False,
        "network.body.layer3.5.bn2_new.running_var": True,
        "network.head.map_convs.3.bias": True,
        "network.head.map_convs_new.3.weight": True,
        "network.head.map_bn_new.weight": True,
    }
    assert {name: name in names for name in wanted} == wanted
    assert isinstance(make_model(spec, [16]), IncrementalSegmentationModule)
