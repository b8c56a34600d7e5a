"""Names that users chose, in pictures."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from inference.legend import with_legend
from inference.tsne import draw
from session.tensorboard import _tags
from utils import drawing
from utils.drawing import drawable, failure_is_a_warning, font
from utils.errors import UserError
from utils.visualize import confusion_image, prediction_grid

ROOT = Path(__file__).resolve().parents[2]
STRANGE = [
    "background",
    "Ba$$in",
    "$\\frac{$",
    "a b+c|d",
    "_hidden",
    "tab\there",
    "100 %",
    "x^2_3",
    "\\alpha",
]


def write_font(path: Path, letters: str) -> None:
    """A font whose letters are squares."""
    pen = TTGlyphPen(None)
    for place, point in enumerate(((100, 0), (100, 700), (800, 700), (800, 0))):
        (pen.lineTo if place else pen.moveTo)(point)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Squares Sans", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    path.parent.mkdir(parents=True)
    font.save(path)


def test_strange_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    mask = np.arange(len(STRANGE))[None].repeat(9, 0)
    picture = np.zeros((*mask.shape, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_image(np.eye(len(STRANGE)), STRANGE)
        prediction_grid([picture], [mask], [mask], dict(enumerate(STRANGE)), path=tmp_path / "grid.png")
        points = draw(np.zeros((9, 2)), np.arange(9), STRANGE, range(9), old=0, title="run $a$")
        points.savefig(tmp_path / "tsne.png")
    shown = [font(name, 12)[0] for name in STRANGE]
    assert shown == [name if "\t" not in name else "tab\\there" for name in map(drawable, STRANGE)]
    legend = [text.get_text().strip("\u200b") for text in points.axes[0].get_legend().get_texts()]
    assert legend == ["classes", *(name.replace("\t", "\\t") for name in STRANGE)], "none is left out"
    assert with_legend(picture, mask, STRANGE).shape[0] > 9


def test_characters_that_no_font_has_are_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drawing, "_has_fallback", lambda letter: False)
    monkeypatch.setattr(drawing, "_warned", [])
    with caplog.at_level(logging.WARNING):
        assert drawable("big 猫") == "big \\u732b"
        assert drawable("鹰") == "\\u9e70"
        assert font("猫", 12)[0] == "\\u732b"
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no installed font has all characters of big 猫"
    ]


def test_a_font_that_has_the_letters_is_used(tmp_path: Path) -> None:
    """Also one that was installed after matplotlib made its list of fonts."""
    write_font(tmp_path / "fonts" / "squares.ttf", "猫鹰")
    program = """
import warnings
warnings.simplefilter("error")
import numpy as np
from utils.drawing import drawable, font
from inference.legend import with_legend
from utils.visualize import confusion_image
names = ["background", "猫", "big 鹰"]
assert [drawable(name) for name in names] == names
confusion_image(np.eye(3), names)
assert font("猫", 12) == ("猫", font("鹰", 12)[1]) != font("cat", 12)
plain = with_legend(np.zeros((9, 9, 3), np.uint8), np.full((9, 9), 1), names)
assert (plain[9:].max(axis=2) < 90).any(), "something black stands beside the box"
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_drawing_that_fails_is_a_line_and_a_full_disk_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), failure_is_a_warning("the picture"):
        raise ValueError("\nBa$$in\n  ^")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("the picture could not be drawn (ValueError: Ba$$in ^)")
    with pytest.raises(UserError), failure_is_a_warning("the picture"):
        raise UserError("no space")
    with pytest.raises(KeyboardInterrupt), failure_is_a_warning("the picture"):
        raise KeyboardInterrupt


def test_every_class_has_a_tag_of_its_own() -> None:
    names = ["background", "a b", "a+b", "a/b", "猫", "a_b_2"]
    tags = _tags(names)
    assert list(tags.values()) == ["background", "a_b", "a_b_2", "a_b_3", "猫", "a_b_2_5"]
    assert _tags(names[:3]) == {name: tags[name] for name in names[:3]}, "curves go on in the next step"
