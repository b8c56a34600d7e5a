"""Logging and progress of a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from utils.distributed import World
from utils.files import cannot_write

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PREFIX = "run."  # of the names of the handlers that ``setup_logging`` adds, and replaces


class _ConsoleHandler(logging.Handler):
    """Prints log lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # as all handlers of ``logging``: report the error, do not raise it
            self.handleError(record)


def setup_logging(world: World, log_file: Path | None, debug: bool = False) -> None:
    """Set up the root logger; a second call replaces the handlers of the first.

    Rank 0 logs to stdout and appends to ``log_file``, if there is one; other ranks log only warnings, to
    stderr.

    Raises:
        UserError: the log file cannot be written.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if (h.get_name() or "").startswith(_PREFIX)]:
        root.removeHandler(handler)
        handler.close()
    level = logging.DEBUG if debug else logging.INFO
    if world.is_main:
        _add(root, "console", _ConsoleHandler(), level, "%(asctime)s %(message)s")
        if log_file is not None:
            file_format = "%(asctime)s %(levelname)s %(name)s: %(message)s"
            _add(root, "file", _file_handler(log_file), level, file_format)
    else:
        line = f"%(asctime)s rank {world.rank} %(levelname)s: %(message)s"
        _add(root, "console", logging.StreamHandler(sys.stderr), logging.WARNING, line)
    root.setLevel(level)
    for chatty in ("matplotlib", "PIL", "urllib3", "fsspec", "filelock"):
        logging.getLogger(chatty).setLevel(logging.INFO)
    logging.captureWarnings(True)


def _add(root: logging.Logger, name: str, handler: logging.Handler, level: int, line: str) -> None:
    handler.set_name(_PREFIX + name)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S" if name == "console" else None))
    root.addHandler(handler)


def _file_handler(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names in log lines may not be UTF-8.
        return logging.FileHandler(path, mode="a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_write(path, error, "choose another --logdir") from error


def progress(iterable: Iterable[T], *, total: int, desc: str, world: World, interval: int) -> Iterator[T]:
    """Yield the items and show the progress on rank 0.

    It is a bar if stderr is a terminal, else a log line every ``interval`` items.
    """
    if not world.is_main:
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=desc, leave=False, dynamic_ncols=True)
    else:
        start = time.perf_counter()
        for done, item in enumerate(iterable, start=1):
            yield item  # the consumer processes the item before the next line runs
            if done % interval == 0 or done == total:
                seconds = time.perf_counter() - start
                left = _clock(seconds / done * (total - done))
                _log.info("%s: %d/%d (%.1f/s, %s left)", desc, done, total, done / max(seconds, 1e-9), left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
