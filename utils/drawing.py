"""Text in pictures that a user chose (names of classes, methods, runs and files), and pictures that fail.

Importing this sets matplotlib up: text is drawn letter by letter, never read as a formula (``Ba$$in``), in a
font that comes with matplotlib, whatever the user's own settings say.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache

import matplotlib
from matplotlib.font_manager import FontEntry, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font

from utils.errors import UserError

log = logging.getLogger(__name__)

_BASE = "DejaVu Sans"
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False, "font.family": [_BASE]})

_fallbacks: dict[str, str] = {}  # further fonts in use: family → file
_warned: list[str] = []  # the first text that no font could draw


def drawable(text: str) -> str:
    """A text as pictures can show it.

    Letters that matplotlib's own font lacks come from an installed font that has them, to which figures made
    from now on fall back. Where there is none, their codes stand in their place (``\\u732b``), and one line
    says so once.
    """
    shown = "".join(letter if _can_draw(letter) else _code(letter) for letter in text)
    if any(letter.isprintable() and not _can_draw(letter) for letter in text):
        _warn_missing(text, shown)
    # matplotlib leaves labels with a leading underscore out of legends; a space of no width goes before it.
    return f"\u200b{shown}" if shown.startswith("_") else shown


def in_one_font(text: str) -> tuple[str, str]:
    """A text as ``drawable`` has it, and the file of a font that has all of its letters, for Pillow."""
    shown = drawable(text)
    for path in (_base_file(), *_fallbacks.values()):
        if _letters(path).issuperset(map(ord, shown)):
            return shown, path
    base = _letters(_base_file())
    return "".join(letter if ord(letter) in base else _code(letter) for letter in shown), _base_file()


@contextlib.contextmanager
def failure_is_a_warning(what: str) -> Iterator[None]:
    """Draw what is no result: a fault of the drawing is a line in the log, and the run goes on.

    Files that cannot be written stop the run as everywhere (``UserError``).

    Args:
        what: is drawn, for the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("%s could not be drawn (%s); the results are not touched", what, reason)
        log.debug("where that was", exc_info=True)


def _can_draw(letter: str) -> bool:
    return letter.isprintable() and (ord(letter) in _letters(_base_file()) or _has_fallback(letter))


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


@cache
def _has_fallback(letter: str) -> bool:
    """Whether an installed font has the letter; that font is in use from then on."""
    if any(ord(letter) in _letters(path) for path in _fallbacks.values()):
        return True
    _register_new_fonts()
    for entry in sorted(fontManager.ttflist, key=_preference):
        if _is_candidate(entry) and FT2Font(entry.fname).get_char_index(ord(letter)):
            _fallbacks[entry.name] = entry.fname
            matplotlib.rcParams["font.family"] = [_BASE, *_fallbacks]
            return True
    return False


@cache
def _register_new_fonts() -> None:
    """Tell matplotlib of fonts that were installed after it made its list."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            # A file that is no font: matplotlib passes over those too when it makes its list.
            with contextlib.suppress(OSError, RuntimeError):
                fontManager.addfont(path)


def _is_candidate(entry: FontEntry) -> bool:
    """Not matplotlib's own (symbols, a last resort whose every letter is a box), nor a Mac's hidden ones."""
    own = entry.fname.startswith(matplotlib.get_data_path())
    return not own and not entry.name.startswith((".", "Last Resort")) and not getattr(entry, "index", 0)


def _preference(entry: FontEntry) -> tuple[object, ...]:
    """Upright, regular, sans fonts first."""
    weight = entry.weight if isinstance(entry.weight, int) else 400
    return entry.style != "normal", abs(weight - 400), "Sans" not in entry.name, entry.name


@cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())


@cache
def _base_file() -> str:
    return findfont(_BASE)


def _warn_missing(text: str, shown: str) -> None:
    if not _warned:
        _warned.append(text)
        log.warning(
            "no installed font has all letters of %s: pictures show such letters by their codes, %s; install "
            "one that has them (Chinese, Japanese, Korean: fonts-noto-cjk)",
            *(text, shown),
        )
