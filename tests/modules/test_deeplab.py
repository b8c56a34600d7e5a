import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from modules import NetworkSpec, build_network
from modules.deeplab import ASPP_DILATIONS, ASPPHead, AtrousConv2d, DeepLabHead
from modules.norm import NormAct
from utils.errors import UserError


def make_head(pooling, output_stride=16, kind="abn", in_channels=12):
    torch.manual_seed(0)
    head = DeepLabHead(in_channels, NormAct(kind), output_stride, pooling)
    for layer in head.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(std=0.2)
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return head.eval()


def slow_window_pool(x, window):
    """Mean over the window around each place, where windows that leave the map are moved inside."""
    height, width = x.shape[2:]
    rows, columns = min(window, height), min(window, width)
    pooled = torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            top = min(max(i - (rows - 1) // 2, 0), height - rows)
            left = min(max(j - (columns - 1) // 2, 0), width - columns)
            pooled[:, :, i, j] = x[:, :, top : top + rows, left : left + columns].mean((2, 3))
    return pooled


def slow_head(head, x, pooled, dilations, activation):
    state = dict(head.named_parameters()) | dict(head.named_buffers())

    def norm(y, name):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        y = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return activation(y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None])

    maps = [F.conv2d(x, state["map_convs.0.weight"])]
    for i, d in enumerate(dilations, start=1):
        maps.append(F.conv2d(x, state[f"map_convs.{i}.weight"], padding=d, dilation=d))
    out = F.conv2d(norm(torch.cat(maps, 1), "map_bn"), state["red_conv.weight"])
    branch = norm(F.conv2d(pooled, state["global_pooling_conv.weight"]), "global_pooling_bn")
    out = out + F.conv2d(branch, state["pool_red_conv.weight"])
    return norm(out, "red_bn")


@pytest.mark.parametrize("size", [(7, 9), (8, 5), (3, 3)])
@pytest.mark.parametrize("pooling", [3, 4, 32, 0])
def test_evaluation_pooling(pooling, size):
    head = make_head(pooling)
    x = torch.randn(2, 12, *size)
    pooled = slow_window_pool(x, pooling) if pooling else x.mean((2, 3), keepdim=True).expand_as(x)
    expected = slow_head(head, x, pooled, (6, 12, 18), lambda y: F.leaky_relu(y, 0.01))
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("output_stride", "dilations"), [(16, (6, 12, 18)), (8, (12, 24, 32))])
def test_dilations_and_relu(output_stride, dilations):
    head = make_head(0, output_stride, kind="std")
    x = torch.randn(1, 12, 40, 41)
    expected = slow_head(head, x, x.mean((2, 3), keepdim=True).expand_as(x), dilations, torch.relu)
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-5)


def test_training_pools_globally():
    """In training the window plays no part: with frozen statistics both settings give the same values."""
    x = torch.randn(2, 12, 9, 9)
    outputs = []
    for pooling in (3, 0):
        head = make_head(pooling)
        head.training = True  # norms stay in evaluation, as with --fix_bn
        outputs.append(head(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("training", [False, True])
def test_aspp_head_is_torchvisions(output_stride, training):
    """Same names of the weights, same outputs, gradients and statistics, with the same dropout."""
    torch.manual_seed(0)
    theirs = ASPP(12, [6, 12, 18] if output_stride == 16 else [12, 24, 36]).double()
    ours = ASPPHead(12, NormAct("std"), ASPP_DILATIONS[output_stride]).double()
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.weight.data, layer.bias.data, layer.running_mean):
                values.normal_(1, 0.3)
    ours.load_state_dict(theirs.state_dict())
    theirs.project[3].p = ours.project[3].p
    found = []
    for head in (theirs, ours):
        torch.manual_seed(1)  # dropout
        x = torch.randn(3, 12, 9, 14, dtype=torch.float64, requires_grad=True)
        out = head.train(training)(x)
        (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append([out, x.grad, *(p.grad for p in head.parameters()), *head.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.manual_seed(1)
    assert ours.project[3].p == 0.1 and torch.equal(ours(x.detach()), ours(x.detach())) != training


def test_aspp_head_has_the_weights_of_ssuls_release(shared):
    """Keys and shapes of a released checkpoint, after its name of this part."""
    listed = json.loads((shared / "released" / "checkpoint_keys_SSUL.json").read_text(encoding="utf-8"))
    prefix = "classifier.aspp."
    theirs = {k.removeprefix(prefix): v[0] for k, v in listed["state"].items() if k.startswith(prefix)}
    head = build_network(NetworkSpec(backbone="resnet50", norm_act="std", head="aspp")).head
    assert {name: list(value.shape) for name, value in head.state_dict().items()} == theirs


@pytest.mark.parametrize("kind", ["std", "abn", "iabn_sync_test"])
def test_aspp_head_follows_norm_act(kind):
    head = ASPPHead(12, NormAct(kind)).eval()
    out = head(torch.randn(2, 12, 5, 5))
    assert out.shape == (2, 256, 5, 5)
    assert bool((out < 0).any()) == (kind != "std"), "leaky ReLU but for std"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(NetworkSpec(backbone="mobilenet_v2", norm_act="std")).eval()


def test_intermediates(network):
    images = torch.randn(2, 3, 64, 64)
    pre_logits, none = network(images)
    assert none == {}
    assert pre_logits.shape == (2, network.out_channels, 4, 4)
    _, found = network(images, frozenset({"body", "pre_logits", "attentions"}))
    assert found["body"].shape == (2, network.backbone_channels, 4, 4)
    torch.testing.assert_close(found["pre_logits"], pre_logits)
    assert [a.shape[1] for a in found["attentions"]] == [24, 32, 96, 320, 256]
    assert set(network(images, frozenset({"body"}))[1]) == {"body"}


def test_unknown_intermediate(network):
    with pytest.raises(UserError, match="self_attention"):
        network(torch.randn(1, 3, 64, 64), frozenset({"self_attention"}))


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
def test_autocast_and_channels_last(backbone):
    torch.manual_seed(0)
    net = build_network(NetworkSpec(backbone=backbone, norm_act="std", pooling=3)).eval()
    images = torch.randn(2, 3, 80, 64)
    expected, _ = net.double()(images.double())
    channels_last = net.to(memory_format=torch.channels_last)
    found, _ = channels_last(images.double().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    net, expected = net.float(), expected.float()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = net(images)
        assert F.cosine_similarity(half.float().flatten(), expected.flatten(), dim=0) > 0.999
        loss = net.train()(images, frozenset({"attentions"}))[1]["attentions"][0].float().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": "unet"}, "--model"),
        ({"backbone": "vgg"}, "--backbone"),
        ({"norm_act": "group"}, "--norm_act"),
        ({"output_stride": 32}, "--output_stride"),
        ({"pooling": -1}, "--pooling"),
        ({"head": "unet"}, "--head"),
        ({"model": "segformer_b0", "decoder": "unet"}, "--decoder"),
    ],
)
def test_bad_choices_are_named(options, word):
    with pytest.raises(UserError, match=word):
        build_network(NetworkSpec(**options))


@pytest.mark.parametrize("dilation", [1, 6, 12])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (6, 6), (7, 5), (5, 13), (12, 12), (13, 14)])
def test_atrous_convolution_is_the_plain_one(size, dilation):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(5, 4, 3, padding=dilation, dilation=dilation, bias=False)
    short = AtrousConv2d(5, 4, 3, padding=dilation, dilation=dilation, bias=False)
    short.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, *size)
    weights = torch.randn(2, 4, *size)
    found = []
    for layer in (plain, short):
        given = x.clone().requires_grad_()
        out = layer(given)
        (out * weights).sum().backward()
        found.append((out, given.grad, layer.weight.grad))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_atrous_convolution_leaves_out_what_meets_padding_alone():
    calls = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::convolution":
                calls.append(tuple(args[1].shape[2:]))
            return func(*args, **(kwargs or {}))

    layer = AtrousConv2d(5, 4, 3, padding=6, dilation=6, bias=False)
    with Sizes():
        for size in ((6, 6), (6, 7), (7, 6), (7, 7)):
            layer(torch.randn(1, 5, *size))
    assert calls == [(1, 1), (1, 3), (3, 1), (3, 3)]


def test_the_head_of_sdr_is_initialised_by_torch_and_has_no_activation():
    torch.manual_seed(0)
    head = DeepLabHead(64, NormAct("std"), released=True).train()
    for conv in [*head.map_convs, head.red_conv, head.global_pooling_conv, head.pool_red_conv]:
        bound = conv.weight[0].numel() ** -0.5  # Kaiming's uniform rule with a = √5
        assert 0.99 * bound < conv.weight.abs().max() <= bound
    features = torch.randn(4, 64, 5, 5)
    maps = head.map_bn(torch.cat([conv(features) for conv in head.map_convs], dim=1))
    pooled = head.global_pooling_bn(head.global_pooling_conv(features.mean((2, 3), keepdim=True)))
    expected = head.red_bn(head.red_conv(maps) + head.pool_red_conv(pooled))
    torch.testing.assert_close(head(features), expected)
    assert expected.min() < 0
