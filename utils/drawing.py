"""User-chosen text in figures (names of classes, methods, runs and files), and errors while drawing.

Importing this module configures matplotlib, whatever the user's settings are: text is never parsed as a
formula (``Ba$$in``) and is drawn in a font that comes with matplotlib.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont

from utils.errors import UserError

log = logging.getLogger(__name__)

_BASE = "DejaVu Sans"
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False, "font.family": [_BASE]})

_fallbacks: dict[str, str] = {}  # fallback fonts in use: family → file
_warned: list[str] = []  # the first text with characters that no font has


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """A figure of a size in inches that pyplot does not register: no need to close it, no display needed."""
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def render(figure: Figure) -> Image.Image:
    """The figure as an RGB image, drawn once; ``savefig`` draws twice, the first time for the layout."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def drawable(text: str) -> str:
    """The text with undrawable characters replaced.

    Characters that matplotlib's font lacks are drawn in an installed font that has them, which becomes a
    fallback font of later figures. If there is none, the character is replaced by its code (``\\u732b``), and
    a warning is logged once.
    """
    shown = "".join(char if _can_draw(char) else _code(char) for char in text)
    if any(char.isprintable() and not _can_draw(char) for char in text):
        _warn_missing(text, shown)
    # matplotlib omits labels with a leading underscore from legends; a zero-width space prevents that.
    return f"\u200b{shown}" if shown.startswith("_") else shown


def font(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """For Pillow: the text as from ``drawable``, and one font that has all its characters.

    ``size``: of the letters, in pixels. A character that only another font has is replaced by its code.
    """
    shown = drawable(text)
    for path in (_base_file(), *_fallbacks.values()):
        if _characters(path).issuperset(map(ord, shown)):
            return shown, _font(path, size)
    base = _characters(_base_file())
    shown = "".join(char if ord(char) in base else _code(char) for char in shown)
    return shown, _font(_base_file(), size)


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@contextlib.contextmanager
def failure_is_a_warning(what: str) -> Iterator[None]:
    """Log an error in the ``with`` block, which draws, as a warning and continue.

    A ``UserError`` (a file that cannot be written) is raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("%s could not be drawn (%s); the results are not affected", what, reason)
        log.debug("traceback of the error while drawing", exc_info=True)


def _can_draw(char: str) -> bool:
    return char.isprintable() and (ord(char) in _characters(_base_file()) or _has_fallback(char))


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


@cache
def _has_fallback(char: str) -> bool:
    """Whether an installed font has the character; that font becomes a fallback font."""
    if any(ord(char) in _characters(path) for path in _fallbacks.values()):
        return True
    _register_new_fonts()
    for entry in sorted(fontManager.ttflist, key=_preference):
        if _is_candidate(entry) and FT2Font(entry.fname).get_char_index(ord(char)):
            _fallbacks[entry.name] = entry.fname
            matplotlib.rcParams["font.family"] = [_BASE, *_fallbacks]
            return True
    return False


@cache
def _register_new_fonts() -> None:
    """Register fonts with matplotlib that were installed after it cached its list."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            # Not a font file: skipped, as matplotlib does.
            with contextlib.suppress(OSError, RuntimeError):
                fontManager.addfont(path)


def _is_candidate(entry: FontEntry) -> bool:
    """Excludes matplotlib's own fonts (symbols, the last-resort boxes) and hidden fonts of macOS."""
    own = entry.fname.startswith(matplotlib.get_data_path())
    return not own and not entry.name.startswith((".", "Last Resort")) and not getattr(entry, "index", 0)


def _preference(entry: FontEntry) -> tuple[object, ...]:
    """Sort key: upright, regular, sans fonts first."""
    weight = entry.weight if isinstance(entry.weight, int) else 400
    return entry.style != "normal", abs(weight - 400), "Sans" not in entry.name, entry.name


@cache
def _characters(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())


@cache
def _base_file() -> str:
    return findfont(_BASE)


def _warn_missing(text: str, shown: str) -> None:
    if not _warned:
        _warned.append(text)
        log.warning(
            "no installed font has all characters of %s: images show their codes instead, %s; install a font "
            "that has them (Chinese, Japanese, Korean: fonts-noto-cjk)",
            *(text, shown),
        )
