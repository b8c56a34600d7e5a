import pytest
import torch
import torchvision

from modules import mobilenet
from modules.mobilenet import AtrousDepthwiseConv2d, MobileNetV2Backbone
from modules.norm import NormAct


def trained_like(net):
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(std=0.2)
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("size", [(65, 97), (64, 96)])
def test_undilated_network_at_more_places(output_stride, size):
    """At every (32 / stride)-th position the dilated backbone has torchvision's features of stride 32."""
    torch.manual_seed(0)
    theirs = trained_like(torchvision.models.mobilenet_v2())
    body = MobileNetV2Backbone(NormAct("std"), output_stride).eval()
    left = body.load_state_dict(theirs.state_dict(), strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == ["classifier.1.weight", "classifier.1.bias"]

    images = torch.randn(1, 3, *size)
    features, stages, _ = body(images, keep_stages=True)
    assert features.shape == (1, 1280, *(-(-side // output_stride) for side in size))
    step = 32 // output_stride
    torch.testing.assert_close(features[:, :, ::step, ::step], theirs.features(images), rtol=1e-5, atol=1e-5)
    assert features.min() >= 0
    x, expected = images, {}
    for index, layer in enumerate(theirs.features):
        x = expected[index] = layer(x)
    for stage, index, stride in zip(stages, (3, 6, 13, 17), (4, 8, 16, 32), strict=True):
        step = max(stride // output_stride, 1)
        torch.testing.assert_close(stage[:, :, ::step, ::step], expected[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("output_stride", "dilations"), [(16, {14: 1, 15: 2}), (8, {7: 1, 8: 2, 14: 2, 15: 4})]
)
def test_equals_torchvision_dilated_by_hand(output_stride, dilations):
    torch.manual_seed(0)
    theirs = trained_like(torchvision.models.mobilenet_v2())
    body = MobileNetV2Backbone(NormAct("std"), output_stride).eval()
    body.load_state_dict(theirs.state_dict(), strict=False)
    for index in range(min(dilations), 18):
        depthwise = theirs.features[index].conv[1][0]
        dilation = dilations[max(start for start in dilations if start <= index)]
        depthwise.stride, depthwise.dilation, depthwise.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
    images = torch.randn(1, 3, 65, 97)
    expected = theirs.features(images)
    torch.testing.assert_close(body(images)[0], expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(body(images)[0], expected)


def test_stages_only_when_asked():
    body = MobileNetV2Backbone(NormAct("std"), 16).eval()
    assert body(torch.randn(1, 3, 64, 64))[1] == []


def test_leaky_kinds_replace_relu6():
    body = MobileNetV2Backbone(NormAct("abn"), 16)
    kinds = {type(module) for module in body.modules()}
    assert torch.nn.ReLU6 not in kinds
    assert torch.nn.LeakyReLU in kinds
    assert torch.nn.ReLU6 in {type(module) for module in MobileNetV2Backbone(NormAct("std"), 16).modules()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("dilation", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (3, 1)])
def test_atrous_depthwise_convolution_on_grids_is_the_plain_one(
    size, dilation, avx512, autocast, monkeypatch
):
    """On small whole numbers, which bfloat16 holds exactly, values and gradients are equal."""
    monkeypatch.setattr(mobilenet, "_AVX512", avx512)
    torch.manual_seed(0)
    layer = AtrousDepthwiseConv2d(6, 6, 3, padding=dilation, dilation=dilation, groups=6, bias=False)
    layer.weight.data = torch.randint(-1, 2, layer.weight.shape).float()
    features, grad = (torch.randint(-1, 2, (2, 6, *size)).float() for _ in range(2))
    x = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    plain = torch.conv2d(x, layer.weight, padding=dilation, dilation=dilation, groups=6)
    assert torch.equal(y.float(), plain)
    of_layer = torch.autograd.grad(y, (x, layer.weight), grad.to(y.dtype))
    of_plain = torch.autograd.grad(plain, (x, layer.weight), grad)
    assert all(torch.equal(*pair) for pair in zip(of_layer, of_plain, strict=True))


def test_only_dilated_blocks_are_atrous():
    for stride, blocks in ((16, [15, 16, 17]), (8, list(range(8, 18)))):
        body = MobileNetV2Backbone(NormAct("std"), stride)
        found = [name for name, module in body.named_modules() if isinstance(module, AtrousDepthwiseConv2d)]
        assert found == [f"features.{block}.conv.1.0" for block in blocks]
