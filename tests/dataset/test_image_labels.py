"""Image-level labels: reading masks; the cache, its invalidation, and its state after a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import image_labels
from dataset.image_labels import mask_values, scan_image_labels
from utils import files
from utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
VOC = ROOT.parent / "shared" / "voc_masks"

# Scans the masks of a folder and prints how many it had to read.
SCANNER = """
import os, sys
from pathlib import Path
from dataset import image_labels

read, delay = [], float(sys.argv[3])
original = image_labels.mask_values

def counted(path):
    import time
    os.write(1, b"reading\\n")  # in one piece: threads read the masks
    time.sleep(delay)
    read.append(path)
    return original(path)

image_labels.mask_values = counted
labels = image_labels.scan_image_labels(
    sorted(Path(sys.argv[1]).glob("*.png")), cache_dir=Path(sys.argv[2]), progress=False
)
print("read", len(read), "labels", sorted(map(sorted, labels)), flush=True)
"""


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
            assert scan_image_labels([path], progress=False) == [frozenset({7})]
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
        scan_image_labels([tmp_path / "good.png", bad], cache_dir=cache_dir, progress=False)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*.npz"))


def test_unknown_ids_are_refused_by_name(tmp_path):
    for i, value in enumerate([1, 2, 5, 6]):
        Image.fromarray(np.array([[0, value, 255]], np.uint8)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    assert scan_image_labels(paths, progress=False, num_classes=7) == [{1}, {2}, {5}, {6}]
    with pytest.raises(
        DataError, match=r"2\.png \(and 1 more masks\): unknown class id\(s\) 5; expected 0 to 4"
    ):
        scan_image_labels(paths, progress=False, num_classes=5)


def test_progress_counts_every_mask(tmp_path, capsys):
    for i in range(70):
        Image.fromarray(np.full((2, 2), 1, np.uint8)).save(tmp_path / f"{i}.png")
    scan_image_labels(sorted(tmp_path.glob("*.png")), progress=True)
    assert "70/70" in capsys.readouterr().err


# --- cache ---


def make_masks(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((3, 3), i + 1, np.uint8)).save(folder / f"{i:03}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read from disk, not from the cache."""
    seen: list[Path] = []
    original = image_labels.mask_values

    def counted(path):
        seen.append(path)
        return original(path)

    monkeypatch.setattr(image_labels, "mask_values", counted)
    return seen


def scan(paths, cache_dir):
    return scan_image_labels(paths, cache_dir=cache_dir, progress=False)


def start_scanner(interpreter: Path, tmp_path: Path, delay: float) -> subprocess.Popen[str]:
    program = tmp_path / "scanner.py"
    program.write_text(SCANNER)
    words = [interpreter, program, tmp_path / "masks", tmp_path / "cache", str(delay)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_second_scan_reads_no_mask(tmp_path, reads):
    paths = make_masks(tmp_path / "masks", 5)
    first = scan(paths, tmp_path / "cache")
    assert len(reads) == 5
    assert scan(paths, tmp_path / "cache") == first == [{i + 1} for i in range(5)]
    assert len(reads) == 5


def test_changed_list_or_mask_rebuilds(tmp_path, reads):
    paths = make_masks(tmp_path / "masks", 4)
    scan(paths, tmp_path / "cache")

    reads.clear()
    assert scan(paths[::-1], tmp_path / "cache") == [{4}, {3}, {2}, {1}]
    assert scan(paths[:3], tmp_path / "cache") == [{1}, {2}, {3}]
    assert len(reads) == 7

    reads.clear()
    stat = paths[0].stat()
    Image.fromarray(np.full((3, 3), 9, np.uint8)).save(paths[0])
    assert paths[0].stat().st_size == stat.st_size  # the time alone tells the difference
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert scan(paths, tmp_path / "cache")[0] == {9}
    assert len(reads) == 4

    Image.fromarray(np.full((30, 30), 8, np.uint8)).save(paths[1])
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scan(paths, tmp_path / "cache")[1] == {8}


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "flipped", "pickle", "shape"])
def test_damaged_cache_is_rebuilt(tmp_path, reads, caplog, damage):
    paths = make_masks(tmp_path / "masks", 3)
    expected = scan(paths, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").glob("*.npz")
    data = stored.read_bytes()
    if damage == "cut":
        stored.write_bytes(data[: len(data) // 2])
    elif damage == "noise":
        stored.write_bytes(bytes(range(256)) * 4)
    elif damage == "empty":
        stored.write_bytes(b"")
    elif damage == "flipped":  # inside the array, where only the archive's checksum notices
        where = data.index(b"index.npy") + 200
        stored.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    elif damage == "pickle":
        np.savez(stored, key=np.array({"a": 1}, dtype=object), index=np.zeros(1))
    else:
        with np.load(stored) as content:
            np.savez(stored, key=content["key"], index=np.zeros((2, 32), np.uint8))
    reads.clear()
    assert scan(paths, tmp_path / "cache") == expected
    assert len(reads) == 3
    assert "the masks are read again" in caplog.text
    reads.clear()
    assert scan(paths, tmp_path / "cache") == expected
    assert not reads


def test_read_only_place_is_a_warning(tmp_path, caplog):
    paths = make_masks(tmp_path / "masks", 2)
    (tmp_path / "file").write_text("not a folder")
    assert scan(paths, tmp_path / "file" / "cache") == [{1}, {2}]
    assert "cannot be written" in caplog.text


@pytest.mark.skipif(files.fcntl is None, reason="file locks need POSIX")
def test_without_locks_the_index_is_kept_all_the_same(tmp_path, monkeypatch, caplog, reads):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    paths = make_masks(tmp_path / "masks", 2)
    assert scan(paths, tmp_path / "cache") == [{1}, {2}]
    assert [line.getMessage().endswith("has no locks (No locks available)") for line in caplog.records] == [
        True
    ]
    reads.clear()
    assert scan(paths, tmp_path / "cache") == [{1}, {2}]
    assert not reads


@pytest.mark.skipif(files.fcntl is None, reason="file locks need POSIX")
def test_processes_that_start_together_read_once(tmp_path, interpreter):
    make_masks(tmp_path / "masks", 6)
    processes = [start_scanner(interpreter, tmp_path, 0.4) for _ in range(2)]
    last_lines = [process.communicate()[0].splitlines()[-1] for process in processes]
    read = sorted(int(line.split()[1]) for line in last_lines)
    assert read == [0, 6]
    assert len({line.split("labels")[1] for line in last_lines}) == 1


def test_kill_in_the_middle_leaves_no_half_file(tmp_path, interpreter):
    make_masks(tmp_path / "masks", 200)
    process = start_scanner(interpreter, tmp_path, 0.2)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list((tmp_path / "cache").glob("*.npz"))

    again = start_scanner(interpreter, tmp_path, 0.0)  # the dead process's lock does not hold it up
    last = again.communicate()[0].splitlines()[-1]
    assert last.startswith("read 200 ")


@pytest.mark.skipif(not VOC.is_dir(), reason="the VOC masks in shared/voc_masks are not there")
@pytest.mark.parametrize(("split", "lists"), [("train_aug", "voc_train"), ("val", "voc_val")])
def test_all_real_masks_are_as_listed_and_read_once(voc_cache, reads, split, lists):
    lines = (VOC / "splits" / f"{split}.txt").read_text().splitlines()
    paths = [VOC / line.split()[1].lstrip("/") for line in lines]
    listed = (VOC.parent / "splits" / f"{lists}_classes.txt").read_text().splitlines()
    labels = scan(paths, voc_cache)
    assert labels == [{int(word) for word in line.split()[1:]} for line in listed]
    read = len(reads)
    assert read in (0, len(paths))  # none if another test has read them
    assert scan(paths, voc_cache) == labels
    assert len(reads) == read
