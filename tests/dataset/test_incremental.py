from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset import open_dataset
from dataset.incremental import Entry, IncrementalDataset, SampleKey, eval_lookup, train_lookup
from dataset.transforms import eval_transform, train_transform
from tasks import Task, get_task
from utils.errors import DataError

TASK = get_task("voc", "15-5s_b")  # 0 12 9 20 7 15 8 14 16 5 19 4 1 13 2 11 | 17 | 3 | 6 | 18 | 10
VOID = 255


def values(table: torch.Tensor) -> dict[int, int]:
    """The ids that do not become background."""
    assert table.dtype == torch.uint8 and table.shape == (256,)
    return {i: v for i, v in enumerate(table.tolist()) if v}


def test_first_step() -> None:
    expected = {class_id: i for i, class_id in enumerate(TASK.steps[0]) if class_id} | {VOID: VOID}
    assert values(train_lookup(TASK, 0)) == expected


def test_later_step_sees_new_classes_only() -> None:
    assert values(train_lookup(TASK, 2)) == {3: 17, VOID: VOID}


def test_void_as_background() -> None:
    assert values(train_lookup(TASK, 2, void_label="background")) == {3: 17}


@pytest.mark.parametrize(
    "kwargs", [{"data_masking": "current+old"}, {"data_masking": "all"}, {"protocol": "sequential"}]
)
def test_old_labels_stay_visible(kwargs: dict[str, str]) -> None:
    expected = {class_id: i for i, class_id in enumerate(TASK.order[:18]) if class_id} | {VOID: VOID}
    assert values(train_lookup(TASK, 2, **kwargs)) == expected


def test_masking_new_hides_all_else() -> None:
    table = train_lookup(TASK, 2, data_masking="new")
    assert table[3] == 17
    assert (table[[i for i in range(256) if i != 3]] == VOID).all()
    assert train_lookup(TASK, 0, data_masking="new")[0] == 0  # background is a class of step 0
    sequential = train_lookup(TASK, 2, data_masking="new", protocol="sequential")
    assert torch.equal(sequential, train_lookup(TASK, 2, protocol="sequential"))


def test_faulty_arguments() -> None:
    with pytest.raises(ValueError, match="data_masking"):
        train_lookup(TASK, 2, data_masking="old")
    with pytest.raises(KeyError):
        train_lookup(TASK, 2, void_label="nothing")


def test_evaluation() -> None:
    seen = {class_id: i for i, class_id in enumerate(TASK.order[:18]) if class_id}
    future = TASK.future_classes(2)
    assert future == (6, 18, 10)
    ignored, background = eval_lookup(TASK, 2), eval_lookup(TASK, 2, unseen_label="background")
    for table in (ignored, background):
        assert {i: int(table[i]) for i in seen} == seen and table[0] == 0 and table[VOID] == VOID
    assert all(ignored[i] == VOID and background[i] == 0 for i in future)


def test_evaluation_without_other() -> None:
    ade = get_task("ade", "100-50")
    table = eval_lookup(ade, 1, ignore_ids=frozenset({0}))
    assert table[0] == VOID and table[1] == 1 and table[150] == 150
    assert train_lookup(ade, 0)[0] == 0


@given(
    order=st.permutations(range(1, 21)),
    cuts=st.sets(st.integers(1, 19), min_size=1, max_size=4),
    data=st.data(),
    masking=st.sampled_from(["current", "current+old", "all", "new"]),
    protocol=st.sampled_from(["sequential", "disjoint", "overlapped"]),
    void=st.sampled_from(["ignore", "background"]),
)
def test_no_index_that_the_network_lacks(
    order: list[int], cuts: set[int], data: st.DataObject, masking: str, protocol: str, void: str
) -> None:
    edges = [0, *sorted(cuts), 20]
    steps = [tuple(order[a:b]) for a, b in pairwise(edges)]
    task = Task("t", "voc", ((0, *steps[0]), *steps[1:]))
    step = data.draw(st.integers(0, len(steps) - 1))
    outputs = len(task.seen_classes(step))
    for table in (
        train_lookup(task, step, data_masking=masking, protocol=protocol, void_label=void),
        eval_lookup(task, step),
        eval_lookup(task, step, unseen_label="background"),
    ):
        assert ((table < outputs) | (table == VOID)).all()
    table = train_lookup(task, step, data_masking=masking, protocol=protocol, void_label=void)
    assert [int(table[c]) for c in task.new_classes(step)] == list(
        range(outputs - len(task.steps[step]), outputs)
    )


def make(root: Path, *, seed: int = 7, train: bool = True) -> IncrementalDataset:
    source = open_dataset("shapes", root, "train")
    task = get_task("shapes", "15-5")
    transform = train_transform(48) if train else eval_transform(None)
    lookups = [train_lookup(task, 1), train_lookup(task, 0, data_masking="current+old")]
    entries = [Entry(i) for i in range(20)] + [Entry(30, 1), Entry(2, 1)]
    return IncrementalDataset(source, entries, lookups, transform, seed)


def test_samples_go_through_their_own_table(shapes_root: Path) -> None:
    dataset = make(shapes_root, train=False)
    task = get_task("shapes", "15-5")
    new = dict(zip(task.new_classes(1), range(16, 21), strict=True))
    for place, entry in enumerate(dataset.entries):
        image, target = dataset[place]
        raw_image, mask = dataset.dataset.read(entry.index)
        assert type(image) is torch.Tensor and type(target) is torch.Tensor
        assert image.dtype == target.dtype == torch.uint8 and target.shape == image.shape[1:] == (64, 64)
        assert torch.equal(image, raw_image)
        visible = new if entry.lookup == 0 else {c: c for c in range(16)}
        expected = torch.zeros_like(target)
        for class_id, index in (visible | {255: 255}).items():
            expected[mask[0] == class_id] = index
        assert torch.equal(target, expected)
    assert len(dataset) == 22 and dataset.entries[20].index == 30


def test_draws_depend_on_seed_epoch_and_position_alone(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    torch.manual_seed(1)
    first = dataset[SampleKey(3, epoch=2, position=11)]
    torch.manual_seed(99)
    torch.rand(17)
    again = make(shapes_root)[SampleKey(3, epoch=2, position=11)]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    others = [
        dataset[SampleKey(3, epoch=3, position=11)],
        dataset[SampleKey(3, epoch=2, position=12)],
        make(shapes_root, seed=8)[SampleKey(3, epoch=2, position=11)],
    ]
    assert not any(torch.equal(first[0], other[0]) for other in others)


def test_reading_leaves_torchs_generator_alone(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _ = dataset[4]
    assert torch.equal(torch.rand(3), expected)


def test_bad_file_is_named(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    dataset.dataset.images[4] = Path("/nowhere/x.jpg")
    with pytest.raises(DataError, match=r"/nowhere/x\.jpg: the image is missing"):
        dataset[4]
