"""How every program of this repository begins and ends: its output, its errors, its exit code.

Nothing that a program prints can end it. A letter that the terminal cannot show becomes a question mark, and
where nobody reads any more (``... | head -1``, a terminal that is gone, a full disk behind ``>``) the program
does its work to the end without printing, with the exit code of its work.
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
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell counts


def run_command(name: str, body: Callable[[], object]) -> int:
    """Run a program's body; errors and Ctrl-C are one line.

    Args:
        name: of the program, at the head of that line.
        body: parses the command line and works.

    Returns:
        The exit code: the body's result where that is a number, else 0; 1 after a ``Fault``, 2 after a
        ``UserError``, 130 after Ctrl-C.
    """
    set_up_output()
    try:
        code = body()
    except UserError as error:
        return _end(f"{name}: error: {error}", EXIT_BAD_INPUT)
    except Fault as fault:
        return _end(f"{name}: fault: {fault}", EXIT_FAULT)
    except KeyboardInterrupt:
        return _end(f"{name}: interrupted", EXIT_INTERRUPTED)
    return code if isinstance(code, int) else 0


def interrupts_in_one_line() -> None:
    """Let Ctrl-C be one line also while a program is imported, which takes seconds with torch.

    The packages with programs call it before anything else. Where they are imported as a library the
    interpreter stays as it is.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    # "-m" is what Python has there while it looks for the module to start.
    if sys.argv[:1] == ["-m"] or (file and Path(file).resolve().parent in (_ROOT, _ROOT / "data")):
        sys.excepthook = _excepthook


def set_up_output() -> None:
    """Make the standard output and error of this process ones that printing cannot fail on.

    Streams that are not the process's own, as under pytest, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:  # closed by the caller: the next file that is opened would get the descriptor
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115, PTH123
        elif stream is own:
            setattr(sys, name, _unfailing(stream))


def _end(line: str, code: int) -> int:
    if (tqdm := sys.modules.get("tqdm")) is not None:
        # An interrupt can leave a progress bar open, whose line this one would be printed behind.
        for bar in list(tqdm.tqdm._instances):
            with contextlib.suppress(AttributeError):  # interrupted while it was made
                bar.close()
    # Of several processes that are interrupted together the first one speaks.
    if code != EXIT_INTERRUPTED or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    return code


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    raise SystemExit(_end("interrupted", EXIT_INTERRUPTED))


def _unfailing(stream: TextIO) -> TextIO:
    """The stream anew, over an outlet that swallows what cannot be written."""
    stream.flush()
    outlet: Any = _UnfailingFile(stream.fileno(), "wb", closefd=False)
    direct = bool(getattr(stream, "write_through", False))  # python -u
    return io.TextIOWrapper(
        outlet if direct else io.BufferedWriter(outlet),
        encoding=stream.encoding,
        errors="replace" if stream is sys.__stdout__ else stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=direct,
    )


class _UnfailingFile(io.FileIO):
    """A descriptor that leads to nowhere from the moment that it cannot be written any more."""

    def write(self, data: Any, /) -> int:
        """Write, or swallow; returns the number of bytes."""
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1:
                print(f"the output cannot be written ({error.strerror}); the work goes on", file=sys.stderr)
            return memoryview(data).nbytes
