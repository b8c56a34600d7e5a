"""Standard output, error messages and exit codes, shared by all programs of this repository.

A failing ``print`` does not end a program. Characters that the terminal cannot encode are printed as question
marks. If the output cannot be written (``... | head -1``, a closed terminal, a full disk), the program
continues without printing and exits with its usual code.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from utils.errors import Fault, UserError

_ROOT = Path(__file__).resolve().parent.parent
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells return it


def run_command(name: str, body: Callable[[], object]) -> int:
    """Run the main function of a program; report errors and Ctrl-C in one line.

    Returns:
        The exit code: the result of ``body`` if it is an int, else 0; 1 after a ``Fault``, 2 after a
        ``UserError`` or if a package is not installed, 130 after Ctrl-C.
    """
    set_up_output()
    try:
        code = body()
    except UserError as error:
        return _end(f"{name}: error: {error}", EXIT_BAD_INPUT)
    except ModuleNotFoundError as error:
        if not _is_package(error.name):
            raise
        return _end(f"{name}: error: {_not_installed(error)}", EXIT_BAD_INPUT)
    except Fault as fault:
        return _end(f"{name}: fault: {fault}", EXIT_FAULT)
    except KeyboardInterrupt:
        return _end(f"{name}: interrupted", EXIT_INTERRUPTED)
    return code if isinstance(code, int) else 0


def interrupts_in_one_line() -> None:
    """Report Ctrl-C, and a package that is not installed, in one line also during imports.

    Packages with programs call this first. It does nothing if they are imported as a library.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    # sys.argv[0] is "-m" while Python searches for the module to run.
    if sys.argv[:1] == ["-m"] or (file and Path(file).resolve().parent in (_ROOT, _ROOT / "data")):
        sys.excepthook = _excepthook


def set_up_output() -> None:
    """Replace stdout and stderr by streams on which printing cannot fail.

    Streams that were already replaced, as pytest does, are left unchanged.
    """
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:  # closed by the caller; the next opened file would get its descriptor
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115, PTH123
        elif stream is own:
            setattr(sys, name, _unfailing(stream))


def _end(line: str, code: int) -> int:
    if (tqdm := sys.modules.get("tqdm")) is not None:
        # An interrupt can leave a progress bar open; the message would appear on its line.
        for bar in list(tqdm.tqdm._instances):
            with contextlib.suppress(AttributeError):  # interrupted in its constructor
                bar.close()
    # If several processes are interrupted together, only rank 0 prints.
    if code != EXIT_INTERRUPTED or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    return code


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        raise SystemExit(_end("interrupted", EXIT_INTERRUPTED))
    if isinstance(error, ModuleNotFoundError) and _is_package(error.name):
        raise SystemExit(_end(f"error: {_not_installed(error)}", EXIT_BAD_INPUT))
    sys.__excepthook__(kind, error, trace)


def _is_package(module: str | None) -> bool:
    """Whether a module that was not found is that of a package, not a part of one nor a file of ours."""
    return module is not None and "." not in module and not any(_ROOT.glob(f"{module}*"))


def _not_installed(error: ModuleNotFoundError) -> str:
    return (
        f"the package {error.name} is not installed for {sys.executable}; activate the environment "
        "(. .venv/bin/activate) or install the packages (pip install -r requirements.txt)"
    )


def _unfailing(stream: TextIO) -> TextIO:
    """A text stream on the same descriptor that discards what cannot be written."""
    stream.flush()
    file: Any = _UnfailingFile(stream.fileno(), "wb", closefd=False)
    direct = bool(getattr(stream, "write_through", False))  # python -u
    return io.TextIOWrapper(
        file if direct else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="replace" if stream is sys.__stdout__ else stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=direct,
    )


class _UnfailingFile(io.FileIO):
    """A file descriptor that is redirected to ``os.devnull`` after the first failed write."""

    def write(self, data: Any, /) -> int:
        """Write or discard ``data``; returns the number of bytes."""
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1:
                print(f"stdout cannot be written ({error.strerror}); continuing without it", file=sys.stderr)
            return memoryview(data).nbytes
