"""Writing a file as a whole or not at all; names and texts that a user gives."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from forked import BOUND

from utils import files
from utils.errors import DataError, UserError
from utils.files import FolderLock, atomic_write_text, is_utf8, name_fault, printable, read_text

ROOT = Path(__file__).resolve().parents[2]
NO_LOCKS = ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL")


def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write_text(path, "old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"file: cannot be written \(No space left on device\); free some"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["MIB", "a b", "lr=0.01", "5%", "v1.2", "größe", "实验", "a:b", "x" * 150])
def test_a_word_that_may_be_part_of_a_file_name(name):
    assert name_fault(name) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("2024/01/01", "leave out / and \\"),
        ("a\\b", "leave out / and \\"),
        ("..", "must not begin with a dot"),
        (".hidden", "must not begin with a dot"),
        ("x ", "a blank"),
        ("a\0b", "a zero byte"),
        ("a\nb", "a control character"),
        ("x" * 151, "151 bytes long; use at most 150"),
        ("é" * 76, "152 bytes long"),
        (os.fsdecode(b"caf\xe9"), "not UTF-8 text"),
    ],
)
def test_a_word_that_may_not(name, words):
    assert words in name_fault(name)


def test_windows_has_more_signs_that_no_name_may_have(monkeypatch):
    monkeypatch.setattr(files, "_IN_NO_NAME", '/\\<>:"|?*')
    assert "leave out" in name_fault("12:30") and "leave out" in name_fault("what?")


def test_names_that_are_no_utf8_can_be_shown():
    name = os.fsdecode(b"caf\xe9.jpg")
    assert not is_utf8(name) and printable(name) == r"caf\xe9.jpg"
    assert is_utf8("café.jpg") and printable("café.jpg") == "café.jpg"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_text_with_and_without_a_mark(tmp_path, mark):
    path = tmp_path / "list.txt"
    path.write_bytes(mark + "größe\r\n".encode())
    assert read_text(path) == "größe\r\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nb\n".encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("a\nb\n".encode("utf-16-le"), "not UTF-8 text but UTF-16"),
        ("a\ngröße\n".encode("latin-1"), r"not UTF-8 text \(line 2\); save it as UTF-8"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^--list \S*list\.txt: {words}"):
        read_text(path, "--list ")


def test_a_folder_that_cannot_be_flushed_holds_files_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    atomic_write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(files.fcntl is None, reason="file locks need POSIX")
@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch, name):
    number = getattr(errno, name)

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "lockf", none)
    lock = FolderLock(tmp_path / "run")
    assert lock.warning is not None and f"has no locks ({os.strerror(number)})" in lock.warning
    assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    del lock


@pytest.mark.skipif(files.fcntl is None, reason="file locks need POSIX")
@pytest.mark.parametrize("name", ["EACCES", "EAGAIN"])
def test_a_lock_that_is_held_is_another_run(tmp_path, monkeypatch, name):
    def held(*_):
        raise OSError(getattr(errno, name), "held")

    monkeypatch.setattr(files.fcntl, "lockf", held)
    with pytest.raises(UserError, match="another run uses this folder"):
        FolderLock(tmp_path / "run")


def test_the_command_warns_and_continues_without_locks(tmp_path):
    """In a real process; the missing data that ends it comes after the lock."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl\n"
        "def none(*_):\n"
        "    raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.lockf = fcntl.flock = none\n"
    )
    words = ("--dataset", "shapes", "--data_root", "none", "--task", "15-5", "--logdir", tmp_path / "logs")
    run = subprocess.run(
        [sys.executable, "run.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("run.py: error: --data_root none: no such folder")
    log = (tmp_path / "logs" / "15-5-shapes_Experiment" / "train.log").read_text()
    assert [line.split()[2] for line in log.splitlines() if "has no locks (No locks available)" in line] == [
        "WARNING"
    ]
