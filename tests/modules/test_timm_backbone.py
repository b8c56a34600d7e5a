"""Backbones of timm: feature maps, sizes, checkpointing, pretrained files, refusals."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import timm
import torch

from argparser import parse_options
from modules import NetworkSpec, build_network, load_pretrained
from segmentation_module import make_model
from utils.errors import UserError

# One small member of each family, and the pixels per position of its last map.
NETWORKS = {
    "resnet18d": 16,
    "resnext26ts": 16,
    "convnext_atto": 16,
    "efficientnet_lite0": 16,
    "mobilenetv3_small_050": 32,
    "regnetx_002": 16,
    "pvt_v2_b0": 32,
    "swin_tiny_patch4_window7_224": 32,
    "swinv2_tiny_window8_256": 32,
    "vit_tiny_patch16_224": 16,
    "eva02_tiny_patch14_224": 14,
    "hrnet_w18_small": 32,
}


@pytest.mark.parametrize("model", ["deeplab", "mlp"])
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_of_any_size(name: str, model: str) -> None:
    network = build_network(NetworkSpec(model=model, backbone=f"timm/{name}", head="aspp"))
    stride = NETWORKS[name]
    pre_logits, found = network(torch.randn(2, 3, 96, 68), frozenset({"body", "attentions", "stages"}))
    assert network.body.stride == stride
    assert abs(found["body"].shape[2] - 96 / stride) < 1 and abs(found["body"].shape[3] - 68 / stride) < 1
    assert [len(m[0]) for m in found["stages"]] == list(network.body.widths)
    assert len(found["attentions"]) == 5 and pre_logits.shape[1] == 256
    assert pre_logits.shape[2:] == (found["stages"][0] if model == "mlp" else found["body"]).shape[2:]
    pre_logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.cuda
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_on_a_gpu_are_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(NetworkSpec(backbone=f"timm/{name}")).eval()
    images = torch.randn(2, 3, 96, 68)
    expected = network(images)[0]
    maps = network.cuda().to(memory_format=torch.channels_last)(images.cuda())[0]
    torch.testing.assert_close(maps.cpu(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    maps.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_checkpointing_changes_nothing(name: str) -> None:
    """Values, gradients, and the running statistics, which a recomputed batch must not move again."""
    torch.manual_seed(0)
    spec = NetworkSpec(backbone=f"timm/{name}", drop_path=0.0)
    plain = build_network(spec)
    other = build_network(NetworkSpec(backbone=f"timm/{name}", drop_path=0.0, checkpointing=True))
    other.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for network in (plain, other):
        for _ in range(2):
            network(images)[0].square().mean().backward()
    for (key, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad), key
    for (key, one), two in zip(plain.named_buffers(), other.buffers(), strict=True):
        assert key.endswith("num_batches_tracked") or torch.equal(one, two), key


@pytest.mark.parametrize(
    ("name", "size_of_network"),
    [("resnet10t", {}), ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)})],
)
def test_compiled_as_one_graph(
    name: str, size_of_network: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--compile``: the whole network is captured, also for a second size, and computes the same."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **size_of_network))
    torch.manual_seed(0)
    network = build_network(NetworkSpec(backbone=f"timm/{name}", drop_path=0.0))
    compiled = torch.compile(copy.deepcopy(network), backend="eager", fullgraph=True)
    for size in (64, 96):
        images = torch.randn(2, 3, size, size)
        assert torch.equal(compiled(images)[0], network(images)[0])


def test_pretrained_file(tmp_path: Path) -> None:
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    network = build_network(NetworkSpec(backbone="timm/resnet10t"))
    report = load_pretrained(network, path=tmp_path / "weights.pth")
    assert report.missing == [] and report.left_over == ["fc.weight", "fc.bias"]
    assert torch.equal(network.body.model.conv1[0].weight, source.conv1[0].weight)
    with pytest.raises(UserError, match=r"weights\.pth: .*check"):
        load_pretrained(
            build_network(NetworkSpec(backbone="timm/vit_tiny_patch16_224")), path=tmp_path / "weights.pth"
        )


def test_images_are_normalised_as_the_network_was_trained() -> None:
    """ViT's mean and deviation are 0.5; images come normalised by ImageNet's."""
    network = build_network(NetworkSpec(backbone="timm/vit_tiny_patch16_224")).eval()
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.rand(1, 3, 64, 64)
    found = network.body((pixels - mean) / deviation)[0]
    expected = network.body.model.forward_intermediates(
        (pixels - 0.5) / 0.5, indices=[11], norm=True, intermediates_only=True
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dropout_can_be_switched_off() -> None:
    torch.manual_seed(0)
    model = make_model(NetworkSpec(backbone="timm/convnext_atto", drop_path=0.9, head="dkd"), [3])
    model.fix_dropout()
    model.train()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(images)[0], model(images)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--backbone timm/resnet18x", r"timm has no such network; did you mean timm/resnet18"),
        ("--backbone timm/resnet18d.none", r"timm has no weights 'none' of resnet18d"),
        ("--backbone timm/beit_base_patch16_224", "takes images of one size only"),
        ("--backbone timm/hrnet_w18_small --grad_checkpointing", "--grad_checkpointing: timm cannot do it"),
        ("--backbone timm/resnet18d --two_branches", "--two_branches needs --backbone resnet50"),
        ("--backbone timm/gcvit_tiny --model mlp", "one size only|--pretrained_path"),
        ("--backbone swin_b", "timm/swin_base_patch4_window12_384"),
        ("--backbone resnet50 --drop_path 0.1", "no stochastic depth"),
        ("--model mlp --head aspp", "--head is of --model deeplab, not mlp"),
        ("--model mlp --decoder sats", "--decoder is of --model segformer"),
        ("--backbone timm/resnet18d --method SATS --step 1", "no self_attention"),
    ],
)
def test_refused_before_anything_is_loaded(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse_options(["--task", "15-5", *words.split()])
    assert "\n" not in str(raised.value)


# Names of the files of Swin that transformers reads, from timm's.
PUBLISHED = (
    (r"^norm(\d)\.", lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}."),
    (r"^model\.patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^model\.patch_embed\.", "swin.embeddings."),
    (
        r"^model\.layers\.(\d)\.downsample\.",
        lambda found: f"swin.encoder.layers.{int(found[1]) - 1}.downsample.",
    ),
    (r"^model\.", "swin.encoder."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        for pattern, to in PUBLISHED:
            name = re.sub(pattern, to, name)
        names = [name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value") if ".qkv." in name]
        for part, piece in zip(names or [name], tensor.chunk(len(names) or 1), strict=True):
            found[part] = piece.clone()
    return found


@pytest.mark.parametrize(
    ("name", "window", "size"),
    [
        ("swin_tiny_patch4_window7_224", 7, (100, 134)),
        pytest.param("swin_base_patch4_window12_384", 12, (512, 512), marks=pytest.mark.slow),
    ],
)
def test_swin_is_that_of_its_authors_for_dense_prediction(
    name: str, window: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """By transformers' network: maps whose sides are no multiples of the window are padded, then shifted."""
    from safetensors.torch import save_file
    from transformers import SwinBackbone, SwinConfig

    torch.manual_seed(0)
    body = build_network(NetworkSpec(backbone=f"timm/{name}")).body.eval()
    for key, weight in body.named_parameters():  # new ones hide mistakes: norms that do nothing, no biases
        if weight.dim() == 1 or "bias_table" in key:
            weight.data += 0.3 * torch.randn_like(weight)
    layers = body.model.layers
    config = SwinConfig(
        embed_dim=body.widths[0],
        depths=[len(layer.blocks) for layer in layers],
        num_heads=[layer.blocks[0].attn.num_heads for layer in layers],
        window_size=window,
        out_features=[f"stage{number}" for number in range(1, 5)],
    )
    config.save_pretrained(tmp_path)
    save_file(published(body.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    theirs, report = SwinBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        ours, expected = body(images, keep_stages=True)[1], theirs.eval()(images).feature_maps
    for stage, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(stage, wanted, rtol=1e-5, atol=1e-5)


def test_swin_b_of_nest(shared: Path) -> None:
    """Head and classifiers as published, on 1024 channels; the body with a norm for each of its stages."""
    import json

    published = json.loads((shared / "released" / "checkpoint_keys_NeST.json").read_text())["state"]
    with torch.device("meta"):
        spec = NetworkSpec(backbone="timm/swin_base_patch4_window12_384", norm_act="abn")
        model = make_model(spec, [16, 5])
        pre_logits, found = model.network(torch.randn(2, 3, 512, 512), frozenset({"stages"}))
    ours = {name.removeprefix("network."): list(tensor.shape) for name, tensor in model.state_dict().items()}
    rest = {
        name.removeprefix("module."): [256, 1024, *shape[2:]] if shape[1:2] == [2048] else shape
        for name, (shape, _) in published.items()
        if not name.startswith("module.body.")
    }
    counted = {name for name in ours if name.endswith("num_batches_tracked")}
    assert {n: s for n, s in ours.items() if not n.startswith("body.") and n not in counted} == rest
    # Swin-B for 384 pixels has 86,878,584 weights without classifier; one norm goes, four come.
    norms = 2 * (128 + 256 + 512 + 1024) - 2 * 1024
    assert sum(p.numel() for p in model.network.body.parameters()) == 86_878_584 + norms
    assert pre_logits.shape == (2, 256, 16, 16)
    shapes = [tuple(stage.shape[1:]) for stage in found["stages"]]
    assert shapes == [(128, 128, 128), (256, 64, 64), (512, 32, 32), (1024, 16, 16)]
