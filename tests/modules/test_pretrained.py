import copy
import os
import pickle
import re
import urllib.error
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from transformers import SegformerConfig, SegformerForImageClassification

from modules import NetworkSpec, build_network, load_pretrained
from modules.pretrained import load_default_pretrained, rename
from modules.segformer import MiTConfig, SegFormer
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MOBILENET = SHARED / "weights" / "mobilenet_v2_imagenet.pth"
CONFIG = MiTConfig((1, 2, 1, 1), widths=(16, 32, 40, 64))


@pytest.fixture(scope="module")
def random_resnet():
    return build_network(NetworkSpec(backbone="resnet50", norm_act="std"))


@pytest.fixture
def resnet(random_resnet):
    return copy.deepcopy(random_resnet)  # a tenth of the time that drawing its weights takes


@pytest.fixture
def mobilenet():
    return build_network(NetworkSpec(backbone="mobilenet_v2", norm_act="std"))


@pytest.fixture(scope="module")
def resnet_state():
    torch.manual_seed(1)
    return torchvision.models.resnet50().state_dict()


def assert_same(body, state):
    for key, value in body.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[key]), key


def test_torchvision_file(resnet, resnet_state, tmp_path):
    torch.save(resnet_state, tmp_path / "resnet50.pth")
    report = load_pretrained(resnet, path=tmp_path / "resnet50.pth")
    assert_same(resnet.body, resnet_state)
    assert report.missing == []
    assert report.left_over == ["fc.weight", "fc.bias"]
    assert len(report.loaded) == len(resnet_state) - 2
    assert "\n" not in report.summary()
    assert "2 (fc.weight, fc.bias) left over" in report.summary()


def to_mib(key):
    """torchvision's name → the name in inplace-abn's ImageNet checkpoints."""
    if key.startswith("fc."):
        return "module.classifier." + key
    if not key.startswith("layer"):
        return "module.mod1." + key
    layer, block, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", key).groups()
    rest = re.sub(r"^downsample\.0", "proj_conv", rest)
    rest = re.sub(r"^downsample\.1", "proj_bn", rest)
    if not rest.startswith("proj"):
        rest = "convs." + rest
    return f"module.mod{int(layer) + 1}.block{int(block) + 1}.{rest}"


def test_mib_file(resnet, resnet_state, tmp_path):
    state = {to_mib(k): v for k, v in resnet_state.items() if not k.endswith("num_batches_tracked")}
    assert "module.mod5.block1.convs.conv2.weight" in state
    path = tmp_path / "resnet50_abn.pth.tar"
    torch.save({"epoch": 90, "arch": "resnet50", "state_dict": state}, path)
    network = build_network(NetworkSpec(backbone="resnet50", norm_act="abn"))
    report = load_default_pretrained(
        network, model=None, backbone="resnet50", norm_act="abn", folder=tmp_path
    )
    assert_same(network.body, resnet_state)
    assert report.missing == []
    assert report.left_over == ["module.classifier.fc.weight", "module.classifier.fc.bias"]


def test_mib_file_absent(resnet, tmp_path):
    with pytest.raises(UserError, match=r"resnet50_iabn_sync\.pth\.tar: not found"):
        load_default_pretrained(
            resnet, model="deeplab", backbone="resnet50", norm_act="iabn_sync_test", folder=tmp_path
        )


def nvlabs_like():
    """NVlabs' file: our own names and a classifier."""
    torch.manual_seed(2)
    state = SegFormer(CONFIG).body.state_dict()
    return state | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


def test_nvlabs_file(tmp_path):
    state = nvlabs_like()
    nvlabs = ("patch_embed1.proj.weight", "block2.1.attn.kv.bias", "block1.0.mlp.dwconv.dwconv.weight")
    assert all(key in state for key in nvlabs)
    torch.save(state, tmp_path / "mit_b0.pth")
    network = SegFormer(CONFIG)
    report = load_default_pretrained(
        network, model="segformer_b0", backbone="resnet101", norm_act="iabn_sync", folder=tmp_path
    )
    assert_same(network.body, state)
    assert report.missing == []
    assert report.left_over == ["head.weight", "head.bias"]


@pytest.mark.parametrize("form", ["hub safetensors", "hub bin", "in memory"])
def test_hub_file(form, tmp_path):
    """The names of the hub's files and those that transformers has in memory."""
    torch.manual_seed(3)
    theirs = SegformerForImageClassification(
        SegformerConfig(depths=CONFIG.depths, hidden_sizes=CONFIG.widths, attn_implementation="eager")
    ).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if form == "hub bin":
        from safetensors.torch import load_file

        state = load_file(path)
        assert "segformer.encoder.block.1.1.attention.self.key.weight" in state
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path)
    elif form == "in memory":
        path = tmp_path / "own.pth"
        torch.save(theirs.state_dict(), path)
    network = SegFormer(CONFIG).eval()
    report = load_pretrained(network, path=path)
    assert report.missing == []
    assert report.left_over == ["classifier.bias", "classifier.weight"] or report.left_over == [
        "classifier.weight",
        "classifier.bias",
    ]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.segformer(images).last_hidden_state
        found = network(images, frozenset({"body"}))[1]["body"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("segformer.encoder.patch_embeddings.2.layer_norm.bias", "patch_embed3.norm.bias"),
        ("segformer.encoder.block.3.12.layer_norm_1.weight", "block4.12.norm1.weight"),
        ("segformer.encoder.block.0.1.attention.self.layer_norm.weight", "block1.1.attn.norm.weight"),
        ("segformer.encoder.layer_norm.3.weight", "norm4.weight"),
        ("module.mod4.block23.convs.bn2.running_var", "layer3.22.bn2.running_var"),
        ("module.mod2.block1.proj_bn.weight", "layer1.0.downsample.1.weight"),
        ("layer1.0.downsample.1.weight", "layer1.0.downsample.1.weight"),
        ("features.18.1.running_mean", "features.18.1.running_mean"),
        ("block3.17.attn.kv.weight", "block3.17.attn.kv.weight"),
    ],
)
def test_rename(theirs, ours):
    assert rename(theirs) == ours


def test_safetensors_of_torchvision(resnet, resnet_state, tmp_path):
    save_file(resnet_state, tmp_path / "r.safetensors")
    load_pretrained(resnet, path=tmp_path / "r.safetensors")
    assert_same(resnet.body, resnet_state)


@pytest.mark.skipif(not MOBILENET.is_file(), reason=f"no {MOBILENET}")
def test_shared_mobilenet(mobilenet):
    report = load_pretrained(mobilenet, path=MOBILENET)
    assert_same(mobilenet.body, torch.load(MOBILENET, weights_only=True))
    assert report.missing == []
    assert report.left_over == ["classifier.1.weight", "classifier.1.bias"]


def test_missing_is_said(resnet, resnet_state, tmp_path):
    part = {key: value for key, value in resnet_state.items() if not key.startswith("layer4.")}
    torch.save(part, tmp_path / "part.pth")
    report = load_pretrained(resnet, path=tmp_path / "part.pth")
    assert len(report.missing) == sum(
        key.startswith("layer4.") and not key.endswith("num_batches_tracked") for key in resnet_state
    )
    assert "missing (" not in report.summary() and " (layer4.0.conv1.weight" in report.summary()


def test_fits_nothing(mobilenet, resnet_state, tmp_path):
    torch.save(resnet_state, tmp_path / "resnet50.pth")
    before = mobilenet.body.features[0][0].weight.clone()
    with pytest.raises(UserError, match="has no weights of this network"):
        load_pretrained(mobilenet, path=tmp_path / "resnet50.pth")
    assert torch.equal(mobilenet.body.features[0][0].weight, before)


def test_other_size(tmp_path):
    torch.save(nvlabs_like(), tmp_path / "mit_b0.pth")
    network = SegFormer(MiTConfig((1, 2, 1, 1)))
    with pytest.raises(UserError, match=r"for another network, \S+ is 16×3×7×7 and not 64×3×7×7"):
        load_pretrained(network, path=tmp_path / "mit_b0.pth")


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_hostile_pickle_is_refused(writer, resnet, tmp_path):
    target, path = tmp_path / "owned", tmp_path / "weights.pth"
    content = {"state_dict": Hostile(str(target))}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="refused") as caught:
        load_pretrained(resnet, path=path)
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pth.tar", ".bin"])
@pytest.mark.parametrize("seed", range(6))
def test_broken_files(seed, suffix, resnet, resnet_state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if seed == 0:
        path.write_bytes(b"")
    elif seed == 1:
        path.write_text("<html>404 not found</html>")
    elif seed == 2:
        torch.save(resnet_state, path)
        path.write_bytes(path.read_bytes()[:10_000])
    else:
        generator = torch.Generator().manual_seed(seed)
        path.write_bytes(bytes(torch.randint(0, 256, (500,), generator=generator).tolist()))
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        load_pretrained(resnet, path=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, [torch.zeros(3)], torch.zeros(3), {"state_dict": {"epoch": 3}}])
def test_no_named_tensors(content, resnet, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="contains no named tensors"):
        load_pretrained(resnet, path=tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_absent_file(name, resnet, tmp_path):
    with pytest.raises(UserError, match=r"no such file.*--pretrained_path.*--no_pretrained"):
        load_pretrained(resnet, path=tmp_path / name)


def test_no_network_for_torchvision(resnet, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(UserError, match=r"cannot be downloaded.*--pretrained_path"):
        load_default_pretrained(resnet, model="deeplab", backbone="resnet50", norm_act="std")


def test_torchvision_checksum(resnet, monkeypatch, tmp_path):
    """torchvision's file names carry the digest that the download is compared with."""

    class Response:
        def __init__(self):
            self.chunks = [b"not the weights", b""]

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def info(self):
            import email.message

            return email.message.Message()

        def read(self, size):
            return self.chunks.pop(0)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *args, **kwargs: Response())
    with pytest.raises(UserError, match="wrong checksum"):
        load_pretrained(resnet, name="ResNet50_Weights.IMAGENET1K_V1")
    assert not list(tmp_path.rglob("*.pth"))


def test_unknown_torchvision_name(resnet):
    with pytest.raises(UserError, match="no such weights"):
        load_pretrained(resnet, name="ResNet50_Weights.IMAGENET22K")


def test_no_network_for_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    network = build_network(NetworkSpec("segformer_b0"))
    with pytest.raises(UserError, match=r"co/nvidia/mit-b0: cannot be downloaded.*--pretrained_path"):
        load_default_pretrained(
            network, model="segformer_b0", backbone="resnet101", norm_act="std", folder=tmp_path
        )


@pytest.mark.parametrize("intact", [True, False])
def test_hub_cache(intact, monkeypatch, tmp_path):
    """A file in the hub's cache is used, and refused when it is not what its name says."""
    import hashlib

    torch.save(nvlabs_like(), tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest() if intact else "0" * 64
    repository = tmp_path / "models--nvidia--mit-b0"
    commit = "1" * 40
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (tmp_path / "weights").rename(repository / "blobs" / digest)
    (repository / "snapshots" / commit / "pytorch_model.bin").symlink_to(repository / "blobs" / digest)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    network = SegFormer(CONFIG)
    if intact:
        assert load_pretrained(network, hub="nvidia/mit-b0").missing == []
    else:
        with pytest.raises(UserError, match="wrong checksum"):
            load_pretrained(network, hub="nvidia/mit-b0")


def test_one_source(resnet, tmp_path):
    with pytest.raises(TypeError, match="exactly one"):
        load_pretrained(resnet)
    with pytest.raises(TypeError, match="exactly one"):
        load_pretrained(resnet, path=tmp_path, hub="x/y")
