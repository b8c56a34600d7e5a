import pytest
import torch
import torch.nn.functional as F
import torchvision

from modules.norm import NormAct
from modules.resnet import ResNetBackbone

DILATE = {16: [False, False, True], 8: [False, True, True]}


def randomise_norms(module):
    """Norm layers as after training: a fresh one is the identity and hides mistakes."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(std=0.2)
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return module


def torchvision_stages(net, images):
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    outputs = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("backbone", "output_stride"), [("resnet50", 16), ("resnet50", 8), ("resnet101", 16), ("resnet101", 8)]
)
def test_equals_torchvision(backbone, output_stride, train):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(backbone, replace_stride_with_dilation=DILATE[output_stride])
    randomise_norms(theirs).train(train)
    body = ResNetBackbone(backbone, NormAct("std"), output_stride).train(train)
    left = body.load_state_dict(theirs.state_dict(), strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == ["fc.weight", "fc.bias"]

    images = torch.randn(2, 3, 65, 97)
    expected = torchvision_stages(theirs, images)
    features, stages, _ = body(images, keep_stages=True)
    assert torch.equal(features, expected[-1])
    assert features.shape[1] == body.out_channels
    for stage, wanted in zip(stages, expected, strict=True):
        assert stage.min() < 0, "a stage's features come before the activation"
        assert torch.equal(stage.relu(), wanted)


def test_stages_only_when_asked():
    body = ResNetBackbone("resnet50", NormAct("std"), 16).eval()
    images = torch.randn(1, 3, 64, 64)
    features, stages, _ = body(images)
    assert stages == []
    torch.testing.assert_close(features, body(images, keep_stages=True)[0], rtol=0, atol=0)


def slow_leaky_resnet(state, blocks, dilations, images):
    """MiB's residual network, written out: every block of a dilated stage has the stage's dilation."""

    def norm(x, name):
        return F.batch_norm(
            x,
            state[f"{name}.running_mean"],
            state[f"{name}.running_var"],
            state[f"{name}.weight"],
            state[f"{name}.bias"],
        )

    x = F.leaky_relu(norm(F.conv2d(images, state["conv1.weight"], stride=2, padding=3), "bn1"), 0.01)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    before = []
    for stage, (count, dilation) in enumerate(zip(blocks, dilations, strict=True), start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            stride = 2 if block == 0 and stage > 1 and dilation == 1 else 1
            out = F.leaky_relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"]), f"{name}.bn1"), 0.01)
            out = F.conv2d(
                out, state[f"{name}.conv2.weight"], stride=stride, padding=dilation, dilation=dilation
            )
            out = F.leaky_relu(norm(out, f"{name}.bn2"), 0.01)
            out = norm(F.conv2d(out, state[f"{name}.conv3.weight"]), f"{name}.bn3")
            if block == 0:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{name}.downsample.1")
            x = out + x
            if block == count - 1:
                before.append(x)
            x = F.leaky_relu(x, 0.01)
    return x, before


@pytest.mark.parametrize(("output_stride", "dilations"), [(16, (1, 1, 1, 2)), (8, (1, 1, 2, 4))])
def test_leaky_kinds_are_the_network_of_mib(output_stride, dilations):
    torch.manual_seed(0)
    body = randomise_norms(ResNetBackbone("resnet50", NormAct("abn"), output_stride)).eval()
    images = torch.randn(1, 3, 65, 65)
    expected, expected_stages = slow_leaky_resnet(body.state_dict(), (3, 4, 6, 3), dilations, images)
    features, stages, _ = body(images, keep_stages=True)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    for stage, wanted in zip(stages, expected_stages, strict=True):
        torch.testing.assert_close(stage, wanted, rtol=1e-5, atol=1e-5)


def test_gradient_through_kept_stages():
    """The activation works in place; what was handed out before it must stay usable in the backward pass."""
    torch.manual_seed(0)
    body = ResNetBackbone("resnet50", NormAct("std"), 16).eval()
    images = torch.randn(1, 3, 64, 64)
    _, stages, _ = body(images, keep_stages=True)
    sum(stage.square().mean() for stage in stages).backward()
    found = [body.conv1.weight.grad.clone(), body.layer4[2].bn3.bias.grad.clone()]
    body.zero_grad()

    # The same loss from hooks on the norm and shortcut of each stage's last block.
    total, caught = 0.0, {}
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        last = stage[-1]
        last.register_forward_hook(lambda m, args, out: caught.__setitem__("in", args[0]))
        last.bn3.register_forward_hook(lambda m, args, out: caught.__setitem__("norm", out))
    x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        x = stage(x)
        total = total + (caught["norm"] + caught["in"]).square().mean()
    total.backward()
    for grad, parameter in zip(found, (body.conv1.weight, body.layer4[2].bn3.bias), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "output_stride", "last_stage"),
    [("resnet101", 16, [2, 2, 2]), ("resnet101", 8, [4, 4, 4]), ("resnet50", 16, [1, 2, 1])],
)
def test_the_backbone_of_sdr(backbone, output_stride, last_stage):
    """Its program dilates the last stage's first block too, and its running statistics hardly move."""
    body = ResNetBackbone(backbone, NormAct("std"), output_stride, released=True)
    assert [block.conv2.dilation[0] for block in body.layer4] == last_stage
    assert all(block.conv2.padding == block.conv2.dilation for block in body.layer4)
    assert {block.conv2.dilation[0] for block in body.layer3} == {16 // output_stride}
    assert {m.momentum for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {3e-4}
    body.eval()(torch.zeros(1, 3, 64, 64))
