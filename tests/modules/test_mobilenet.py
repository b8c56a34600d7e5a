import pytest
import torch
import torchvision

from modules.mobilenet import MobileNetV2Body
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
    """At every (32 / stride)-th place the dilated body has torchvision's features of stride 32."""
    torch.manual_seed(0)
    theirs = trained_like(torchvision.models.mobilenet_v2())
    body = MobileNetV2Body(NormAct("std"), output_stride).eval()
    left = body.load_state_dict(theirs.state_dict(), strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == ["classifier.1.weight", "classifier.1.bias"]

    images = torch.randn(1, 3, *size)
    features, stages = body(images, keep_stages=True)
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


def test_stages_only_when_asked():
    body = MobileNetV2Body(NormAct("std"), 16).eval()
    assert body(torch.randn(1, 3, 64, 64))[1] == []


def test_leaky_kinds_replace_relu6():
    body = MobileNetV2Body(NormAct("abn"), 16)
    kinds = {type(module) for module in body.modules()}
    assert torch.nn.ReLU6 not in kinds
    assert torch.nn.LeakyReLU in kinds
    assert torch.nn.ReLU6 in {type(module) for module in MobileNetV2Body(NormAct("std"), 16).modules()}
