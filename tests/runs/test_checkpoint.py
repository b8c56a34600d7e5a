import hashlib
import json
import pickle
import random
import resource
import signal
import subprocess
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Fork, environments
from torch import nn

from methods.classifiers import UnknownClassifier
from modules import NetworkSpec
from runs.checkpoint import (
    FORMAT_VERSION,
    check_fits,
    load_checkpoint,
    make_manifest,
    model_state,
    save_checkpoint,
    with_current_names,
)
from tasks import Task
from utils.errors import UserError

ROOT = Path(__file__).parents[2]


TASK = Task("2-1", "shapes", ((0, 1, 2), (3,), (4,)))
SPEC = NetworkSpec(backbone="mobilenet_v2")
OPTIONS = {"lr": 0.1, "logdir": Path("logs"), "steps": (0, 1), "typed": frozenset({"b", "a"})}


def manifest(**changes):
    return make_manifest(task=TASK, step=1, spec=replace(SPEC, **changes), options=OPTIONS)


def content(seed=0, **changes):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / 10)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "scheduler_state": scheduler.state_dict(),
        "scaler_state": torch.amp.GradScaler("cpu", enabled=True).state_dict(),
        "epoch": 3,
        "best_score": 0.5,
        "method_state": {"prototypes": {"sum": torch.rand(3, 4, dtype=torch.float64)}, "kd": {}},
        "manifest": manifest(),
        **changes,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# ── names, round trip ────────────────────────────────────────────────────────────────────────────────


def test_round_trip_and_manifest(tmp_path):
    path = tmp_path / "run" / "a_1.pth"
    written = content()
    save_checkpoint(path, written)
    read = load_checkpoint(path)
    assert read.pop("format") == FORMAT_VERSION
    read.pop("save_id")
    assert same(written, read)
    beside = json.loads((tmp_path / "run" / "a_1.json").read_text())
    assert beside["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert beside["size"] == path.stat().st_size
    assert beside["manifest"] == written["manifest"] == read["manifest"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["a_1.json", "a_1.pth"]


def test_manifest_is_plain_and_names_the_code():
    made = manifest()
    assert made == json.loads(json.dumps(made))
    assert made["options"] == {"lr": 0.1, "logdir": "logs", "steps": [0, 1], "typed": ["a", "b"]}
    assert made["versions"]["torch"] == torch.__version__
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode == 0:
        assert made["git_commit"].removesuffix("-dirty") == git.stdout.strip()
    else:
        assert made["git_commit"] is None


def test_content_that_could_not_be_read_again_is_refused_at_once(tmp_path):
    path = tmp_path / "a.pth"
    for value in (np.float64(1), np.zeros(2), Path("x"), {1, 2}, object()):
        with pytest.raises(TypeError, match=r"cannot hold .* at content\['method_state'\]\['x'\]\[0\]"):
            save_checkpoint(path, content(method_state={"x": [value]}))
    assert not list(tmp_path.iterdir())


# ── atomicity ────────────────────────────────────────────────────────────────────────────────────────


SAVER = """
import sys, torch
from pathlib import Path
from runs.checkpoint import save_checkpoint
path, number = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    number += 1
    save_checkpoint(path, {"model_state": {"w": torch.full((500_000,), float(number))}, "epoch": number})
"""


def test_killed_at_any_moment_the_checkpoint_is_whole(tmp_path):
    path, program, ready = (tmp_path / name for name in ("a.pth", "saver.py", "ready"))
    program.write_text(SAVER)
    rng = random.Random(0)
    read_back = 0
    for _ in range(5):
        ready.unlink(missing_ok=True)
        saver = Fork([str(program), str(path)], environments()[0], ready)
        try:
            while not (ready.exists() and ready.stat().st_size and path.exists()) and saver.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
        finally:
            saver.kill()
            assert saver.wait() == -signal.SIGKILL
        read = load_checkpoint(path)
        assert (read["model_state"]["w"] == read["epoch"]).all()
        read_back += 1
    assert read_back == 5


def test_the_next_save_removes_what_killed_ones_left(tmp_path):
    for name in (".a.pth.17.tmp", ".a.json.17.tmp", ".b.pth.17.tmp"):
        (tmp_path / name).write_bytes(b"half")
    save_checkpoint(tmp_path / "a.pth", content())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.pth.17.tmp", "a.json", "a.pth"]


def test_kill_between_checkpoint_and_manifest(tmp_path, caplog):
    path = tmp_path / "a.pth"
    save_checkpoint(path, content(seed=1))
    old_manifest = (tmp_path / "a.json").read_bytes()
    save_checkpoint(path, content(seed=2))
    (tmp_path / "a.json").write_bytes(old_manifest)
    with caplog.at_level("INFO"):
        read = load_checkpoint(path)
    assert same(read["model_state"], content(seed=2)["model_state"])
    assert "another save" in caplog.text


@pytest.mark.parametrize("limit", [0, 100, 300_000, 800_000])
def test_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, limit):
    # A limit on the file's size stops the write in the middle as a full disk does.
    path = tmp_path / "a.pth"
    save_checkpoint(path, content())
    before = path.read_bytes()
    usual, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="File too large") as refused:
            save_checkpoint(path, {"model_state": {"w": torch.rand(200_000)}, "epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, hard))
    assert str(refused.value).startswith(f"{path}: cannot be written (File too large); free some space")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.pth"]
    load_checkpoint(path)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "file" / "a.pth", content())
    assert "--logdir" in one_line(caught)


# ── bad files ────────────────────────────────────────────────────────────────────────────────────────


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def make_bad_file(kind, path, target):
    save_checkpoint(path, content())
    good = path.read_bytes()
    if kind != "manifest kept":
        path.with_suffix(".json").unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind in ("flipped", "manifest kept"):
        # One bit of a weight: the archive's directory and the pickle stay good.
        weight = content()["model_state"]["0.weight"].numpy().tobytes()
        place = good.index(weight) + 40
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    elif kind == "hostile":
        torch.save({"model_state": {}, "x": Hostile(target)}, path)
    elif kind == "hostile plain pickle":
        path.write_bytes(pickle.dumps(Hostile(target), protocol=2))
    elif kind == "no dict":
        torch.save([torch.ones(1)], path)
    elif kind == "newer":
        torch.save({"format": FORMAT_VERSION + 1, "model_state": {"w": torch.ones(1)}}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "damaged, truncated"),
        ("cut", "damaged, truncated"),
        ("text", "damaged, truncated"),
        ("flipped", "checksum"),
        ("manifest kept", "checksum|sha256"),
        ("hostile", "holds more than weights .* save its tensors alone"),
        ("hostile plain pickle", "holds more than weights|damaged"),
        ("no dict", "holds list"),
        ("newer", "newer than this code's"),
    ],
)
def test_bad_files(tmp_path, kind, message):
    path, target = tmp_path / "a.pth", tmp_path / "ran"
    make_bad_file(kind, path, target)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert one_line(caught).startswith(str(path))
    assert not target.exists(), "the file's code was run"


def test_hostile_file_is_really_hostile(tmp_path):
    make_bad_file("hostile", tmp_path / "a.pth", tmp_path / "ran")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint") as caught:
        load_checkpoint(tmp_path / "a.pth")
    one_line(caught)
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_checkpoint(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '{"sha256": 3}'])
def test_unreadable_manifest_does_not_lose_the_checkpoint(tmp_path, text):
    path = tmp_path / "a.pth"
    save_checkpoint(path, content())
    path.with_suffix(".json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert load_checkpoint(path)["epoch"] == 3


@pytest.mark.parametrize("with_manifest", [True, False])
def test_damaged_bytes_give_an_error_or_the_right_content(tmp_path, with_manifest):
    path = tmp_path / "a.pth"
    save_checkpoint(path, content())
    good, whole = path.read_bytes(), load_checkpoint(path)
    if not with_manifest:
        path.with_suffix(".json").unlink()
    rng = random.Random(1)
    refused = 0
    for case in range(150):
        data = bytearray(good)
        if case % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 1, 4])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            read = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert same({**whole, "save_id": 0}, {**read, "save_id": 0})
    assert refused > 100


# ── released checkpoints ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("zipped", [True, False])
def test_released_checkpoint_with_numpy_score(tmp_path, zipped):
    path = tmp_path / "15-5-voc_MIB_0.pth"
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in content()["model_state"].items())
    released = {"epoch": 29, "model_state": state, "best_score": np.float64(0.75), "trainer_state": {}}
    torch.save(released, path, _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(path)
    assert read["best_score"] == 0.75
    assert same(model_state(read), dict(content()["model_state"]))


def test_score_pickled_by_numpy_1(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(
        {"model_state": {"w": torch.ones(1)}, "best_score": np.float64(0.75)},
        path,
        _use_new_zipfile_serialization=False,
    )
    data = path.read_bytes()
    name = b"numpy._core.multiarray" if b"numpy._core.multiarray" in data else b"numpy.core.multiarray"
    assert name in data
    path.write_bytes(data.replace(name, b"numpy.core.multiarray"))
    assert load_checkpoint(path)["best_score"] == 0.75


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("network.body.module.weight", "network.body.module.weight"),
        ("body.layer1.0.conv1.weight", "network.body.layer1.0.conv1.weight"),  # a released program's
    ],
)
def test_wrappers_are_taken_off(prefix, name, ours):
    weights = {name: torch.ones(1), "cls.0.bias": torch.zeros(1)}
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    for content in (wrapped, {"model_state": wrapped}, {"state_dict": wrapped}):
        assert model_state(content).keys() == {ours, "cls.0.bias"}


@pytest.mark.parametrize(
    "bad", [{}, {"model_state": {}}, {"model_state": 3}, {"model_state": {"w": 1.0}}, {"epoch": 3}]
)
def test_no_weights(bad):
    with pytest.raises(UserError, match="no 'model_state'"):
        model_state(bad)


# ── fitting ──────────────────────────────────────────────────────────────────────────────────────────


def fits(found, *, step=1, name="2-1", dataset="shapes", steps=TASK.steps, **spec):
    check_fits(
        found,
        path=Path("a_1.pth"),
        task=Task(name, dataset, steps),
        step=step,
        spec=replace(SPEC, **spec),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_act": "sync"},
        {"decoder": "segformer"},  # DeepLab has no decoder
        {"name": "2-2", "steps": ((0, 1, 2), (3,), (4, 5))},  # the same up to step 1
    ],
)
def test_fits(changes):
    fits(content(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "3-1", "steps": ((0, 1, 2, 3), (4,))}, "--task 2-1, not 3-1"),
        ({"steps": ((0, 2, 1), (3,), (4,))}, "another class order"),
        ({"dataset": "voc"}, "--dataset shapes, not voc"),
        ({"step": 0}, "step 1, not 0"),
        ({"model": "segformer_b0"}, "--model deeplab, not segformer_b0"),
        ({"backbone": "resnet50"}, "--backbone mobilenet_v2, not resnet50"),
        ({"norm_act": "iabn"}, "--norm_act std, not iabn"),
        ({"released_resnet": True}, "--fidelity paper, not released"),
        ({"dataset": "voc", "backbone": "resnet50"}, "--dataset.*; .*--backbone"),
    ],
)
def test_misfits(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        fits(content(), **changes)
    assert one_line(caught).startswith("a_1.pth: does not fit this run")


def test_decoder_matters_to_segformer():
    segformer = content(manifest=manifest(model="segformer_b0"))
    fits(segformer, model="segformer_b0", backbone="resnet101")
    with pytest.raises(UserError, match="--decoder sats, not segformer"):
        fits(segformer, model="segformer_b0", decoder="segformer")


def test_branches_matter_to_deeplab():
    with pytest.raises(UserError, match="network without --two_branches"):
        fits(content(), two_branches=True)
    with pytest.raises(UserError, match="network with --two_branches"):
        fits(content(manifest=manifest(two_branches=True)))


def test_head_matters_to_deeplab():
    with pytest.raises(UserError, match="--head mib, not aspp"):
        fits(content(), head="aspp")
    segformer = content(manifest=manifest(model="segformer_b0"))
    fits(segformer, model="segformer_b0", head="aspp")


def test_manifests_of_earlier_versions_fit():
    younger = ("head", "released_resnet", "classifier", "two_branches")
    older = {key: value for key, value in manifest().items() if key not in younger}
    fits(content(manifest=older))
    fits(content(manifest=older), classifier="unknown")  # the weights' names tell
    older["sdr_network"] = True
    fits(content(manifest=older), released_resnet=True)
    with pytest.raises(UserError, match="--fidelity released, not paper"):
        fits(content(manifest=older))


def test_former_names_of_weights():
    former = {
        "model_state": {"network.body.x": 1, "cls.0.3.bias": 2, "unknown.3.bias": 3},
        "optimizer_weights": ["cls.0.3.bias", "unknown.3.bias"],
        "method_state": {"EWC": {"fisher": {"unknown.3.bias": 4}}},
        "best": {"epoch": 0, "model_state": {"unknown.3.bias": 5}},
        "unreadable": ["unknown.png"],
    }
    assert with_current_names(former, SPEC) == former
    assert with_current_names(former, replace(SPEC, classifier=UnknownClassifier.name)) == {
        "model_state": {"network.body.x": 1, "cls.0.3.bias": 2, "cls.unknown.3.bias": 3},
        "optimizer_weights": ["cls.0.3.bias", "cls.unknown.3.bias"],
        "method_state": {"EWC": {"fisher": {"cls.unknown.3.bias": 4}}},
        "best": {"epoch": 0, "model_state": {"cls.unknown.3.bias": 5}},
        "unreadable": ["unknown.png"],
    }


def test_kind_of_classifier_matters():
    with pytest.raises(UserError, match="it has --classifier linear, not unknown"):
        fits(content(), classifier="unknown")
    own = {**manifest(), "classifier": "mine"}
    with pytest.raises(UserError, match="--classifier mine, which a --method_file brings, not linear"):
        fits(content(manifest=own))


def test_released_checkpoints_are_judged_by_their_classifiers():
    state = {f"module.cls.{i}.weight": torch.zeros(n, 8, 1, 1) for i, n in enumerate([3, 1])}
    fits({"model_state": state})
    with pytest.raises(UserError, match=r"3 \+ 1 classes, step 0 has 3"):
        fits({"model_state": state}, step=0)
    fits({"model_state": {"w": torch.ones(1)}})


@pytest.mark.parametrize("bad", [3, "x", [], {}, {"steps": 3, "step": "1", "dataset": None}])
def test_strange_manifests_are_misfits(bad):
    with pytest.raises(UserError, match="does not fit") as caught:
        fits(content(manifest=bad))
    one_line(caught)
