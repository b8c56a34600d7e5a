import pytest
import torch
import torch.nn.functional as F
from transformers import SegformerConfig, SegformerModel

from modules import NetworkSpec, build_network
from modules.pretrained import load_pretrained
from modules.segformer import CONFIGS, AllMLPHead, LinearDecoder, MiTConfig, SegFormer
from utils.errors import UserError

TINY = MiTConfig((2, 3, 1, 2), widths=(16, 32, 40, 64), heads=(1, 2, 5, 8))
ALL = frozenset({"body", "pre_logits", "attentions", "self_attention"})


def twin(config, tmp_path, trained_like=False):
    """transformers' model with random weights, and ours that read them from its file."""
    torch.manual_seed(0)
    theirs = SegformerModel(
        SegformerConfig(
            depths=config.depths,
            hidden_sizes=config.widths,
            num_attention_heads=config.heads,
            sr_ratios=config.reductions,
            attn_implementation="eager",
        )
    ).eval()
    if trained_like:
        for name, parameter in theirs.named_parameters():
            # Large enough that attention is not uniform and that biases matter.
            if "norm" in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.data.normal_(std=0.1 if parameter.ndim == 4 else 0.2)
    theirs.save_pretrained(tmp_path)
    ours = SegFormer(config).eval()
    report = load_pretrained(ours, path=tmp_path / "model.safetensors")
    assert report.missing == [] and report.left_over == []
    return theirs, ours


@pytest.mark.parametrize("size", [(64, 96), (77, 131)])
@pytest.mark.parametrize("config", [TINY, CONFIGS["segformer_b0"], CONFIGS["segformer_b1"]])
def test_equals_transformers(config, size, tmp_path):
    theirs, ours = twin(config, tmp_path)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True, output_attentions=True)
        _, found = ours(images, ALL)
        _, without_maps = ours(images, ALL - {"self_attention"})
    last_blocks = [sum(config.depths[: i + 1]) - 1 for i in range(4)]
    for stage in range(4):
        for features in (found["attentions"], without_maps["attentions"]):
            torch.testing.assert_close(features[stage], expected.hidden_states[stage], rtol=0, atol=1e-5)
        attention = found["self_attention"][stage]
        torch.testing.assert_close(attention, expected.attentions[last_blocks[stage]], rtol=0, atol=1e-5)
        assert attention.shape[1] == config.heads[stage]
    torch.testing.assert_close(found["body"], expected.last_hidden_state, rtol=0, atol=1e-5)


def test_equals_transformers_in_double(tmp_path):
    """With weights that make sharp attention, where float32 rounding alone would exceed 1e-5."""
    theirs, ours = twin(TINY, tmp_path, trained_like=True)
    images = torch.randn(2, 3, 77, 131, dtype=torch.double)
    with torch.no_grad():
        expected = theirs.double()(images, output_hidden_states=True)
        _, found = ours.double()(images, ALL)
        _, fused = ours(images, frozenset({"attentions"}))
    for stage in range(4):
        wanted = expected.hidden_states[stage]
        assert wanted.abs().max() > 1
        torch.testing.assert_close(found["attentions"][stage], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(fused["attentions"][stage], wanted, rtol=0, atol=1e-6)
    assert max(a.max() for a in found["self_attention"]) > 0.5


@pytest.mark.parametrize("size", range(6))
def test_published_sizes(size):
    """Parameters of the encoders as the paper counts them (table 6), in millions."""
    with torch.device("meta"):
        network = build_network(NetworkSpec(f"segformer_b{size}"))
    millions = sum(p.numel() for p in network.body.parameters()) / 1e6
    assert millions == pytest.approx((3.4, 13.1, 24.2, 44.0, 60.8, 81.4)[size], abs=0.1)
    assert network.backbone_channels == (256 if size == 0 else 512)


def slow_decoder(head, features, mode):
    size = features[0].shape[2:]
    align = {"align_corners": False} if mode == "bilinear" else {}
    maps = [
        F.interpolate(conv(f), size=size, mode=mode, **align)
        for conv, f in zip(head.project, features, strict=True)
    ]
    return head.fuse(torch.cat(maps, dim=1))


@pytest.mark.parametrize("size", [(16, 24), (20, 33)])
def test_decoders_equal_their_plain_form(size):
    torch.manual_seed(0)
    features = [
        torch.randn(2, width, -(-size[0] // 2**i), -(-size[1] // 2**i)) for i, width in enumerate(TINY.widths)
    ]
    sats = LinearDecoder(TINY.widths)
    torch.testing.assert_close(sats(features), slow_decoder(sats, features, "nearest"), rtol=1e-5, atol=1e-5)
    mlp = AllMLPHead(TINY.widths).eval()
    mlp.norm.running_mean.normal_()
    expected = mlp.norm(slow_decoder(mlp, features, "bilinear")).relu()
    torch.testing.assert_close(mlp(features), expected, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for(monkeypatch):
    net = SegFormer(TINY)
    images = torch.randn(1, 3, 64, 64)
    softmax_calls = []
    real = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: softmax_calls.append(1) or real(*a, **k))
    pre_logits, none = net(images)
    assert none == {} and softmax_calls == []
    assert pre_logits.shape == (1, net.out_channels, 16, 16)
    _, found = net(images, frozenset({"self_attention"}))
    assert set(found) == {"self_attention"} and len(softmax_calls) == 4
    for attention, tokens in zip(found["self_attention"], (256, 64, 16, 4), strict=True):
        assert attention.shape[2] == tokens
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))
    sum(a.square().sum() for a in found["self_attention"]).backward()
    assert net.body.block4[-1].attn.q.weight.grad.abs().sum() > 0


def test_drop_path_grows_over_depth():
    net = SegFormer(TINY, drop_path=0.7)
    rates = [block.drop_path.p for i in range(1, 5) for block in net.body.get_submodule(f"block{i}")]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(net.train()(images)[0], net(images)[0])
    assert torch.equal(net.eval()(images)[0], net(images)[0])


@pytest.mark.parametrize("decoder", ["sats", "segformer"])
def test_autocast_and_channels_last(decoder):
    torch.manual_seed(0)
    net = SegFormer(TINY, decoder).eval()
    images = torch.randn(2, 3, 64, 80)
    expected, _ = net(images)
    found, _ = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half, features = net.train()(images, ALL)
        loss = half.float().mean() + sum(a.float().square().mean() for a in features["self_attention"])
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_errors():
    net = SegFormer(TINY)
    with pytest.raises(UserError, match="enlarge or pad them"):
        net(torch.randn(1, 3, 16, 64))
    with pytest.raises(UserError, match="logits_small"):
        net(torch.randn(1, 3, 64, 64), frozenset({"logits_small"}))
