"""The exemplar memory: balanced, seeded, from earlier steps only; its list on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.exemplars import (
    Exemplar,
    Selection,
    choose_listed,
    class_counts,
    load_exemplars,
    save_exemplars,
)
from dataset.protocols import task_indices
from tasks import get_task
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "splits"
TASK = get_task("voc", "15-5s")


def random_labels(count: int, seed: int) -> list[set[int]]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 21)
    return [
        set(
            rng.choice(
                np.arange(1, 21), rng.integers(1, 4), replace=False, p=weights / weights.sum()
            ).tolist()
        )
        for _ in range(count)
    ]


def select_exemplars(*inputs, **rule) -> list[Exemplar]:
    return Selection(*inputs, **rule).choose()


def lists_of(labels: list[set[int]], protocol: str = "overlapped") -> list[list[int]]:
    return [task_indices(TASK, step, protocol, labels) for step in range(TASK.num_steps)]


@settings(deadline=None)
@given(
    seed=st.integers(0, 50),
    memory=st.integers(0, 60),
    step=st.integers(0, 5),
    protocol=st.sampled_from(["overlapped", "disjoint"]),
    in_turn=st.booleans(),
)
def test_properties(seed, memory, step, protocol, in_turn):
    labels = random_labels(150, seed)
    lists = lists_of(labels, protocol)
    exemplars = select_exemplars(labels, TASK, step, memory, seed, lists, in_turn=in_turn)
    assert len(exemplars) <= memory
    assert len({exemplar.index for exemplar in exemplars}) == len(exemplars)
    for exemplar in exemplars:
        assert exemplar.step < step
        assert exemplar.index in lists[exemplar.step]
        assert labels[exemplar.index] & set(TASK.seen_classes(exemplar.step))
    # Neither this step's images nor later ones matter: they need not even be known.
    assert exemplars == select_exemplars(labels, TASK, step, memory, seed, lists[:step], in_turn=in_turn)
    if step >= 1 and memory <= len(lists[0]):
        assert len(exemplars) == memory


@given(seed=st.integers(0, 50), step=st.integers(2, 5))
def test_an_image_of_an_older_step_was_in_the_memory_before(seed, step):
    labels = random_labels(150, seed)
    lists = lists_of(labels, "disjoint")
    before = {e.index for e in select_exemplars(labels, TASK, step - 1, 25, seed, lists)}
    now = select_exemplars(labels, TASK, step, 25, seed, lists)
    assert {e.index for e in now if e.step < step - 1} <= before


def test_seed_decides():
    labels = random_labels(300, 0)
    lists = lists_of(labels)
    first, same, other = (select_exemplars(labels, TASK, 3, 30, seed, lists) for seed in (1, 1, 2))
    assert first == same != other
    assert select_exemplars(labels, TASK, 3, 30, -5, lists)


def test_balanced_where_the_classes_allow_it():
    labels = [{c} for c in range(1, 17) for _ in range(3 * c)]
    lists = lists_of(labels)
    counts = class_counts(select_exemplars(labels, TASK, 1, 45, 0, lists), labels, TASK)
    assert set(counts) == set(range(1, 16))
    assert set(counts.values()) == {3}
    # Class 1 has three images only; what it cannot give, the others share evenly.
    counts = class_counts(select_exemplars(labels, TASK, 1, 73, 0, lists), labels, TASK)
    assert counts[1] == 3 and {counts[c] for c in range(2, 16)} == {5}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the class lists in shared/splits are not there")
def test_balance_on_voc():
    lines = (SHARED / "voc_train_classes.txt").read_text().splitlines()
    labels = [{int(word) for word in line.split()[1:]} for line in lines]
    lists = [task_indices(TASK, step, "overlapped", labels) for step in range(6)]
    exemplars = select_exemplars(labels, TASK, 5, 100, 42, lists)
    counts = class_counts(exemplars, labels, TASK)
    assert len(exemplars) == 100
    assert set(counts) == set(range(1, 20))
    # Drawn without regard to class, person would have some 20 and the rarest class none.
    assert min(counts.values()) >= 5
    assert max(counts.values()) <= 8


def released_choice(known, memory, rng):
    """SSUL-M's rule, restated: shuffled images and classes, one image for each class in turn."""
    images, classes = sorted(known), sorted(set().union(*known.values()))
    rng.shuffle(images)
    rng.shuffle(classes)
    chosen = {c: [] for c in classes}
    while sum(map(len, chosen.values())) < memory and any(known[i] for i in images):
        for c in classes:
            for place, image in enumerate(images):
                if c in known[image]:
                    chosen[c].append(image)
                    del images[place]
                    break
            if sum(map(len, chosen.values())) >= memory:
                break
    return sorted(image for images in chosen.values() for image in images)


@pytest.mark.parametrize("memory", [0, 7, 30, 200])
def test_released_rule(memory):
    labels = random_labels(150, 4)
    lists = lists_of(labels, "disjoint")
    first = {i: labels[i] & set(range(1, 16)) for i in lists[0]}
    chosen = released_choice(first, memory, np.random.RandomState([5, 1]))
    found = select_exemplars(labels, TASK, 1, memory, 5, lists, in_turn=True)
    assert [e.index for e in found] == chosen
    second = {i: first[i] for i in chosen}
    second |= {i: labels[i] & set(range(1, 17)) for i in lists[1]}
    chosen = released_choice(second, memory, np.random.RandomState([5, 2]))
    found = select_exemplars(labels, TASK, 2, memory, 5, lists, in_turn=True)
    assert [e.index for e in found] == chosen
    assert memory != 30 or found != select_exemplars(labels, TASK, 2, memory, 5, lists)


def test_a_class_beside_many_others_fills_the_memory_in_turn_only():
    """The release counts an image for the class that it was drawn for, whatever else it shows."""
    labels = [{c} for c in range(1, 15) for _ in range(9)] + [{15, c} for c in range(1, 15)] * 9
    lists = lists_of(labels)
    fewest, in_turn = (
        class_counts(select_exemplars(labels, TASK, 1, 45, 0, lists, in_turn=rule), labels, TASK)
        for rule in (False, True)
    )
    assert fewest[15] <= 4 < 10 < in_turn[15]


def test_classes_unknown_when_stored_do_not_count():
    labels = [{1, 16}, {2, 16}, {16}, {17}]
    exemplars = [Exemplar(0, 0), Exemplar(2, 1)]
    assert class_counts(exemplars, labels, TASK)[16] == 1
    assert class_counts(exemplars, labels, TASK)[1] == 1
    assert class_counts([], labels, TASK) == {}


def test_image_that_comes_back_is_known_with_the_later_classes():
    labels = [{1, 16}, {2}, {17}]
    lists = [[0, 1], [0], [2], [], [], []]
    assert select_exemplars(labels, TASK, 1, 5, 0, lists) == [Exemplar(0, 0), Exemplar(1, 0)]
    assert select_exemplars(labels, TASK, 2, 5, 0, lists) == [Exemplar(0, 1), Exemplar(1, 0)]


def test_bad_arguments():
    with pytest.raises(UserError, match="--memory -1"):
        select_exemplars([{1}], TASK, 1, -1, 0, [[0]])
    with pytest.raises(UserError, match="has 6 steps"):
        select_exemplars([{1}], TASK, 6, 1, 0, [[0]])


def test_list_on_disk(tmp_path):
    labels = random_labels(100, 3)
    lists = lists_of(labels)
    exemplars = select_exemplars(labels, TASK, 2, 10, 7, lists)
    origin = Selection(labels, TASK, 2, 10, 7, lists).origin()
    path = tmp_path / "run" / "exemplars_2.json"
    save_exemplars(path, exemplars, origin)
    assert load_exemplars(path, origin) == exemplars
    assert json.loads(path.read_text())["origin"]["memory"] == 10
    with pytest.raises(UserError, match="made from another rule"):
        load_exemplars(path, Selection(labels, TASK, 2, 10, 7, lists, in_turn=True).origin())

    changed = [lists[0][1:], *lists[1:]]
    with pytest.raises(UserError, match="made from another seed, candidates"):
        load_exemplars(path, Selection(labels, TASK, 2, 10, 8, changed).origin())
    redrawn = [labels[0] ^ {1}, *labels[1:]]
    with pytest.raises(UserError, match="made from another presence"):
        load_exemplars(path, Selection(redrawn, TASK, 2, 10, 7, lists).origin())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"origin": {}}', '{"origin": {}, "exemplars": [1]}'])
def test_damaged_list_on_disk(tmp_path, content):
    path = tmp_path / "exemplars.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        load_exemplars(path, {})


def test_list_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_exemplars(tmp_path / "none.json", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_exemplars(tmp_path / "file" / "list.json", [], {})


@settings(deadline=None)
@given(seed=st.integers(0, 50), memory=st.integers(0, 40))
def test_choice_by_listed_classes(seed, memory):
    rng = np.random.default_rng(seed)
    listed = {int(i): rng.choice(9, rng.integers(0, 4), replace=False).tolist() for i in range(20, 50)}
    kept = [Exemplar(i, 0, (i % 5 + 1,)) for i in range(0, 24, 2)]  # 20 and 22 are listed, too
    chosen = choose_listed(kept, listed, 2, memory, seed)
    assert chosen == choose_listed(kept, listed, 2, memory, seed), "the same for the same seed"
    indices = [exemplar.index for exemplar in chosen]
    assert indices == sorted(set(indices)) and len(chosen) <= memory
    for exemplar in chosen:
        of_memory = [before for before in kept if before.index == exemplar.index]
        known = set(listed.get(exemplar.index, [])).union(*(before.classes for before in of_memory))
        assert set(exemplar.classes) == known != set()
        assert exemplar.step == (1 if exemplar.index in listed else 0)
    showing = sum(bool(classes) for classes in listed.values()) + 10
    showing += sum(not listed[i] for i in (20, 22))
    assert len(chosen) == min(memory, showing), "all that show a class, if there is room"
    if memory >= 9:
        assert {c for exemplar in chosen for c in exemplar.classes} == {
            c for classes in [*listed.values(), *(before.classes for before in kept)] for c in classes
        }


def test_a_list_with_classes_on_disk(tmp_path):
    exemplars = [Exemplar(3, 0, (1, 7)), Exemplar(5, 1, (2,))]
    save_exemplars(tmp_path / "list.json", exemplars, {"rule": "predicted", "network": "a"})
    assert load_exemplars(tmp_path / "list.json", {"rule": "predicted"}) == exemplars
    with pytest.raises(UserError, match="was made from another network"):
        load_exemplars(tmp_path / "list.json", {"rule": "predicted", "network": "b"})
