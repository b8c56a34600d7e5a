"""Files that are whole or absent, and folders that belong to one process.

A file is written beside its place, flushed to the disk, then renamed.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
    """Write a text file in UTF-8 as ``atomic_write`` does.

    Bytes of a file's name that are no UTF-8 become ``\\udcXX``, which JSON reads back.
    """
    with atomic_write(path, remedy) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def cannot_write(path: Path, error: OSError, remedy: str) -> UserError:
    """The error for a file that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


class FolderLock:
    """A folder that is one process's own until the process ends, however it ends.

    Args:
        folder: made if missing; it gets a file ``.lock`` that names the owner.
        remedy: last part of the message where the folder cannot be written.

    Raises:
        UserError: another process has the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, remedy: str = "choose another folder") -> None:
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error, remedy) from error
        try:
            self._lock()
        except OSError as error:
            owner = self._owner()
            self._file.close()
            raise UserError(
                f"{folder}: another run is at work there ({owner}); wait for its end or give another --name"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, only nameless
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}\n")
            self._file.flush()

    def _lock(self) -> None:
        if fcntl is not None:
            # A record lock: unlike flock's it does not pass on to loader processes, which can outlive a
            # killed run by some seconds. It works on NFS too.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            self._file.seek(0)
            msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)

    def _owner(self) -> str:
        with contextlib.suppress(OSError):  # Windows does not let others read what is locked
            self._file.seek(0)
            if name := self._file.read(200).strip():
                return name
        return "a process that does not say who it is"

    def release(self) -> None:
        """Give the folder back before the process ends."""
        self._file.close()


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
