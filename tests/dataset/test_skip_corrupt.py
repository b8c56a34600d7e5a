"""``--skip_corrupt``: substitutes of unreadable images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dataset.incremental import Entry, IncrementalDataset, SampleKey, Substitute
from dataset.loaders import Tolerance, Workers, make_eval_loader, make_train_loader
from dataset.shapes import open_shapes
from dataset.transforms import eval_transform, train_transform
from utils.errors import DataError
from utils.labels import VOID


def spoilt(
    shapes_root: Path, tmp_path: Path, *broken: int, void: bool = False, skip: int = 2
) -> IncrementalDataset:
    root = tmp_path / "shapes"
    shutil.copytree(shapes_root, root)
    data = open_shapes(root, "train")
    for index in broken:
        data.images[index].write_bytes(b"nothing")
    table = torch.arange(256, dtype=torch.uint8)
    return IncrementalDataset(
        data,
        [Entry(i) for i in range(8)],
        [table],
        eval_transform(64) if void else train_transform(64),
        skip_corrupt=skip,
        void_instead=void,
    )


def test_the_next_readable_image_stands_in(shapes_root: Path, tmp_path: Path) -> None:
    samples = spoilt(shapes_root, tmp_path, 3, 4)
    key = SampleKey(3, epoch=1, position=9)
    found = samples[key]
    assert isinstance(found, Substitute)
    assert len(found.reasons) == 2
    expected = samples[SampleKey(5, epoch=1, position=9)]  # with the draws of the place that it fills
    assert all(torch.equal(a, b) for a, b in zip(found.sample, expected, strict=True))


def test_an_evaluation_counts_nothing_of_it(shapes_root: Path, tmp_path: Path) -> None:
    samples = spoilt(shapes_root, tmp_path, 7, void=True)
    tolerance = Tolerance(2)
    with Workers([samples], tolerance=tolerance) as workers:
        batches = list(make_eval_loader(samples, 4, workers))
    assert [len(images) for images, _ in batches] == [4, 4]
    assert (batches[1][1][3] == VOID).all()
    assert not (batches[1][1][2] == VOID).all()
    assert len(tolerance.reasons) == 1


def test_too_many_are_an_error(shapes_root: Path, tmp_path: Path) -> None:
    samples = spoilt(shapes_root, tmp_path, 1, 4, skip=1)
    with pytest.raises(DataError, match="one more than the 1 of --skip_corrupt"):
        list(make_train_loader(samples, 2, Workers([samples], num_workers=0, tolerance=Tolerance(1))))


def test_an_image_met_again_counts_once() -> None:
    tolerance = Tolerance(1, ["a.jpg: broken"])
    tolerance.note(["a.jpg: broken", "a.jpg: broken"])
    with pytest.raises(DataError, match=r"b\.jpg"):
        tolerance.note(["b.jpg: broken"])
