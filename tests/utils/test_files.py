"""Writing a file as a whole or not at all."""

from __future__ import annotations

import os

import pytest

from utils.errors import UserError
from utils.files import atomic_write_text


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
