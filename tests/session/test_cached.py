"""What is computed over a step's training set is taken again only where all that went into it is the same."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import SMALL_BACKBONE
from torch import nn

from argparser import parse_options
from dataset.incremental import Entry, IncrementalDataset, SampleKey
from dataset.shapes import open_shapes
from dataset.transforms import eval_transform, train_transform
from run import main
from runs.folder import RunFolder
from session.cached import Cache, weights_digest
from session.training import StepTraining
from utils.distributed import World
from utils.errors import UserError
from utils.signals import Stopped

SMALL = (
    f"--dataset shapes --task 15-5 --overlap --backbone {SMALL_BACKBONE} --no_pretrained --crop_size 64 "
    "--pooling 0 --batch_size 4 --num_workers 0 --no_tensorboard --where_to_sim CPU --epochs 1 --lr 0.01 "
    "--method PLOP"
)


@pytest.fixture(scope="module")
def data(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(shapes_root, tmp_path_factory.mktemp("own") / "shapes"))


@pytest.fixture(scope="module")
def logs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after step 0."""
    torch.set_num_threads(1)
    logs = tmp_path_factory.mktemp("logs")
    assert main(shlex.split(f"{SMALL} --data_root {data} --logdir {logs} --step 0")) == 0
    return logs


@pytest.fixture
def takes(
    data: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], bool]:
    """``takes(options)``: start step 1 over; whether it takes the thresholds of an earlier start."""

    def caught(self: StepTraining) -> None:
        raise Stopped("enough")

    monkeypatch.setattr(StepTraining, "train", caught)

    def begin(options: str) -> bool:
        common = f"{SMALL} --data_root {data} --logdir {logs} --step 1 --fresh"
        assert main(shlex.split(f"{common} {options}")) == 75
        return "pseudo_label_thresholds: loaded from" in capsys.readouterr().out

    return begin


OTHERWISE = [
    *("--data_masking current+old --cross_val", "--data_masking new", "--cross_val", "--test_on_val"),
    *("--crop_size 96", "--random_seed 7", "--batch_size 8", "--void_label background", "--output_stride 8"),
    *("--opt_level O1", "--memory 5", "--fidelity released", "--threshold 0.5", "--skip_corrupt 1"),
]


def test_what_changes_images_labels_or_the_teachers_outputs_is_computed_anew(
    takes: Callable[[str], bool], logs: Path
) -> None:
    takes("")
    stored = logs / "15-5-shapes_Experiment" / "pseudo_label_thresholds_1.pth"
    files = (stored, stored.with_suffix(".json"))
    before = {file: file.read_bytes() for file in files}
    assert takes("--print_interval 3 --val_interval 2 --test_flip"), "shown and evaluated otherwise"
    for options in OTHERWISE:
        assert not takes(options), options
        for file, content in before.items():
            file.write_bytes(content)
    assert takes("")


def test_other_images_are_computed_anew(takes: Callable[[str], bool], data: Path, tmp_path: Path) -> None:
    for step, images in enumerate((range(40), range(20, 48))):
        np.save(tmp_path / f"train-{step}.npy", np.array(images))
    takes("")
    assert not takes(f"--splits_dir {tmp_path}")
    np.save(tmp_path / "train-1.npy", np.arange(19, 47))
    assert not takes(f"--splits_dir {tmp_path}"), "another list of the same length under the same name"
    # Another picture under the same name.
    image = sorted((data / "JPEGImages").iterdir())[30]
    other = sorted((data / "JPEGImages").iterdir())[31]
    assert takes(f"--splits_dir {tmp_path}")
    shutil.copyfile(other, image)
    assert not takes(f"--splits_dir {tmp_path}")


def test_what_is_drawn_while_computing_does_not_shift_the_random_numbers(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint loads the values and must draw as it would have."""
    opts, world = parse_options(["--logdir", str(tmp_path)]), World(0, 0, 1, torch.device("cpu"), None)
    cache = Cache(RunFolder(opts, world), world, 0, dict)
    (tmp_path / "19-1-voc_Experiment").mkdir()
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        values = cache("centres", {}, lambda: {"a": torch.rand(3)})
        drawn.append((values["a"], torch.rand(2)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_what_is_no_dict_of_tensors_is_refused(tmp_path: Path) -> None:
    opts, world = parse_options(["--logdir", str(tmp_path)]), World(0, 0, 1, torch.device("cpu"), None)
    cached = Cache(RunFolder(opts, world), world, 0, dict)
    with pytest.raises(UserError, match=r"context.cached\('x', ...\): compute returned a tensor of shape"):
        cached("x", {}, lambda: torch.ones(2))  # type: ignore[arg-type,return-value]


def test_a_digest_of_weights_sees_what_sums_do_not() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        second.weight.copy_(torch.tensor([[4.0, 3.0], [2.0, 1.0]]))
        second.bias.copy_(first.bias)
    assert first.weight.sum() == second.weight.sum()
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    assert weights_digest(first) != weights_digest(second.to(torch.bfloat16))


def test_a_digest_of_samples_is_that_of_their_files_labels_and_crops(data: Path) -> None:
    shapes = open_shapes(data, "train")
    tables = [torch.arange(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)]
    entries = [Entry(3), Entry(1), Entry(2, 1)]

    def made(**changes: object) -> IncrementalDataset:
        given = {
            "entries": entries,
            "lookups": tables,
            "transform": train_transform(64),
            "seed": 1,
            **changes,
        }
        return IncrementalDataset(shapes, **given)  # type: ignore[arg-type]

    digest = made().digest()
    assert made().digest() == digest
    for changes in (
        {"entries": entries[:2]},
        {"entries": [Entry(3), Entry(1), Entry(2)]},
        {"entries": [Entry(1), Entry(3), Entry(2, 1)]},
        {"lookups": [tables[0], tables[0]]},
        {"transform": train_transform(96)},
        {"transform": eval_transform(64)},
        {"transform": eval_transform(None)},
        {"seed": 2},
        {"skip_corrupt": 1},
        {"saliency": shapes.masks},
    ):
        assert made(**changes).digest() != digest, changes
    assert len(made()[SampleKey(0)]) == 2  # type: ignore[arg-type]
    path = shapes.masks[1]
    os.utime(path, ns=(0, 1))
    assert made().digest() != digest
