"""User-given paths, names and text files; atomic writes; locks on folders and files."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from utils.errors import DataError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# Errors if another process holds the lock (the last one on Windows); others: the file system has no locks.
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
# Errors of network file systems on which folders cannot be flushed and need not be.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_NAME_BYTES = 150  # of the 255 that a file name may have; the rest is for the step and the process id
_IN_NO_NAME = '/\\<>:"|?*' if os.name == "nt" else "/\\"  # a backslash separates folders on Windows


def given_path(text: str) -> Path:
    """Parse a user-given path; ``~`` and ``~name`` are expanded to home folders.

    A shell expands them only at the start of a word, not in ``--option=~/x`` or in quotes.

    Raises:
        UserError: it is empty, names an unknown user's home, has a zero byte or is not UTF-8 text.
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
    """A path for a message, with bytes that are not UTF-8 as ``\\xe9``."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")


def is_utf8(text: str | Path) -> bool:
    """Whether a file's name is UTF-8 text, so that it can be printed, logged and stored."""
    try:
        str(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def name_fault(text: str) -> str | None:
    """Why a text cannot be part of file names, and the remedy; None if it can."""
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
    return None if is_utf8(text) else "is not UTF-8 text"


def read_text(path: Path, label: str = "") -> str:
    """Read a user's text file: UTF-8, with or without a byte-order mark.

    Args:
        path: the file.
        label: put before its path in messages, e.g. the option that names it.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{label}{path}: cannot be read ({error.strerror}); check the path") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise DataError(f"{label}{path}: not UTF-8 text but UTF-16 or binary; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{label}{path}: not UTF-8 text (line {line}); save it as UTF-8") from error


@contextlib.contextmanager
def atomic_write(path: Path, remedy: str = "free some space or choose another folder") -> Iterator[BinaryIO]:
    """Write a temporary file in the same folder, flush it to the disk, then rename it to ``path``.

    Until then a previous file of that name is unchanged, whatever happens (an error, a kill, a power cut).
    After an error the temporary file is removed.

    Args:
        path: the file; its folder is made if missing.
        remedy: last part of the message of the UserError.

    Raises:
        UserError: the folder or the file cannot be written, e.g. because the disk is full.
    """
    # The process id separates two writers; same folder, because a rename works only within one disk.
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

    Bytes of a file name that are not UTF-8 become ``\\udcXX``, which JSON reads back.
    """
    with atomic_write(path, remedy) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def companion(path: Path) -> Path:
    """File beside a released checkpoint in which its program (STAR) keeps a method's state."""
    return path.with_name(re.sub("^checkpoint-", "prototypes-", path.name))


def cannot_write(path: Path, error: OSError, remedy: str) -> UserError:
    """The error for a file that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


class FolderLock:
    """Exclusive lock on a folder; the system releases it when the process ends, however it ends.

    On file systems without locks (Lustre mounted without ``flock``, NFS without its lock service) the folder
    is not locked, and ``warning`` says so.

    Args:
        folder: made if missing; it gets a file ``.lock`` that names the owner.
        remedy: last part of the message if the folder cannot be written.

    Attributes:
        warning: for the log if the file system has no locks, else None.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
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
                    f"{folder}: another run uses this folder ({owner}); wait for its end or give another "
                    "--name"
                ) from error
            self.warning = (
                f"{no_locks(path, error)}, so a second run in this folder is not prevented: "
                "start one at a time"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds, without the owner's name
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}\n")
            self._file.flush()

    def _owner(self) -> str:
        with contextlib.suppress(OSError):  # on Windows others cannot read a locked file
            self._file.seek(0)
            if name := self._file.read(200).strip():
                return name
        return "an unknown process"


@contextlib.contextmanager
def queue_lock(path: Path) -> Iterator[None]:
    """Wait for a lock on a file and hold it; the system releases it when the process ends.

    If the file system has no locks, a warning is logged and nothing is locked.

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
    """Lock a file until it is closed; without ``wait``, raise OSError if another process holds the lock.

    A POSIX record lock: unlike ``flock`` (used by filelock) it is not inherited by loader processes, which
    can outlive a killed run by seconds. It works on NFS too.
    """
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    else:
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)


def no_locks(path: Path, error: OSError) -> str:
    """The message that a file system has no locks."""
    return f"{path}: the file system has no locks ({error.strerror or error})"


def _sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a power cut."""
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
