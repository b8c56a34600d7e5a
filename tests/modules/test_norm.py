import copy
import importlib.util
import sys
import threading
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modules import NetworkSpec, build_network, norm
from modules.norm import NORM_KINDS, AbsWeightBatchNorm2d, NormAct, norm_layers
from utils.errors import UserError

needs_inplace_abn = pytest.mark.skipif(
    importlib.util.find_spec("inplace_abn") is None,
    reason="inplace-abn is not installed (pip install --no-build-isolation inplace-abn)",
)
PLAIN_KINDS = [kind for kind in NORM_KINDS if kind not in ("iabn", "iabn_sync")]


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_plain_kinds(kind):
    torch.manual_seed(0)
    norms = NormAct(kind)
    layer, activation = norms(4), norms.activation()
    x = torch.randn(3, 4, 5, 5)
    slope = 0.0 if kind in ("std", "sync") else 0.01
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), unbiased=False, keepdim=True).add(
        1e-5
    ).sqrt()
    expected = nn.functional.leaky_relu(normalised, slope)
    torch.testing.assert_close(activation(layer(x)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms.plain(4)(x), normalised, rtol=1e-4, atol=1e-4)


def test_sync_needs_an_nccl_group(monkeypatch):
    assert type(NormAct("sync")(4)) is nn.BatchNorm2d
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert type(NormAct("sync")(4)) is nn.BatchNorm2d
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    assert type(NormAct("sync")(4)) is nn.SyncBatchNorm


def test_without_inplace_abn(monkeypatch):
    monkeypatch.setitem(sys.modules, "inplace_abn", None)
    norm._in_place_layers.cache_clear()
    with pytest.raises(UserError, match="pip install --no-build-isolation inplace-abn"):
        build_network(NetworkSpec(backbone="resnet50", norm_act="iabn_sync"))


def test_norm_layers_finds_all():
    net = build_network(NetworkSpec(backbone="resnet50", norm_act="abn"))
    # 53 in ResNet-50, 3 in the head.
    assert len(list(norm_layers(net))) == 56


def test_absolute_weight_norm_is_batch_norm_for_positive_weights():
    torch.manual_seed(0)
    ours, theirs = AbsWeightBatchNorm2d(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.weight.data.neg_()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def twins(kind, backbone="resnet50"):
    """The same network in place and in plain torch, with weights of both signs."""
    torch.manual_seed(0)
    fused = build_network(NetworkSpec(backbone=backbone, norm_act=kind))
    for layer in norm_layers(fused):
        layer.weight.data.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, layer.weight.shape) * 2 - 1)
        layer.bias.data.normal_(std=0.2)
    plain = build_network(NetworkSpec(backbone=backbone, norm_act="iabn_sync_test"))
    plain.load_state_dict(fused.state_dict())
    return fused.double(), plain.double()


@needs_inplace_abn
@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("kind", ["iabn", "iabn_sync"])
def test_in_place_equals_plain_torch(kind, backbone):
    fused, plain = twins(kind, backbone)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    needs = frozenset({"body", "attentions"})
    results = []
    for net in (fused, plain):
        pre_logits, found = net(images, needs)
        features = [pre_logits, found["body"], *found["attentions"]]
        sum(feature.square().mean() for feature in features).backward()
        results.append((pre_logits, {n: p.grad for n, p in net.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for name, grad in results[0][1].items():
        wanted = results[1][1][name]
        # The kernels hold eps and slope in single precision, and deep down that is all that differs.
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()) + 1e-12)
    for layer, other in zip(norm_layers(fused), norm_layers(plain), strict=True):
        torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fused.eval()(images)[0], plain.eval()(images)[0], rtol=1e-6, atol=1e-6)


@needs_inplace_abn
def test_in_place_under_autocast_and_copied():
    torch.manual_seed(0)
    net = build_network(NetworkSpec(backbone="resnet50", norm_act="iabn_sync"))
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        net(images)[0].float().mean().backward()
    copied = copy.deepcopy(net.eval())
    torch.testing.assert_close(copied(images)[0], net(images)[0], rtol=0, atol=0)


@needs_inplace_abn
def test_in_place_group(monkeypatch):
    """The layer is given the group of all processes by name, where its CUDA kernels can use it."""
    world = threading.Lock()  # like a process group, it cannot be copied
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "group", types.SimpleNamespace(WORLD=world))
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert NormAct("iabn_sync")(4).group is None
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    layer = NormAct("iabn_sync")(4)
    layer.frozen = True
    assert layer.group is world
    copied = copy.deepcopy(layer.eval())
    assert copied.group is world and copied.frozen and not copied.training
    assert copied.weight is not layer.weight
