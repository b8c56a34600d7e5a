"""Class orders against the released programs' tables, synonyms, tasks of one's own, and their messages."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import Task, check_step, get_task, read_class_order, task_names
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "tasks.json"
# sha256 of json.dumps(tasks.json, sort_keys=True, separators=(",", ":")).
PUBLISHED = "8c4ee1587d3c5893b4441d878fae6aefb0b021e13aff24a45abd6e676ac86c3a"


def our_tables() -> dict[str, dict[str, list[list[int]]]]:
    return {
        dataset: {name: [list(s) for s in get_task(dataset, name).steps] for name in task_names(dataset)}
        for dataset in ("voc", "ade")
    }


def test_tables_are_the_published_ones():
    text = json.dumps(our_tables(), sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED


@pytest.mark.skipif(not SHARED.exists(), reason="shared/tasks.json is not there")
def test_tables_equal_the_shared_file():
    assert our_tables() == json.loads(SHARED.read_text())


@pytest.mark.parametrize(
    ("dataset", "typed", "name"),
    [
        ("voc", "15-1", "15-5s"),
        ("voc", "15-5-1", "15-5s"),
        ("voc", "15-5S", "15-5s"),
        ("voc", " 15\u20131 ", "15-5s"),
        ("voc", "15-1_b", "15-5s_b"),
        ("voc", "10-1", "10-1"),
        ("voc", "10-10-1", "10-10s"),
        ("voc", "19-1", "19-1"),
        ("voc", "19-1-1", "19-1"),
        ("voc", "joint", "offline"),
        ("ade", "Joint", "offline"),
        ("ade", "50-50", "50"),
        ("ade", "50-50b", "50b"),
        ("ade", "100-50B", "100-50b"),
        ("ade", "10-10", "10-10"),
        ("shapes", "15-1", "15-5s"),
    ],
)
def test_synonyms(dataset, typed, name):
    assert get_task(dataset, typed) == get_task(dataset, name)
    assert get_task(dataset, typed).name == name


def test_classes_of_a_step():
    task = get_task("voc", "15-5s_b")
    assert task.num_steps == 6
    assert task.new_classes(1) == (17,)
    assert task.old_classes(1) == task.steps[0]
    assert task.seen_classes(2) == (*task.steps[0], 17, 3)
    assert task.future_classes(3) == (18, 10)
    assert task.future_classes(5) == () and task.old_classes(0) == ()
    assert task.classes_per_step(2) == [16, 1, 1]
    assert task.order[16] == 17 and task.order[0] == 0


@pytest.mark.parametrize("step", [-1, 6])
def test_step_out_of_range(step):
    task = get_task("voc", "15-5s")
    with pytest.raises(UserError, match=r"--step .*'15-5s' has 6 steps; give a number from 0 to 5"):
        check_step(task, step)
    with pytest.raises(UserError):
        task.new_classes(step)
    with pytest.raises(UserError):
        task.classes_per_step(step)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("10-2", [11, 2, 2, 1]),
        ("14-1", [15, 1]),
        ("5-10", [6, 10]),
        ("7-3-5", [8, 3, 5]),
        ("offline", [16]),
        ("joint", [16]),
    ],
)
def test_own_data_is_cut_by_name(name, sizes):
    task = get_task("folder", name, num_classes=16)
    assert task.classes_per_step(task.num_steps - 1) == sizes
    assert task.order == tuple(range(16))


@given(
    num_classes=st.integers(3, 60), first=st.integers(1, 58), width=st.integers(1, 60), seed=st.integers(0, 9)
)
def test_any_cut_holds_every_class_once(num_classes, first, width, seed):
    if first >= num_classes - 1:
        first = 1
    task = get_task("folder", f"{first}-{width}", num_classes=num_classes, class_order_seed=seed)
    assert task.order[0] == 0
    assert sorted(task.order) == list(range(num_classes))
    assert len(task.steps[0]) == first + 1
    assert all(len(step) == width for step in task.steps[1:-1])


def test_class_order():
    task = get_task("folder", "2-1", num_classes=5, class_order=[3, 1, 4, 2])
    assert task.steps == ((0, 3, 1), (4,), (2,))
    assert get_task("folder", "2-1", num_classes=5, class_order=[0, 3, 1, 4, 2]) == task


def test_class_order_seed_is_fixed():
    orders = [get_task("folder", "2-1", num_classes=12, class_order_seed=seed).order for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] == (0, 3, 4, 5, 10, 2, 7, 1, 8, 11, 9, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_order": [1, 2, 2, 4]}, r"--class_order: class id\(s\) 2 listed more than once"),
        ({"class_order": [1, 2, 3]}, r"--class_order: class id\(s\) 4 missing"),
        ({"class_order": [1, 2, 3, 9]}, r"--class_order: unknown class id\(s\) 9; the data set has 0 to 4"),
        ({"class_order": [1, 0, 2, 3, 4]}, r"--class_order: background \(0\) must come first"),
        ({"class_order": [1, 2, 3, 4], "class_order_seed": 1}, "exclude each other"),
        ({"class_order_seed": -1}, "--class_order_seed -1: give a number from 0 to"),
    ],
)
def test_faulty_class_order(options, message):
    with pytest.raises(UserError, match=message):
        get_task("folder", "2-1", num_classes=5, **options)


@pytest.mark.parametrize(
    ("dataset", "name", "sizes"),
    [
        ("voc", "2-2", [3] + [2] * 9),
        ("voc", "4-4", [5] + [4] * 4),
        ("voc", "2-1", [3] + [1] * 18),
        ("voc", "10-4-6", [11, 4, 6]),
        ("ade", "100-25", [101, 25, 25]),
    ],
)
def test_published_data_sets_have_steps_of_any_size(dataset, name, sizes):
    task = get_task(dataset, name)
    assert (task.name, task.classes_per_step(task.num_steps - 1)) == (name, sizes)
    assert task.order == tuple(range(sum(sizes)))


def test_published_data_sets_have_other_class_orders():
    plain, shuffled = get_task("voc", "15-1"), get_task("voc", "15-1", class_order_seed=1)
    assert shuffled.name == plain.name == "15-5s"
    assert shuffled.classes_per_step(5) == plain.classes_per_step(5)
    assert sorted(shuffled.order) == list(plain.order) != list(shuffled.order)
    order = [*range(150, 0, -1)]
    assert get_task("ade", "100-50", class_order=order).steps[1] == tuple(range(50, 0, -1))
    with pytest.raises(UserError, match="'15-5s_b' fixes its classes and their order"):
        get_task("voc", "15-5s_b", class_order_seed=1)


@pytest.mark.parametrize(
    ("dataset", "name", "message"),
    [
        ("voc", "15-6", "'15-6': only 5 classes are left for step 1; did you mean 15-5"),
        ("ade", "100-51", "did you mean 100-50"),
        ("voc", "15-5-1x", "'15-5-1x': unknown task of --dataset voc; did you mean 15-5"),
        ("voc", "zzz", "known tasks: offline18-20, offline, 19-1"),
        ("folder", "zzz", "or any sizes: 10-2 is 10 classes, then 2 per step"),
        ("folder", "4-1", "no class is left for step 1; the data has 4 foreground classes"),
        ("folder", "2-0", "a step without classes"),
        ("folder", "2-1-2", "the sizes add up to 5; the data has 4 foreground classes"),
        ("coco", "15-5", "unknown data set; choose from voc, ade, folder, shapes"),
    ],
)
def test_unknown_tasks(dataset, name, message):
    with pytest.raises(UserError, match=message):
        get_task(dataset, name, num_classes=5 if dataset == "folder" else None)


def test_number_of_classes():
    with pytest.raises(UserError, match=r"list them in classes\.txt"):
        get_task("folder", "2-1")
    with pytest.raises(UserError, match="voc has 21 classes with background, not 20"):
        get_task("voc", "15-5", num_classes=20)
    with pytest.raises(UserError, match="need background and one more"):
        get_task("folder", "offline", num_classes=1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tasks.yaml", "other: [[0], [1]]\nmine: [[0, 2], [1, 3]]\n"),
        ("tasks.json", '{"mine": [[0, 2], [1, 3]]}'),
        ("steps.yml", "- [0, 2]\n- [1, 3]\n"),
        ("steps.json", "[[0, 2], [1, 3]]"),
    ],
)
def test_task_file(tmp_path, file, content):
    path = tmp_path / file
    path.write_text(content)
    task = get_task("folder", "mine", task_file=path, num_classes=5)
    assert task == Task("mine", "folder", ((0, 2), (1, 3)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mine: [[0, 1], [2", r"tasks\.yaml: not valid YAML \(while .*; correct or quote it"),
        ("mine: [[0], [1]]\nmine: [[0], [2]]", r"tasks\.yaml: line 2: 'mine' appears twice; remove one"),
        ("mine: [[0]]\nno: [[0]]", "line 2: the name 'no' is not text in YAML; put it in quotes"),
        ("15_1: [[0]]", "line 1: the name '15_1' is not text in YAML; put it in quotes"),
        ("mine: [[2024-13-45]]", "not valid YAML .*month"),
        ("yours: [[0], [1]]", "no task 'mine'; it has yours"),
        ("mine: 3", "expected a list of steps"),
        ("mine: []", "expected a list of steps"),
        ("mine: [[0, 1], 2]", "step 1 must be a list of class ids"),
        ("mine: [[0, true]]", "step 0 must be a list of class ids"),
        ("mine: [[0, 1], []]", "step 1 has no class"),
        ("mine: [[1, 0], [2]]", r"background \(0\) must be the first class of step 0"),
        ("mine: [[1], [2]]", r"background \(0\) must be the first class of step 0"),
        ("mine: [[0, 1], [1, 2]]", r"class id\(s\) 1 listed more than once"),
        ("mine: [[0, 1], [7, -1]]", r"unknown class id\(s\) -1, 7; the data set has 0 to 4"),
    ],
)
def test_faulty_task_file(tmp_path, content, message):
    path = tmp_path / "tasks.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        get_task("folder", "mine", task_file=path, num_classes=5)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"mine": [[0], [1]], "mine": [[0], [2]]}', "'mine' appears twice; remove one"),
        ('{"mine": [[0]', "not valid JSON"),
    ],
)
def test_faulty_json(tmp_path, content, message):
    path = tmp_path / "tasks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"tasks\.json: {message}"):
        get_task("folder", "mine", task_file=path, num_classes=5)


def test_task_file_missing_or_with_an_order(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        get_task("folder", "mine", task_file=tmp_path / "none.yaml", num_classes=5)
    with pytest.raises(UserError, match="exclude each other"):
        get_task("folder", "mine", task_file=tmp_path / "a.yaml", num_classes=5, class_order_seed=1)


def test_no_torch_needed():
    code = "import sys, tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_task_file_without_a_name(tmp_path):
    listed, single, several = (tmp_path / name for name in ("mine.yaml", "one.yaml", "two.json"))
    listed.write_text("[[0, 2], [1]]")
    single.write_text("rare-last: [[0, 2], [1]]")
    several.write_text('{"a": [[0, 1]], "b": [[0, 2]]}')
    assert get_task("folder", None, task_file=listed, num_classes=3).name == "mine"
    assert get_task("folder", None, task_file=single, num_classes=3).name == "rare-last"
    with pytest.raises(UserError, match=r"two\.json: has a, b; choose one with --task"):
        get_task("folder", None, task_file=several, num_classes=3)
    with pytest.raises(UserError, match="give a name or a --task_file"):
        get_task("folder", None, num_classes=3)
    single.write_text("a/b: [[0, 2], [1]]")
    with pytest.raises(UserError, match=r"task 'a/b' is part of file names; leave out / and"):
        get_task("folder", None, task_file=single, num_classes=3)


def test_class_order_file(tmp_path):
    path = tmp_path / "order.txt"
    names = ("background", "cat", "dog", "traffic sign", "1")
    path.write_bytes("\ufefftraffic sign\r\n\r\n 2 \r\n1\r\ncat\r\n".encode())
    assert read_class_order(path, names) == [3, 2, 4, 1], "a class named 1 wins over the id 1"
    assert get_task("folder", "2-1", num_classes=5, class_order=read_class_order(path, names)).steps == (
        (0, 3, 2),
        (4,),
        (1,),
    )
    for content, message in (
        (b"cat\ndoog\n", r"order\.txt:2: 'doog' is not a class; did you mean dog\?"),
        (b"9\n", r"order\.txt:1: '9' is not a class; give the name or id of a class"),
        (b"\xff\n", "not UTF-8 text"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_class_order(path, names)
    with pytest.raises(UserError, match=r"--class_order \S*none\.txt: cannot be read \(No such file"):
        read_class_order(tmp_path / "none.txt", names)
