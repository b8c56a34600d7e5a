"""Sample pictures of an evaluation, and one without images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from argparser import parse_options
from dataset.incremental import IncrementalDataset
from dataset.loaders import Tolerance
from dataset.step_data import EvaluationData
from runs.folder import RunFolder
from session.evaluation import Evaluation
from session.run import Run
from session.tensorboard import RunLogger
from train import Precision
from utils.distributed import World
from utils.palette import palette
from utils.signals import StopRequest
from utils.visualize import overlay

SIDE = 40


class Knows(nn.Module):
    """Predicts a given mask of network indices."""

    def __init__(self, mask: Tensor, classes: int) -> None:
        super().__init__()
        self.logits = nn.functional.one_hot(mask, classes).movedim(-1, 0)[None].float()

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.logits, {}


def test_classes_have_the_data_sets_colours_in_every_class_order(tmp_path: Path) -> None:
    # 19-1b learns class 5 last: its network index 20 is another class's id.
    opts = parse_options(["--task", "19-1b", "--logdir", str(tmp_path), "--sample_num", "1", "--visualize"])
    world = World(0, 0, 1, torch.device("cpu"), None)
    folder = RunFolder(opts, world)
    seen = opts.task_.seen_classes(1)
    truth = torch.zeros(SIDE, SIDE, dtype=torch.long)
    truth[:20], truth[20:30, :20] = seen.index(5), 255
    found = torch.full((SIDE, SIDE), seen.index(20))
    image = torch.full((3, SIDE, SIDE), 90, dtype=torch.uint8)
    names = [f"class {number}" for number in seen]
    data = cast(EvaluationData, SimpleNamespace(test=[(image, truth)], class_names=names))
    evaluation = Evaluation(Run(opts, world, folder, StopRequest(), Tolerance()))
    precision, writer = Precision(opts.opt_level, world.device), RunLogger(world, tmp_path, enabled=False)
    evaluation.images(1, data, (Knows(found, 21), None), precision, writer)

    ids = torch.where(truth == seen.index(5), 5, truth)
    for name, mask in (("truth", ids), ("step1", torch.full_like(ids, 20))):
        with Image.open(folder.path / "samples" / f"0_{name}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), overlay(image, mask))
    with Image.open(folder.path / "predictions_1.png") as picture:
        colours = {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    # The legend has both classes' colours undiluted, and not that of class 20's network index.
    shown = {number for number in range(1, 21) if tuple(palette()[number].tolist()) in colours}
    assert shown >= {5, 20} and seen.index(20) not in shown


def test_an_evaluation_without_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opts = parse_options(["--logdir", str(tmp_path), "--num_workers", "0"])
    world = World(0, 0, 1, torch.device("cpu"), None)
    evaluation = Evaluation(Run(opts, world, RunFolder(opts, world), StopRequest(), Tolerance()))
    network, none = Knows(torch.zeros(SIDE, SIDE, dtype=torch.long), 21), cast(IncrementalDataset, [])
    metrics = evaluation.run(network, none, 21, Precision(opts.opt_level, world.device))
    assert int(metrics.confusion_matrix.sum()) == 0
    assert "no image to evaluate on: the results are empty" in caplog.text
