"""Image lists of the steps: published lists, the protocols' properties, lists on disk."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import protocols
from dataset.image_labels import label_matrix
from dataset.protocols import list_digest, load_step_list, published_list, step_indices, task_indices
from tasks import Task, get_task
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
PUBLISHED = json.loads((ROOT / "dataset" / "published_splits.json").read_text())
needs_lists = pytest.mark.skipif(
    not (SHARED / "splits").is_dir(), reason="the class lists in shared/splits are not there"
)


@cache
def class_lists(name: str) -> list[set[int]]:
    lines = (SHARED / "splits" / f"{name}_classes.txt").read_text().splitlines()
    return [{int(word) for word in line.split()[1:]} for line in lines]


# --- published lists -------------------------------------------------------------------------------


@needs_lists
def test_hashes_are_the_shared_ones():
    assert json.loads((SHARED / "splits" / "published_splits.json").read_text()) == PUBLISHED


def entry_name(entry: dict) -> str:
    return f"{entry['dataset']}-{entry['task']}-{entry['protocol']}-{entry['step']}"


@needs_lists
@pytest.mark.parametrize("entry", PUBLISHED, ids=entry_name)
def test_published_lists_from_class_lists(entry):
    labels = class_lists(f"{entry['dataset']}_train")
    indices = task_indices(
        get_task(entry["dataset"], entry["task"]), entry["step"], entry["protocol"], labels
    )
    assert (len(indices), list_digest(indices)) == (entry["images"], entry["sha256"])


@pytest.mark.parametrize("entry", [e for e in PUBLISHED if e["dataset"] == "voc"], ids=entry_name)
def test_published_lists_from_real_masks(entry, voc_train_labels):
    task = get_task("voc", entry["task"])
    indices = task_indices(task, entry["step"], entry["protocol"], voc_train_labels)
    expected = published_list(task, entry["step"], entry["protocol"])
    assert expected == (entry["images"], entry["sha256"])
    assert (len(indices), list_digest(indices)) == expected


@needs_lists
def test_validation_images_that_docs_fidelity_counts():
    """Those with a class of step 0, on which the released programs test it; no class is without a label."""
    for name, first, shown in (
        *(("voc_val", 19, 1421), ("voc_val", 15, 1240), ("voc_val", 10, 869)),
        *(("ade_val", 100, 2000), ("ade_val", 50, 1997)),
    ):
        seen = set(range(1, first + 1))
        assert sum(bool(ids & seen) for ids in class_lists(name)) == shown
    for name, number in (("voc_val", 20), ("ade_val", 150)):
        lists = class_lists(name)
        assert set().union(*lists) - {0, 255} == set(range(1, number + 1))
        assert all(ids - {0, 255} for ids in lists), "the last step is tested on all images"


@needs_lists
def test_ade_rules():
    labels = class_lists("ade_train")
    merged = task_indices(get_task("ade", "100-50b"), 1, "disjoint", labels)
    tens = [task_indices(get_task("ade", "100-10b"), step, "disjoint", labels) for step in range(1, 6)]
    assert merged == sorted(i for indices in tens for i in indices)
    assert task_indices(get_task("ade", "100-50"), 1, "sequential", labels) == task_indices(
        get_task("ade", "100-50"), 1, "disjoint", labels
    )
    # The rule follows the classes: a task file with 100-50's steps gets 100-50's lists.
    twin = Task("mine", "ade", get_task("ade", "100-50").steps)
    assert list_digest(task_indices(twin, 0, "disjoint", labels)) == list_digest(
        task_indices(get_task("ade", "100-50"), 0, "disjoint", labels)
    )


def test_published_list_knows_the_classes_not_only_the_name():
    assert published_list(get_task("voc", "19-1"), 1, "disjoint") is not None
    assert published_list(get_task("voc", "19-1"), 1, "sequential") == published_list(
        get_task("voc", "19-1"), 1, "disjoint"
    )
    assert published_list(Task("19-1", "voc", ((0, 1), (2,))), 1, "disjoint") is None
    assert published_list(Task("mine", "voc", ((0, 1), (2,))), 1, "disjoint") is None
    assert published_list(get_task("voc", "10-1"), 1, "overlapped") is None
    assert published_list(get_task("folder", "1-1", num_classes=3), 0, "overlapped") is None


# --- protocols -------------------------------------------------------------------------------


def test_protocols_on_a_small_set():
    labels = [{1}, {2}, {1, 2}, {0, 3, 255}, {1, 3}, set(), {2, 3}]
    steps = [[0, 1], [2], [3]]
    expected = {
        "overlapped": [[0, 2, 4], [1, 2, 6], [3, 4, 6]],
        "disjoint": [[0], [1, 2], [3, 4, 6]],
        "sequential": [[0], [1, 2], [3, 4, 6]],
    }
    for protocol, lists in expected.items():
        assert [step_indices(labels, steps, s, protocol) for s in range(3)] == lists


def reference_partition(labels: list[set[int]], steps: list[list[int]]) -> dict[int, int]:
    """The protocols word by word, in plain Python."""
    clean = [{c for c in ids if c not in (0, 255)} for ids in labels]
    owner = {c: s for s, classes in enumerate(steps) for c in classes}
    count = {c: sum(c in ids for ids in clean) for c in owner}
    given_away = dict.fromkeys(owner, 0)
    visits = list(dict.fromkeys(i for c in sorted(owner) for i, ids in enumerate(clean) if c in ids))
    result = {}
    for i in visits:
        best, best_score = -1, -np.inf
        for c in sorted(clean[i]):
            score = 120 * (1 - given_away[c] / count[c]) + sum(count[k] for k in clean[i]) / count[c]
            if score > best_score:
                best, best_score = c, score
        result[i] = owner[best]
        for k in clean[i]:
            if owner[k] == owner[best]:
                given_away[k] += 1
    return result


label_sets = st.lists(st.frozensets(st.sampled_from([*range(8), 255])), max_size=40)
cuts = st.permutations(range(1, 8)).flatmap(
    lambda order: st.integers(1, 6).map(lambda n: [[0, *order[:n]], order[n : n + 2], order[n + 2 :]])
)


@given(labels=label_sets, steps=cuts, step=st.integers(0, 2))
def test_protocol_properties(labels, steps, step):
    overlapped = step_indices(labels, steps, step, "overlapped")
    disjoint = step_indices(labels, steps, step, "disjoint")
    assert set(disjoint) <= set(overlapped)
    assert disjoint == step_indices(labels, steps, step, "sequential")
    assert overlapped == sorted(set(overlapped))
    new = set(steps[step]) - {0}
    future = {c for classes in steps[step + 1 :] for c in classes}
    assert all(labels[i] & new and not labels[i] & future for i in disjoint)
    missed = set(range(len(labels))) - set(overlapped)
    assert not any(labels[i] & new for i in missed)


@given(labels=label_sets, steps=cuts)
def test_the_greedy_partition_covers_every_image_with_a_class_once(labels, steps):
    owner = protocols._greedy_partition(label_matrix(labels), steps).tolist()
    expected = reference_partition([set(ids) for ids in labels], steps)
    assert owner == [expected.get(i, -1) for i in range(len(labels))]


@given(labels=label_sets, steps=cuts, seed=st.integers(0, 3))
def test_partitioned_gives_every_image_to_the_step_of_one_of_its_classes(labels, steps, seed):
    lists = [step_indices(labels, steps, s, "partitioned", partition_seed=seed) for s in range(3)]
    together = [i for indices in lists for i in indices]
    assert sorted(together) == [i for i, ids in enumerate(labels) if ids - {0, 255}]
    for indices, classes in zip(lists, steps, strict=True):
        assert all(labels[i] & set(classes) for i in indices)
    # The class of an image does not depend on the task: steps of the same classes share its images.
    one_by_one = [[0, 1], *([c] for c in range(2, 8))]
    of_class = [
        set(step_indices(labels, one_by_one, s, "partitioned", partition_seed=seed)) for s in range(7)
    ]
    for indices, classes in zip(lists, steps, strict=True):
        assert set(indices) == set().union(*(of_class[c - 1] for c in classes if c))


@needs_lists
def test_partitioned_lists_of_voc_are_the_published():
    """The last 75 images of class 20 in CISS's ``partitioned_15-1_train_seed0.npy``, after 10,507 draws."""
    lines = [line.split() for line in (SHARED / "splits/voc_train_classes.txt").read_text().splitlines()]
    labels = [frozenset(map(int, ids)) for _, *ids in lines]
    indices = task_indices(get_task("voc", "15-1"), 5, "partitioned", labels)
    last = [name for i in indices if (name := lines[i][0]) >= "2010_003864"]
    assert len(last) == 75
    digest = hashlib.sha256(" ".join(last).encode()).hexdigest()
    assert digest == "a30764fc834fe9f436e9d0ed4b46972275b058a66671d7cebf46008ee2901412"
    other = task_indices(get_task("voc", "15-1"), 5, "partitioned", labels, partition_seed=1)
    assert other != indices


@given(labels=label_sets, seed=st.integers(0, 5))
def test_background_and_void_do_not_count(labels, seed):
    rng = np.random.default_rng(seed)
    padded = [set(ids) - {0, 255} | ({0, 255} if rng.random() < 0.5 else set()) for ids in labels]
    for protocol in ("overlapped", "disjoint", "partitioned"):
        for step, steps in enumerate([[[0, 1, 2, 3], [4, 5], [6, 7]]] * 3):
            assert step_indices(labels, steps, step, protocol) == step_indices(padded, steps, step, protocol)


def test_unknown_protocol_and_step():
    with pytest.raises(UserError, match="'disjunct': unknown; choose from sequential, disjoint"):
        step_indices([{1}], [[0, 1]], 0, "disjunct")
    with pytest.raises(UserError, match="--step 1: the task's steps are 0 to 0"):
        step_indices([{1}], [[0, 1]], 1, "disjoint")
    with pytest.raises(UserError, match="'19-1' has 2 steps"):
        task_indices(get_task("voc", "19-1"), 2, "overlapped", [{1}])
    with pytest.raises(UserError, match="between 0 and 255"):
        step_indices([{1, 300}], [[0, 1]], 0, "disjoint")


# --- lists on disk -------------------------------------------------------------------------------


def test_step_list_is_read(tmp_path):
    np.save(tmp_path / "train-1.npy", np.array([3, 0, 2]))
    assert load_step_list(tmp_path, 1, 4) == [3, 0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; the folder needs one train-<step>.npy per step"),
        (b"nonsense", "is not a readable .npy array"),
        (np.array([[1, 2]]), "one-dimensional array of integers"),
        (np.array([1.0, 2.0]), "one-dimensional array of integers"),
        (np.array([{"a": 1}], dtype=object), "is not a readable .npy array"),
        (np.array([], dtype=int), "is empty"),
        (np.array([0, 4]), r"has index 4; the training set has 4 images \(0 to 3\)"),
        (np.array([-1, 2]), "has index -1"),
        (np.array([2, 2]), "lists image 2 at positions 0 and 1; remove one"),
    ],
)
def test_faulty_step_lists(tmp_path, content, message):
    path = tmp_path / "train-0.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=message) as caught:
        load_step_list(tmp_path, 0, 4)
    assert str(path) in str(caught.value)
