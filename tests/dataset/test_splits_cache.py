"""The presence index on disk: rebuilt when it must be, whole after a kill, one build for many processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import splits
from dataset.splits import scan_presence
from utils import files

ROOT = Path(__file__).resolve().parents[2]
VOC = ROOT.parent / "shared" / "voc_masks"

# Scans the masks of a folder and prints how many it had to read.
SCANNER = """
import os, sys
from pathlib import Path
from dataset import splits

read, delay = [], float(sys.argv[3])
original = splits.mask_values

def counted(path):
    import time
    os.write(1, b"reading\\n")  # in one piece: threads read the masks
    time.sleep(delay)
    read.append(path)
    return original(path)

splits.mask_values = counted
presence = splits.scan_presence(
    sorted(Path(sys.argv[1]).glob("*.png")), cache_dir=Path(sys.argv[2]), progress=False
)
print("read", len(read), "presence", sorted(map(sorted, presence)), flush=True)
"""


def make_masks(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((3, 3), i + 1, np.uint8)).save(folder / f"{i:03}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read from disk, not from the cache."""
    seen: list[Path] = []
    original = splits.mask_values

    def counted(path):
        seen.append(path)
        return original(path)

    monkeypatch.setattr(splits, "mask_values", counted)
    return seen


def scan(paths, cache_dir):
    return scan_presence(paths, cache_dir=cache_dir, progress=False)


def start_scanner(tmp_path: Path, delay: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCANNER, str(tmp_path / "masks"), str(tmp_path / "cache"), str(delay)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


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
    assert "building it again" in caplog.text
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

    monkeypatch.setattr(files.fcntl, "flock", none)
    paths = make_masks(tmp_path / "masks", 2)
    assert scan(paths, tmp_path / "cache") == [{1}, {2}]
    assert [line.getMessage().endswith("has no locks (No locks available)") for line in caplog.records] == [
        True
    ]
    reads.clear()
    assert scan(paths, tmp_path / "cache") == [{1}, {2}]
    assert not reads


@pytest.mark.skipif(files.fcntl is None, reason="file locks need POSIX")
def test_processes_that_start_together_read_once(tmp_path):
    make_masks(tmp_path / "masks", 6)
    processes = [start_scanner(tmp_path, 0.4) for _ in range(2)]
    last_lines = [process.communicate()[0].splitlines()[-1] for process in processes]
    read = sorted(int(line.split()[1]) for line in last_lines)
    assert read == [0, 6]
    assert len({line.split("presence")[1] for line in last_lines}) == 1


def test_kill_in_the_middle_leaves_no_half_file(tmp_path):
    make_masks(tmp_path / "masks", 200)
    process = start_scanner(tmp_path, 0.2)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list((tmp_path / "cache").glob("*.npz"))

    again = start_scanner(tmp_path, 0.0)  # the dead process's lock does not hold it up
    last = again.communicate()[0].splitlines()[-1]
    assert last.startswith("read 200 ")


@pytest.mark.skipif(not VOC.is_dir(), reason="the VOC masks in shared/voc_masks are not there")
def test_second_start_on_all_masks_decodes_none(tmp_path, reads):
    lines = (VOC / "splits" / "train_aug.txt").read_text().splitlines()
    paths = [VOC / line.split()[1].lstrip("/") for line in lines]
    first = scan(paths, tmp_path)
    assert len(reads) == len(paths)
    assert scan(paths, tmp_path) == first
    assert len(reads) == len(paths)
