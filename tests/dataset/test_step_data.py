"""The images and labels of a step, from options to samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import make_ade, make_own

from argparser import Options, parse_options
from dataset import step_data as module
from dataset.exemplars import Exemplar
from dataset.step_data import DataSpec, StepData, candidate_images, evaluation_data, step_data
from dataset.transforms import ScaleCropFlip, whole_image
from methods import build_methods
from methods.base import Batch
from methods.ssul import UnknownClass
from utils.errors import DataError, UserError

NAMES = ["background", *(f"class {i}" for i in range(1, 13))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    root = make_own(tmp_path / "own")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def options(dataset: str, root: Path, *words: str) -> Options:
    return parse_options(["--dataset", dataset, "--data_root", str(root), "--crop_size", "64", *words])


def data_of(opts: Options, step: int) -> StepData:
    path = opts.data_root.parent / f"exemplars_{step}.json"
    extras = frozenset[str]().union(*(method.extras for method in build_methods(opts, step).values()))
    return step_data(DataSpec.of(opts), step, extras=extras, exemplar_list=path, is_main=True)


def test_other_of_ade_is_background_in_training_and_ignored_at_evaluation(tmp_path: Path) -> None:
    opts = options("ade", make_ade(tmp_path / "ade"), "--task", "100-50", "--step", "0", "1")
    for step, classes in ((0, 101), (1, 151)):
        data = data_of(opts, step)
        assert data.ignored == {0} and len(data.class_names) == classes
        assert len(data.train) == 12
        for i in range(len(data.train)):
            _, target = data.train[i]
            assert int(target.min()) == 0 and int(target.max()) < classes, "no pixel is ignored"
        for i in range(len(data.test)):
            mask = data.test.dataset.read_mask(i)[0]
            _, target = data.test[i]
            assert ((target == 255) == ((mask == 0) | (mask >= classes))).all()
            assert (target[target != 255] == mask[target != 255]).all()


def test_class_order_decides_labels_and_lists(own: Path, tmp_path: Path) -> None:
    """Outputs follow the order of the file; background stays 0."""
    order = tmp_path / "order.txt"
    order.write_text("\n".join(reversed(NAMES[1:])))
    opts = options("folder", own, "--task", "10-2", "--overlap", "--class_order", str(order))
    assert opts.task_.steps == ((0, *range(12, 2, -1)), (2, 1))
    data = data_of(opts, 1)
    assert data.class_names == ["background", *reversed(NAMES[1:])]
    for place, entry in enumerate(data.train.entries):
        mask = data.train.dataset.read_mask(entry.index)
        assert {1, 2} & set(mask.unique().tolist())
        assert set(data.train[place][1].unique().tolist()) <= {0, 11, 12}


def test_exemplars_keep_the_labels_of_their_time(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    opts = options("folder", own, "--task", "4-4", "--overlap", "--memory", "6", "--void_label", "ignore")
    with caplog.at_level(logging.INFO):
        data = data_of(opts, 2)
    assert data.num_memory == 6 and "6 exemplars: class 1 " in caplog.text
    pairs = json.loads((own.parent / "exemplars_2.json").read_text())["exemplars"]
    stored = data.train.entries[-6:]
    assert [[entry.index, entry.lookup - 1] for entry in stored] == pairs
    for place, (index, step) in zip(range(len(data.train) - 6, len(data.train)), pairs, strict=True):
        known = set(range(1 + 4 * (1 + step)))
        mask = data.train.dataset.read_mask(index)
        assert set(data.train[place][1].unique().tolist()) <= known & ({0} | set(mask.unique().tolist()))


@pytest.mark.parametrize("saliency", [False, True])
def test_labels_of_ssuls_released_program(own: Path, saliency: bool) -> None:
    """Its own indices are unknown 0, background 1, classes from 2; exemplars' labels are not shifted to them.

    They show every class up to this step's. From files to what the loss is given, against the masks.
    """
    words = ("--task", "4-4", "--overlap", "--method", "SSUL-M", "--memory", "6", "--fidelity", "released")
    opts = options("folder", own, *words)
    if saliency:
        (own / "images" / "saliency_map").mkdir()
        for image in (own / "images" / "train").iterdir():
            half = np.zeros((64, 64), np.uint8)
            half[:, :32] = 255
            Image.fromarray(half).save(own / "images" / "saliency_map" / f"{image.stem}.png")
    step = 2
    data = data_of(opts, step)
    crop = data.train.transform
    assert isinstance(crop, ScaleCropFlip) and crop.released
    data.train.transform = whole_image
    method = UnknownClass.from_options(opts)
    old, new, unknown = 9, 4, 13
    assert method is not None and data.num_memory == 6
    of_this_step = 0
    for place, entry in enumerate(data.train.entries):
        image, target, extras = data.train[place]
        exemplar = place >= len(data.train) - 6
        assert bool(extras["exemplar"]) == exemplar
        batch = Batch(
            *(image[None], target[None].long(), target[None].long(), step, old, new, torch.empty(0), {}),
            extras={name: extra[None] for name, extra in extras.items()},
        )
        method.relabel(batch)
        found = batch.targets[0]
        theirs = torch.where(found == unknown, 0, found + 1)
        mask = data.train.dataset.read_mask(entry.index)[0].long()
        if exemplar:
            # Classes are in the data set's order here, all of 0 to 12 seen.
            expected = mask
            of_this_step += int((mask > 8).any())
        else:
            expected = torch.where(mask > 8, mask + 1, 1)
            salient = torch.zeros_like(mask, dtype=torch.bool)
            salient[:, : 32 if saliency else None] = True
            expected = torch.where((expected == 1) & salient, 0, expected)
        assert torch.equal(theirs, expected)
    assert of_this_step, "no exemplar shows a class of this step: the case is empty"


def test_exemplars_chosen_elsewhere_and_labels_of_new_classes_only(own: Path) -> None:
    words = (
        "--task",
        "4-4",
        "--overlap",
        "--memory",
        "6",
        "--memory_labels",
        "new",
        "--void_label",
        "ignore",
    )
    spec = DataSpec.of(options("folder", own, *words))
    chosen = [Exemplar(3, 0, (1,)), Exemplar(7, 1, (5, 6))]
    data = step_data(spec, 2, exemplar_list=own / "none.json", chosen=chosen, is_main=True)
    data.train.transform = whole_image
    assert data.num_memory == 2 and not (own / "none.json").exists()
    for place, exemplar in zip((-2, -1), chosen, strict=True):
        entry = data.train.entries[place]
        assert entry.index == exemplar.index
        mask = data.train.dataset.read_mask(entry.index)[0]
        target = data.train[len(data.train) + place][1]
        shown = torch.where((mask > 8) | (mask == 255), mask, 0)  # classes are in the data set's order
        assert torch.equal(target, shown)


def test_candidates_are_whole_images_or_the_released_crops(own: Path) -> None:
    words = ("--task", "4-4", "--overlap", "--crop_size", "32")
    for fidelity, size in (("paper", (64, 64)), ("released", (32, 32))):
        spec = DataSpec.of(options("folder", own, *words, "--fidelity", fidelity))
        images = candidate_images(spec, 1, is_main=True)
        trained = step_data(spec, 1, exemplar_list=own / "none.json", is_main=True).train
        assert [entry.index for entry in images.entries] == [entry.index for entry in trained.entries]
        for place in range(len(images)):
            target = images[place][1]
            assert target.shape == size
            assert set(target.unique().tolist()) <= {0, 5, 6, 7, 8, 255}, "the classes of that step"


def test_exemplar_list_is_kept_until_something_changes(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("--task", "4-4", "--overlap", "--memory", "6")
    path = own.parent / "exemplars_1.json"
    caplog.set_level(logging.INFO)

    def log_of(*changed: str) -> str:
        caplog.clear()
        data_of(options("folder", own, *words, *changed), 1)
        return caplog.text

    assert "loaded from" not in log_of()
    assert "loaded from" in log_of()
    assert "was made from another seed; it is made again" in log_of("--random_seed", "7")
    assert "loaded from" in log_of("--random_seed", "7")
    path.write_text(path.read_text()[:-5])
    assert "is damaged; it is made again" in log_of("--random_seed", "7")
    # Image 0 shows 1 and 4, which step 0 brings: it stays in the list with other classes.
    Image.fromarray(np.full((64, 64), 2, np.uint8)).save(own / "masks/train/train_00000000.png")
    assert "was made from another presence; it is made again" in log_of("--random_seed", "7")


def test_no_exemplar_is_validated_on(own: Path) -> None:
    opts = options("folder", own, "--task", "8-4", "--overlap", "--memory", "26", "--cross_val")
    data = data_of(opts, 1)
    validated = {entry.index for entry in data.val.entries}
    assert validated and 0 < data.num_memory < 26
    assert not validated & {entry.index for entry in data.train.entries}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--task", "6-6"],
            "every image with its classes also shows one of a later step, which disjoint leaves",
        ),
        (["--task", "6-6", "--overlap", "--cross_val"], "--cross_val keeps all of them back"),
        (
            ["--task", "1-11", "--overlap"],
            "no training mask shows 1 class 1; correct the masks or the task",
        ),
    ],
)
def test_a_step_without_images_says_why(own: Path, words: list[str], reason: str) -> None:
    classes = [[2, 7], [8, 9], [8, 10]]
    for i, path in enumerate(sorted((own / "masks" / "train").iterdir())):
        Image.fromarray(
            np.array([classes[i]] * 64 if i < 3 else [[0, 255]] * 64, np.uint8).repeat(32, 1)
        ).save(path)
    with pytest.raises(UserError, match=rf"^step 0 of task \S+ \(\w+\) has no training image: {reason}"):
        data_of(options("folder", own, *words), 0)


def test_a_mask_with_an_unknown_class_is_named_before_training(own: Path) -> None:
    Image.fromarray(np.full((64, 64), 13, np.uint8)).save(own / "masks/train/train_00000003.png")
    with pytest.raises(DataError, match=r"train_00000003\.png: unknown class id\(s\) 13; expected 0 to 12"):
        data_of(options("folder", own, "--task", "8-4"), 0)


def test_own_lists(own: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "train-0.npy", np.array([5, 2, 9]))
    data = data_of(options("folder", own, "--task", "8-4", "--splits_dir", str(tmp_path)), 0)
    assert [entry.index for entry in data.train.entries] == [5, 2, 9]


def test_final_evaluation_on_training_images(own: Path) -> None:
    assert len(evaluation_data(DataSpec.of(options("folder", own, "--task", "8-4")), 0).test) == 6
    assert (
        len(
            evaluation_data(DataSpec.of(options("folder", own, "--task", "8-4", "--val_on_trainset")), 0).test
        )
        == 26
    )
    opts = options("folder", own, "--task", "8-4", "--overlap", "--test_on_val")
    held_out = {entry.index for entry in evaluation_data(DataSpec.of(opts), 0).test.entries}
    assert len(held_out) == 6
    assert not held_out & {entry.index for step in (0, 1) for entry in data_of(opts, step).train.entries}


def test_released_programs_but_ssuls_leave_out_images_without_a_seen_class(own: Path) -> None:
    """Image i of 6 shows the classes 2i + 1 and 2i + 2; step 0 of 8-4 knows 8 classes."""

    def tested(step: int, *words: str) -> list[int]:
        opts = options("folder", own, "--task", "8-4", *words)
        return [entry.index for entry in evaluation_data(DataSpec.of(opts), step).test.entries]

    assert tested(0, "--fidelity", "released") == [0, 1, 2, 3]
    assert tested(1, "--fidelity", "released") == tested(0) == [0, 1, 2, 3, 4, 5]
    assert tested(0, "--fidelity", "released", "--method", "SSUL") == [0, 1, 2, 3, 4, 5]
