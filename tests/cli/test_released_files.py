"""Files as the released programs write them, through the real command: the outputs are those networks'."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from released_networks import NETWORKS, centre, checkpoint, draw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as T

from dataset import open_dataset
from run import main
from tasks import get_task
from utils.labels import VOID

PARTS = (".body.", ".head.", ".cls.")  # groups of the released optimisers
# A program for each network.
FAMILIES = ["PLOP", "SDR_net_pytorch", "SATS", "SSUL", "DKD", "STAR", "RCIL"]


def draw_image(path: Path) -> Path:
    """Coloured tiles, so that the features differ from place to place."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(colours.repeat(32, axis=0).repeat(32, axis=1)).save(path)
    return path


def pixels(path: Path) -> Tensor:
    """An image as the released programs normalise it, 1×3×H×W."""
    with Image.open(path) as image:
        return T.normalize(T.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]


def run(path: Path, words: str, *more: str | Path) -> int:
    return main([*shlex.split(f"--dataset shapes --task 15-5 {words}"), "--ckpt", str(path), *map(str, more)])


def first_step(program: str) -> dict[str, Tensor]:
    """Weights of step 0 of a smaller network, ResNet-50."""
    later = re.compile(r"cls\.1\.|layer3\.(?!\d\.)|layer3\.[6-9]\.")
    return {name: weight for name, weight in draw(program).items() if not later.search(name)}


def go_on(path: Path, words: str, data: Path, tmp_path: Path) -> dict[str, Any]:
    """Train the next step for an epoch, from a checkpoint of ``first_step``, which shows its backbone."""
    options = f"--dataset shapes --task 15-5 --overlap --step 1 {words} --epochs 1"
    folders = ("--data_root", data, "--logdir", tmp_path, "--step_ckpt", path)
    small = ("--crop_size", "32", "--batch_size", "4")
    assert main([*shlex.split(options), *small, *map(str, folders)]) == 0
    saved = tmp_path / "15-5-shapes_Experiment" / "15-5-shapes_Experiment_1.pth"
    return dict(torch.load(saved, weights_only=True))


@pytest.mark.parametrize("program", FAMILIES)
def test_predictions(program: str, tmp_path: Path) -> None:
    """With no option of the network typed: the names and sizes of the weights show all of them."""
    _, logits, decide = NETWORKS[program]
    state, path, image = draw(program), tmp_path / "released.pth", draw_image(tmp_path / "image.png")
    x = pixels(image)
    with torch.inference_mode():
        centre(state, logits(state, x))
        scores = decide(F.interpolate(logits(state, x), size=x.shape[2:], mode="bilinear"))[0]
    torch.save(checkpoint(program, state), path)
    common = ("--predict", image, "--out", tmp_path / "out", "--raw")
    assert run(path, "--step 1", *common) == 0
    (mask,) = (tmp_path / "out" / "predictions").iterdir()
    ids = torch.tensor(get_task("shapes", "15-5").seen_classes(1))
    best, second = scores.topk(2, dim=0).values
    clear = best - second > 1e-4 * scores.abs().max()  # ties within rounding may fall otherwise
    found = torch.from_numpy(np.array(Image.open(mask))).long()
    assert clear.float().mean() > 0.9 and len(found.unique()) > 1
    assert torch.equal(found[clear], ids[scores.argmax(dim=0)][clear])


def test_evaluation(tiny_data: Path, tmp_path: Path) -> None:
    """``--test`` finds what the released network predicts."""
    _, logits, _ = NETWORKS["SATS"]
    state, path = draw("SATS"), tmp_path / "released.pth"
    task = get_task("shapes", "15-5")
    images = open_dataset("shapes", tiny_data, "val")
    x = torch.cat([pixels(image) for image in images.images])
    with torch.inference_mode():
        centre(state, logits(state, x))
        found = F.interpolate(logits(state, x), size=x.shape[2:], mode="bilinear").argmax(dim=1)
    truth = torch.stack([torch.from_numpy(np.array(Image.open(mask))).long() for mask in images.masks])
    torch.save(checkpoint("SATS", state), path)
    folders = ("--data_root", tiny_data, "--logdir", tmp_path)
    assert run(path, "--step 1 --whole_val --test", *folders) == 0
    results = json.loads((tmp_path / "15-5-shapes_Experiment" / "results_1.json").read_text(encoding="utf-8"))
    ids, seen = torch.tensor(task.seen_classes(1)), truth < VOID
    for class_id, iou in zip(ids, results["class_iou"].values(), strict=True):
        ours, theirs = ids[found] == class_id, truth == class_id
        union = int((seen & (ours | theirs)).sum())
        assert iou == pytest.approx(int((ours & theirs).sum()) / union if union else iou, abs=1e-3)


def test_the_next_step(tiny_data: Path, tmp_path: Path) -> None:
    """``--step_ckpt``: the teacher and the methods' states are the file's."""
    words, path = NETWORKS["SDR_net_pytorch"][0], tmp_path / "released.pth"
    prototypes = {"prototypes": torch.rand(16, 2048), "count_features": torch.arange(16.0)}
    torch.save({**checkpoint("SDR_net_pytorch", first_step("SDR_net_pytorch")), **prototypes}, path)
    saved = go_on(path, words, tiny_data, tmp_path)
    (kept,) = (entry for entry in saved["method_state"].values() if "prototypes" in entry)
    assert torch.equal(kept["count_features"][:16], prototypes["count_features"].long())
    assert (
        torch.equal(kept["prototypes"][:16], prototypes["prototypes"]) and kept["count_features"][16:].any()
    )


def test_a_run_keeps_its_norms_where_inplace_abn_comes_or_goes(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The norms of a released file that shows in-place ones, with no ``--norm_act`` typed."""
    path = tmp_path / "released.pth"
    torch.save(checkpoint("PLOP", first_step("PLOP")), path)
    find, package = importlib.util.find_spec, None

    def found(name: str, *more: str) -> object:
        return package if name == "inplace_abn" else find(name, *more)

    monkeypatch.setattr("importlib.util.find_spec", found)
    go_on(path, "--method FT", tiny_data, tmp_path)
    assert "norm_act=iabn_sync_test" in caplog.text
    (tmp_path / "15-5-shapes_Experiment" / "results_1.json").unlink()
    package = object()
    go_on(path, "--method FT", tiny_data, tmp_path)
    assert (tmp_path / "15-5-shapes_Experiment" / "results_1.json").is_file()
    assert "norm_act=iabn_sync_test" in caplog.text and "norm_act=iabn_sync," not in caplog.text


def test_statistics_beside_the_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    """STAR's statistics are in a file of their own, and go on to the next step."""
    words, path = NETWORKS["STAR"][0], tmp_path / "checkpoint-epoch60.pth"
    torch.save(checkpoint("STAR", first_step("STAR")), path)
    known = {
        "numbers": 1000 * torch.rand(16),
        "prototypes": F.normalize(torch.rand(15, 256)),
        "norm_mean_and_std": torch.rand(2, 15),
        "noise": torch.rand(15, 256),
    }
    torch.save(known, tmp_path / "prototypes-epoch60.pth")
    saved = go_on(path, words, tiny_data, tmp_path)
    (kept,) = (entry for entry in saved["method_state"].values() if "prototypes" in entry)
    assert torch.equal(kept["prototypes"][:15], known["prototypes"]) and len(kept["prototypes"]) == 20


def test_a_step_is_continued(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``--ckpt`` within the first step: its weights, and momentum that begins with zeros."""
    words, path = NETWORKS["SATS"][0], tmp_path / "released.pth"
    state = {name: weight for name, weight in draw("SATS").items() if "cls.1." not in name}
    parts = [[torch.nn.Parameter(weight) for name, weight in state.items() if p in name] for p in PARTS]
    optimizer = torch.optim.SGD([{"params": part} for part in parts], lr=0.01, momentum=0.9)
    released = {**checkpoint("SATS", state), "epoch": 0, "optimizer_state": optimizer.state_dict()}
    torch.save({**released, "best_score": np.float64(0.5)}, path)
    folders = ("--data_root", tiny_data, "--logdir", tmp_path)
    assert run(path, f"--step 0 {words} --no_pretrained --lr 1e-12 --epochs 2 --crop_size 32", *folders) == 0
    assert "step 0 resumes at epoch 1 of 2" in caplog.text
    saved = torch.load(
        tmp_path / "15-5-shapes_Experiment" / "15-5-shapes_Experiment_0.pth", weights_only=True
    )
    kept = saved["model_state"]["network.head.fuse.weight"]
    torch.testing.assert_close(kept, state["module.head.to_segmentation.weight"])


def test_a_file_without_its_epoch_cannot_be_continued(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "released.pth"
    torch.save(checkpoint("SSUL", draw("SSUL")), path)
    folders = ("--data_root", tiny_data, "--logdir", tmp_path)
    assert run(path, f"--step 1 {NETWORKS['SSUL'][0]}", *folders) == 2
    assert "does not say its epoch; give it to --step_ckpt, or --test" in capsys.readouterr().err
