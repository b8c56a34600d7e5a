"""What a run says: log lines, progress, text tables and TensorBoard."""

from __future__ import annotations

import errno
import logging
import math
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensorboardX import SummaryWriter
from tqdm import tqdm

from utils.distributed import World
from utils.drawing import failure_is_a_warning
from utils.files import cannot_write
from utils.history import Record
from utils.memory import SHARED_MEMORY_REMEDY, is_shared_memory_full
from utils.visualize import confusion_figure

if TYPE_CHECKING:  # at run time that module imports this one
    from metrics.continual import Results

T = TypeVar("T")

_log = logging.getLogger(__name__)
_OWN = "run."  # prefix of the names of our handlers, so that they can be replaced


class _ConsoleHandler(logging.Handler):
    """Lines that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # logging's own convention: report the fault, never stop the program for a log line
            self.handleError(record)


def setup_logging(world: World, run_dir: Path | None, debug: bool = False) -> logging.Logger:
    """Send log lines to where they belong; calling it again replaces the earlier arrangement.

    Rank 0 writes to the standard output and appends to ``<run_dir>/train.log``; other ranks write only
    warnings, to the standard error.

    Args:
        world: this process.
        run_dir: folder of the run, made if missing; None: no file.
        debug: show debug lines too.

    Returns:
        The root logger, whose level and handlers are set.

    Raises:
        UserError: the log file cannot be written.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if (h.get_name() or "").startswith(_OWN)]:
        root.removeHandler(handler)
        handler.close()
    level = logging.DEBUG if debug else logging.INFO
    if world.is_main:
        _add(root, "console", _ConsoleHandler(), level, "%(asctime)s %(message)s")
        if run_dir is not None:
            file_format = "%(asctime)s %(levelname)s %(name)s: %(message)s"
            _add(root, "file", _file_handler(run_dir / "train.log"), level, file_format)
    else:
        line = f"%(asctime)s rank {world.rank} %(levelname)s: %(message)s"
        _add(root, "console", logging.StreamHandler(sys.stderr), logging.WARNING, line)
    root.setLevel(level)
    for chatty in ("matplotlib", "PIL", "urllib3", "fsspec", "filelock"):
        logging.getLogger(chatty).setLevel(logging.INFO)
    logging.captureWarnings(True)
    return root


def _add(root: logging.Logger, name: str, handler: logging.Handler, level: int, line: str) -> None:
    handler.set_name(_OWN + name)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S" if name == "console" else None))
    root.addHandler(handler)


def _file_handler(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file name that is no UTF-8 must not cost the line that names it.
        return logging.FileHandler(path, mode="a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_write(path, error, "choose another --logdir") from error


class RunLogger:
    """TensorBoard on rank 0; elsewhere, or switched off, the same calls do nothing.

    Args:
        world: this process.
        run_dir: folder of the event files, made if missing.
        enabled: False for ``--visualize``, which switches TensorBoard off.
        begins_at: where the curves begin or go on: TensorBoard hides what earlier files of the folder have
            from there on. None: it shows all.
    """

    def __init__(
        self, world: World, run_dir: Path, enabled: bool = True, begins_at: int | None = None
    ) -> None:
        self._writer: SummaryWriter | None = None
        if enabled and world.is_main:
            try:
                # Its files' names count seconds: two of the same second would be one, without the first's.
                suffix = f".{time.time_ns()}"
                self._writer = SummaryWriter(str(run_dir), purge_step=begins_at, filename_suffix=suffix)
            except OSError as error:
                # Its queue needs a little shared memory.
                full = error.errno == errno.ENOSPC and is_shared_memory_full()
                remedy = SHARED_MEMORY_REMEDY if full else "choose another --logdir"
                raise cannot_write(run_dir, error, f"{remedy}, or give --visualize") from error

    def _open(self) -> SummaryWriter | None:
        """The writer, as long as its thread lives: to a dead one's queue this process would wait forever."""
        if self._writer is not None and not self._writer.file_writer.event_writer._worker.is_alive():
            _log.warning("TensorBoard's file cannot be written any more; the run goes on without it")
            self._writer = None
        return self._writer

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a curve; NaN (a number that does not exist) is left out."""
        if not math.isnan(value) and (writer := self._open()) is not None:
            writer.add_scalar(tag, value, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of several curves, each under its own tag."""
        for tag, value in values.items():
            self.scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """A text in Markdown."""
        if (writer := self._open()) is not None:
            writer.add_text(tag, text, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """A matplotlib figure."""
        if (writer := self._open()) is not None:
            writer.add_figure(tag, figure, step)

    def image(self, tag: str, image: Any, step: int) -> None:
        """A picture, H×W×3, uint8."""
        if (writer := self._open()) is not None:
            writer.add_image(tag, image, step, dataformats="HWC")

    def progress(self, record: Record) -> None:
        """A point of a step's course: every loss term under its own name, learning rate, speed, memory."""
        values = {f"loss/{name}": value for name, value in record.losses.items()}
        values["lr"] = record.lr
        for tag, value in (("images_per_second", record.images_per_second), ("memory_MiB", record.memory)):
            if value is not None:
                values[tag] = value
        self.scalars(values, record.iteration)

    def options(self, options: Mapping[str, Any]) -> None:
        """The options of a run as a table."""
        rows = [[name, str(value)] for name, value in sorted(options.items())]
        self.text("options", markdown_table(["option", "value"], rows))

    def results(self, results: Results, step: int, confusion: Any = None) -> None:
        """Results of an evaluation: curves of means and of every class, the tables, the confusion matrix.

        Args:
            results: of the evaluation.
            step: place on the curves: the number of the step, or of the epoch.
            confusion: C×C counts, rows are labels, columns predictions; None: no figure.
        """
        if self._open() is None:  # a figure of 151 classes takes a second
            return
        means = {"old": results.miou_old, "new": results.miou_new, "all": results.miou_all}
        means["harmonic"] = results.harmonic_mean
        self.scalars({f"miou/{name}": value for name, value in means.items()}, step)
        self.scalar("mean_forgetting", results.mean_forgetting, step)
        tags = _tags(results.class_iou)
        self.scalars({f"iou/{tags[name]}": value for name, value in results.class_iou.items()}, step)
        self.text("results", "\n\n".join(markdown_table(*table) for table in results.tables()), step)
        if confusion is not None:
            names = {index: name for name, index in results.indices.items()}
            class_names = [names.get(index, "not evaluated") for index in range(len(confusion))]
            with failure_is_a_warning("the confusion matrix in TensorBoard"):
                self.figure("confusion", confusion_figure(confusion, class_names), step)

    def close(self) -> None:
        """Write what is left and close the file."""
        if (writer := self._open()) is not None:
            try:
                writer.close()
            except OSError as error:
                _log.warning("TensorBoard's file is not complete (%s)", error.strerror or error)
                events = writer.file_writer.event_writer
                events._worker.stop()
                events._closed = True  # else its exit hook would try once more, with a traceback
            self._writer = None


def progress(iterable: Iterable[T], *, total: int, desc: str, world: World, interval: int) -> Iterator[T]:
    """Pass the items on and show how far we are, on rank 0.

    Args:
        iterable: the items.
        total: how many there will be.
        desc: what they are, in a few words.
        world: this process.
        interval: items between two log lines, where the standard error is no terminal and no bar is drawn.
    """
    if not world.is_main:
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=desc, leave=False, dynamic_ncols=True)
    else:
        began = time.perf_counter()
        for done, item in enumerate(iterable, start=1):
            yield item  # the consumer works on the item before the next line runs
            if done % interval == 0 or done == total:
                seconds = time.perf_counter() - began
                left = _clock(seconds / done * (total - done))
                _log.info("%s: %d/%d (%.1f/s, %s left)", desc, done, total, done / max(seconds, 1e-9), left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned text table; columns of numbers stand at the right, floats with two decimals.

    Args:
        headers: one title per column.
        rows: cells; None and NaN are shown as a dash.
    """
    shown = [[_cell(cell) for cell in row] for row in rows]
    columns = list(zip(*shown, strict=True)) if shown else [()] * len(headers)
    if len(columns) != len(headers):
        raise ValueError(f"{len(headers)} headers for {len(columns)} columns")
    widths = [max(map(_width, (header, *column))) for header, column in zip(headers, columns, strict=True)]
    right = [bool(column) and all(map(_numeric, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            " " * (width - _width(cell)) + cell if at_right else cell + " " * (width - _width(cell))
            for cell, width, at_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *map(line, shown)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table as ``format_table``'s, in Markdown."""
    shown = [[markdown_text(_cell(cell)) for cell in row] for row in rows]
    columns = list(zip(*shown, strict=True))
    right = [bool(column) and all(map(_numeric, column)) for column in columns] or [False] * len(headers)
    rule = ["---:" if at_right else "---" for at_right in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(headers), rule, *shown])


def markdown_text(text: str) -> str:
    """A text of a user in one line of Markdown, where no letter of it means anything."""
    plain = re.sub(r"([\\`*<>\[\]|~$&])", r"\\\1", " ".join(text.split("\n")))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)  # within a word it means nothing


def _tags(names: Iterable[str]) -> dict[str, str]:
    """A TensorBoard tag for each class: its name with "_" for what tags must not hold.

    A slash would put the class into a group of its own. Of two names with one tag the later has its place
    behind it; classes only join at the end, so every curve keeps its tag.
    """
    tags: dict[str, str] = {}
    for place, name in enumerate(names):
        tag = re.sub(r"[^-.\w]", "_", name)
        while tag in tags.values():
            tag += f"_{place}"
        tags[name] = tag
    return tags


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _numeric(cell: str) -> bool:
    if cell == "–":
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True
