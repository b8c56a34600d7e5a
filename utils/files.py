"""Paths, names and texts that a user gives; files that are whole or absent; folders of one process.

A file is written beside its place, flushed to the disk, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from utils.errors import DataError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# How a lock says that another process has it (the last one on Windows); any other error means: no locks here.
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
# How network file systems say that folders need no flushing there.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_NAME_BYTES = 150  # a file's name may have 255: the others are for the step and the writer's number
_IN_NO_NAME = '/\\<>:"|?*' if os.name == "nt" else "/\\"  # a backslash would be a folder on another system


def given_path(text: str) -> Path:
    """A path as a user writes it, wherever that is: ``~`` and ``~name`` stand for home folders.

    A shell replaces them only at the head of a word; in a YAML file, in ``--option=~/x``, in quotes and on
    Windows nobody else does.

    Raises:
        UserError: it is empty, names an unknown user's home, has a zero byte or is no UTF-8 text.
    """
    if not text.strip():
        raise UserError("the path is empty; give one, or leave the option out")
    if fault := _unwritable(text):
        raise UserError(f"{printable(text)}: the path {fault}; give another")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: no home folder of that user is known; write the path out") from error


def printable(text: str | Path) -> str:
    """A path for a message: bytes of its name that are no UTF-8 text as ``\\xe9``."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")


def is_utf8(text: str | Path) -> bool:
    """Whether a file's name is UTF-8 text, so that it can be printed, logged and stored."""
    try:
        str(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def name_fault(text: str) -> str | None:
    """What keeps a word from being part of the names of files, and what to change; None if nothing."""
    if not text.strip():
        return "is empty, but part of file names; give a word"
    if text != text.strip() or text.startswith("."):
        return "is part of file names; it must not begin with a dot, nor begin or end with a blank"
    if any(mark in text for mark in _IN_NO_NAME):
        return f"is part of file names; leave out {' and '.join(_IN_NO_NAME)}"
    if fault := _unwritable(text) or (None if text.isprintable() else "has a control character"):
        return f"is part of file names, but {fault}; give another"
    if (length := len(text.encode("utf-8"))) > _NAME_BYTES:
        return f"is part of file names, but {length} bytes long; use at most {_NAME_BYTES}"
    return None


def _unwritable(text: str) -> str | None:
    if "\0" in text:
        return "has a zero byte"
    return None if is_utf8(text) else "is no UTF-8 text"


def read_text(path: Path, label: str = "") -> str:
    """The text of a file that a user wrote: UTF-8, with or without a byte-order mark.

    Args:
        path: the file.
        label: what stands before its path in a message, e.g. the option that names it.

    Raises:
        DataError: it cannot be read, or is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{label}{path}: cannot be read ({error.strerror}); check the path") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise DataError(f"{label}{path}: not UTF-8 text but UTF-16 or no text at all; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{label}{path}: not UTF-8 text (line {line}); save it as UTF-8") from error


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

    Some file systems have no locks (Lustre mounted without ``flock``, NFS without its lock service). There
    the folder is anyone's, as ``warning`` says.

    Args:
        folder: made if missing; it gets a file ``.lock`` that names the owner.
        remedy: last part of the message where the folder cannot be written.

    Attributes:
        warning: for the log where the file system has no locks, else None.

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
        self.warning: str | None = None
        try:
            _lock(self._file, wait=False)
        except OSError as error:
            if error.errno in _HELD:
                owner = self._owner()
                self._file.close()
                raise UserError(
                    f"{folder}: another run is at work there ({owner}); wait for its end or give another "
                    "--name"
                ) from error
            self.warning = (
                f"{no_locks(path, error)}, and nothing keeps a second run from this folder: "
                "start one at a time"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, only nameless
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}\n")
            self._file.flush()

    def _owner(self) -> str:
        with contextlib.suppress(OSError):  # Windows does not let others read what is locked
            self._file.seek(0)
            if name := self._file.read(200).strip():
                return name
        return "a process that does not say who it is"

    def release(self) -> None:
        """Give the folder back before the process ends."""
        self._file.close()


@contextlib.contextmanager
def queue_lock(path: Path) -> Iterator[None]:
    """Wait for a lock on a file and hold it; the system releases it when the process dies.

    Where the file system has no locks nobody waits, and the log says so.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("ab") as file:
        try:
            _lock(file, wait=True)
        except OSError as error:
            log.warning("%s", no_locks(path, error))
        yield


def _lock(file: IO[Any], *, wait: bool) -> None:
    """Lock a file until it is closed, at once or not at all unless ``wait``.

    A record lock: unlike flock's (which filelock takes) it does not pass on to loader processes, which can
    outlive a killed run by some seconds. It works on NFS too.
    """
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    else:
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)


def no_locks(path: Path, error: OSError) -> str:
    """Says that a file system has no locks."""
    return f"{path}: the file system has no locks ({error.strerror or error})"


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)
