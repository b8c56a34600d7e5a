"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path, remedy: str = "free some space or choose another folder") -> Iterator[BinaryIO]:
    """Open a file that appears under its name only once it is complete and on the disk.

    Whatever happens in between (an error, a kill, a power cut), a file that stood there before stays as
    it was. After an error nothing else is left behind.

    Args:
        path: the file; its folder is made if it is missing.
        remedy: last part of the message of the UserError.

    Raises:
        UserError: the folder or the file cannot be written, e.g. because the disk is full.
    """
    # The process id keeps two writers apart; same folder, because a rename works only within one disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error, remedy) from error


def atomic_write_text(
    path: Path, text: str, remedy: str = "free some space or choose another folder"
) -> None:
    """Write a text file in UTF-8 as ``atomic_write`` does."""
    with atomic_write(path, remedy) as file:
        file.write(text.encode("utf-8"))


def cannot_write(path: Path, error: OSError, remedy: str) -> UserError:
    """The error for a file that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
