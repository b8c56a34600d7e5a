"""Image lists of the steps: published lists, the protocols' properties, reading of masks, lists on disk."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import splits
from dataset.splits import (
    list_digest,
    load_step_list,
    mask_values,
    published_list,
    scan_presence,
    step_indices,
    task_indices,
)
from tasks import Task, get_task
from utils.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
PUBLISHED = json.loads((ROOT / "dataset" / "published_splits.json").read_text())
needs_lists = pytest.mark.skipif(
    not (SHARED / "splits").is_dir(), reason="the class lists in shared/splits are not there"
)
needs_masks = pytest.mark.skipif(
    not (SHARED / "voc_masks").is_dir(), reason="the VOC masks in shared/voc_masks are not there"
)


@cache
def class_lists(name: str) -> list[set[int]]:
    lines = (SHARED / "splits" / f"{name}_classes.txt").read_text().splitlines()
    return [{int(word) for word in line.split()[1:]} for line in lines]


@cache
def voc_masks(split: str) -> list[Path]:
    lines = (SHARED / "voc_masks" / "splits" / f"{split}.txt").read_text().splitlines()
    return [SHARED / "voc_masks" / line.split()[1].lstrip("/") for line in lines]


@cache
def voc_presence(split: str) -> list[frozenset[int]]:
    return scan_presence(voc_masks(split), num_classes=21, progress=False)


# --- published lists -------------------------------------------------------------------------------


@needs_lists
def test_hashes_are_the_shared_ones():
    assert json.loads((SHARED / "splits" / "published_splits.json").read_text()) == PUBLISHED


def entry_name(entry: dict) -> str:
    return f"{entry['dataset']}-{entry['task']}-{entry['protocol']}-{entry['step']}"


@needs_lists
@pytest.mark.parametrize("entry", PUBLISHED, ids=entry_name)
def test_published_lists_from_class_lists(entry):
    presence = class_lists(f"{entry['dataset']}_train")
    indices = task_indices(entry["dataset"], entry["task"], entry["step"], entry["protocol"], presence)
    assert (len(indices), list_digest(indices)) == (entry["images"], entry["sha256"])


@needs_masks
@pytest.mark.parametrize("entry", [e for e in PUBLISHED if e["dataset"] == "voc"], ids=entry_name)
def test_published_lists_from_real_masks(entry):
    task = get_task("voc", entry["task"])
    indices = task_indices("voc", task, entry["step"], entry["protocol"], voc_presence("train_aug"))
    expected = published_list(task, entry["step"], entry["protocol"])
    assert expected == (entry["images"], entry["sha256"])
    assert (len(indices), list_digest(indices)) == expected


@needs_masks
@needs_lists
@pytest.mark.parametrize(("split", "lists"), [("train_aug", "voc_train"), ("val", "voc_val")])
def test_presence_of_all_real_masks(split, lists):
    assert [set(ids) for ids in voc_presence(split)] == class_lists(lists)


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
    presence = class_lists("ade_train")
    merged = task_indices("ade", "100-50b", 1, "disjoint", presence)
    tens = [task_indices("ade", "100-10b", step, "disjoint", presence) for step in range(1, 6)]
    assert merged == sorted(i for indices in tens for i in indices)
    assert task_indices("ade", "100-50", 1, "sequential", presence) == task_indices(
        "ade", "100-50", 1, "disjoint", presence
    )
    # The rule follows the classes: a task file with 100-50's steps gets 100-50's lists.
    twin = Task("mine", "ade", get_task("ade", "100-50").steps)
    assert list_digest(task_indices("ade", twin, 0, "disjoint", presence)) == list_digest(
        task_indices("ade", "100-50", 0, "disjoint", presence)
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
    presence = [{1}, {2}, {1, 2}, {0, 3, 255}, {1, 3}, set(), {2, 3}]
    steps = [[0, 1], [2], [3]]
    expected = {
        "overlapped": [[0, 2, 4], [1, 2, 6], [3, 4, 6]],
        "disjoint": [[0], [1, 2], [3, 4, 6]],
        "sequential": [[0], [1, 2], [3, 4, 6]],
    }
    for protocol, lists in expected.items():
        assert [step_indices(presence, steps, s, protocol) for s in range(3)] == lists


def reference_partition(presence: list[set[int]], steps: list[list[int]]) -> dict[int, int]:
    """The protocols word by word, in plain Python."""
    clean = [{c for c in ids if c not in (0, 255)} for ids in presence]
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


presences = st.lists(st.frozensets(st.sampled_from([*range(8), 255])), max_size=40)
cuts = st.permutations(range(1, 8)).flatmap(
    lambda order: st.integers(1, 6).map(lambda n: [[0, *order[:n]], order[n : n + 2], order[n + 2 :]])
)


@given(presence=presences, steps=cuts, step=st.integers(0, 2))
def test_protocol_properties(presence, steps, step):
    overlapped = step_indices(presence, steps, step, "overlapped")
    disjoint = step_indices(presence, steps, step, "disjoint")
    assert set(disjoint) <= set(overlapped)
    assert disjoint == step_indices(presence, steps, step, "sequential")
    assert overlapped == sorted(set(overlapped))
    new = set(steps[step]) - {0}
    future = {c for classes in steps[step + 1 :] for c in classes}
    assert all(presence[i] & new and not presence[i] & future for i in disjoint)
    missed = set(range(len(presence))) - set(overlapped)
    assert not any(presence[i] & new for i in missed)


@given(presence=presences, steps=cuts)
def test_partition_covers_every_image_with_a_class_once(presence, steps):
    lists = [step_indices(presence, steps, step, "partitioned") for step in range(3)]
    together = [i for indices in lists for i in indices]
    assert sorted(together) == [i for i, ids in enumerate(presence) if ids - {0, 255}]
    expected = reference_partition([set(ids) for ids in presence], steps)
    assert {i: s for s, indices in enumerate(lists) for i in indices} == expected


@given(presence=presences, seed=st.integers(0, 5))
def test_background_and_void_do_not_count(presence, seed):
    rng = np.random.default_rng(seed)
    padded = [set(ids) - {0, 255} | ({0, 255} if rng.random() < 0.5 else set()) for ids in presence]
    for protocol in ("overlapped", "disjoint", "partitioned"):
        for step, steps in enumerate([[[0, 1, 2, 3], [4, 5], [6, 7]]] * 3):
            assert step_indices(presence, steps, step, protocol) == step_indices(
                padded, steps, step, protocol
            )


def test_unknown_protocol_and_step():
    with pytest.raises(UserError, match="'disjunct': unknown; choose from sequential, disjoint"):
        step_indices([{1}], [[0, 1]], 0, "disjunct")
    with pytest.raises(UserError, match="--step 1: the task's steps are 0 to 0"):
        step_indices([{1}], [[0, 1]], 1, "disjoint")
    with pytest.raises(UserError, match="'19-1' has 2 steps"):
        task_indices("voc", "19-1", 2, "overlapped", [{1}])
    with pytest.raises(UserError, match="between 0 and 255"):
        step_indices([{1, 300}], [[0, 1]], 0, "disjoint")


# --- reading masks -------------------------------------------------------------------------------


def write_png(path: Path, pixels: np.ndarray, filters: list[int] | None = None, depth: int = 8) -> None:
    """A grey PNG with a chosen filter (0 none, 1 left, 2 up) for every row."""
    height, width = pixels.shape
    rows = []
    for y in range(height):
        kind = filters[y] if filters else 0
        row = pixels[y].astype(np.uint8)
        left = np.concatenate([[0], row[:-1]]).astype(np.uint8)
        up = pixels[y - 1].astype(np.uint8) if y else np.zeros(width, np.uint8)
        rows.append(bytes([kind]) + {0: row, 1: row - left, 2: row - up}[kind].tobytes())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, 0, 0, 0, 0])
    stream = zlib.compress(b"".join(rows))
    half = len(stream) // 2  # two IDAT chunks: a reader must join them
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", stream[:half])
        + chunk(b"IDAT", stream[half:])
        + chunk(b"IEND", b"")
    )


@given(data=st.data())
@settings(max_examples=60)
def test_mask_values_are_the_pixels(data, tmp_path_factory):
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    values = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    pixels = rng.choice(np.array(values, dtype=np.uint8), (height, width))
    kinds = data.draw(st.sampled_from([[0], [0, 1, 2]]))
    path = tmp_path_factory.mktemp("png") / "mask.png"
    write_png(path, pixels, rng.choice(kinds, height).tolist())
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert np.flatnonzero(mask_values(path)).tolist() == np.unique(pixels).tolist()


def test_pillow_masks(tmp_path):
    pixels = np.zeros((20, 31), np.uint8)
    pixels[4:9, 3:20] = 7
    pixels[0, 0] = 255
    for mode in ("L", "P"):
        for options in ({}, {"optimize": True}):
            path = tmp_path / "mask.png"
            image = Image.fromarray(pixels)
            if mode == "P":
                image.putpalette(list(range(256)) * 3)
            image.save(path, **options)
            assert scan_presence([path], progress=False) == [frozenset({7})]
            assert np.flatnonzero(mask_values(path)).tolist() == [0, 7, 255]


def broken_masks(folder: Path) -> dict[str, Path]:
    good = folder / "good.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(good)
    data = good.read_bytes()
    bad_stream = bytearray(data)  # the chunk's checksum is right, what it holds cannot be inflated
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    bad_stream[start + 10] ^= 0xFF
    crc = zlib.crc32(bad_stream[start : start + 4 + length])
    bad_stream[start + 4 + length : start + 8 + length] = crc.to_bytes(4, "big")
    contents = {
        "cut": data[: len(data) // 2],
        "no_end": data[:-12],
        "stream": bytes(bad_stream),
        "flipped": data[:60] + bytes([data[60] ^ 0xFF]) + data[61:],
        "empty": b"",
        "text": b"this is no picture at all, whatever its name says",
    }
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    Image.new("RGB", (4, 4)).save(folder / "rgb.png")
    Image.new("L", (4, 4)).save(folder / "jpeg.png", format="jpeg")
    (folder / "folder.png").mkdir()
    names = [*contents, "rgb", "jpeg", "folder", "missing"]
    return {name: folder / f"{name}.png" for name in names}


@pytest.mark.parametrize(
    "kind", ["cut", "no_end", "stream", "flipped", "empty", "text", "rgb", "jpeg", "folder", "missing"]
)
@pytest.mark.parametrize("cached", [False, True])
def test_bad_masks_are_refused_by_name(tmp_path, kind, cached):
    bad = broken_masks(tmp_path)[kind]
    cache_dir = tmp_path / "cache" if cached else None
    with pytest.raises(DataError) as caught:
        scan_presence([tmp_path / "good.png", bad], cache_dir=cache_dir, progress=False)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*.npz"))


def test_unknown_ids_are_refused_by_name(tmp_path):
    for i, value in enumerate([1, 2, 5, 6]):
        Image.fromarray(np.array([[0, value, 255]], np.uint8)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    assert scan_presence(paths, progress=False, num_classes=7) == [{1}, {2}, {5}, {6}]
    with pytest.raises(
        DataError, match=r"2\.png \(and 1 more masks\): unknown class id\(s\) 5; expected 0 to 4"
    ):
        scan_presence(paths, progress=False, num_classes=5)


def test_progress_counts_every_mask(tmp_path, capsys):
    for i in range(70):
        Image.fromarray(np.full((2, 2), 1, np.uint8)).save(tmp_path / f"{i}.png")
    scan_presence(sorted(tmp_path.glob("*.png")), progress=True, workers=2)
    assert "70/70" in capsys.readouterr().err
    assert splits.default_workers() >= 1


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
        (np.array([2, 2]), "lists image 2 at the places 0 and 1, and an image counts once"),
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
