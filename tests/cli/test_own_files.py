"""Files that users bring, through the real command: the check says what training and prediction then do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, SMALL, Outcome
from forked import python
from PIL import Image
from small_checkpoint import save_untrained
from small_data import make_own

# One process for several commands.
PROGRAM = """
import json, sys
from run import main

for words in json.loads(sys.argv[1]):
    code = main(words)
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {code}", file=stream, flush=True)
"""


def commands(folder: Path, *several: list[str | Path], **environment: str) -> list[Outcome]:
    """Every command's outcome, one after the other in one process. ``folder``: for a file."""
    (folder / "program.py").write_text(PROGRAM)
    words = json.dumps([[os.fspath(word) for word in one] for one in several])
    done = python(folder / "program.py", words, **environment)
    assert done.returncode == 0, done.stderr
    outs, errs = (stream.split("=== ") for stream in (done.stdout, done.stderr))
    codes = [int(part.split("\n")[0]) for part in outs[1:]]
    outs[1:], errs[1:] = ([part.partition("\n")[2] for part in parts[1:]] for parts in (outs, errs))
    return [Outcome(*each) for each in zip(codes, outs, errs, strict=False)]


def make_data(root: Path) -> Path:
    (make_own(root) / "classes.txt").write_text("".join(f"class {i}\n" for i in range(13)))
    return root


def void_masks(root: Path) -> None:
    for path in (root / "masks" / "train").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)


def float_image(root: Path) -> None:
    path = root / "images" / "train" / "train_00000003.jpg"
    Image.fromarray(np.ones((64, 64), np.float32)).save(path.with_suffix(".tif"))
    path.unlink()


def other_encoding(root: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        path = root / kind / "train" / f"train_00000003.{suffix}"
        try:
            path.rename(path.with_name(os.fsdecode(b"caf\xe9.") + suffix))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")


def test_what_training_refuses_the_check_has_told(tmp_path: Path) -> None:
    wanted = {
        float_image: ("train_00000003.tif", "floating-point numbers", "8-bit PNG"),
        other_encoding: (r"caf\xe9.jpg", "UTF-8", "rename it"),
        void_masks: ("no training mask shows 1 class 1, 2 class 2", "correct the masks"),
    }
    several: list[list[str | Path]] = []
    for damage in wanted:
        root = make_data(tmp_path / damage.__name__)
        damage(root)
        common = ["--dataset", "folder", f"--data_root=~/{damage.__name__}", "--task", "offline"]
        several += [
            ["--check_data", *common],
            [*common, *SMALL, "--logdir=~/logs", "--name", damage.__name__],
        ]
    outcomes = commands(tmp_path, *several, HOME=str(tmp_path), USERPROFILE=str(tmp_path))
    assert [outcome.code for outcome in outcomes] == [2] * len(several)
    for (checked, trained), words in zip(
        zip(outcomes[::2], outcomes[1::2], strict=True), wanted.values(), strict=True
    ):
        assert "Traceback" not in checked.err + trained.err
        (fault, *_) = [line for line in checked.out.splitlines() if "fault: " in line and words[0] in line]
        for word in words:
            assert word in fault and word in trained.last_error
    assert (tmp_path / "logs" / "offline-folder_float_image" / "train.log").is_file()
    assert not (ROOT / "~").exists(), "a folder named ~"


def test_prediction_takes_every_file_that_training_takes(tmp_path: Path) -> None:
    save_untrained(tmp_path / "step.pth")
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    for suffix in ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "TIF"):
        picture.save(folder / f"{suffix}-{suffix.lower()}.{suffix}")
    others = {os.fsdecode(b"caf\xe9.bmp"), "turned.tif"}
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.tif", exif=exif)
    try:
        (folder / "jpg-jpg.jpg").rename(folder / os.fsdecode(b"caf\xe9.bmp"))
    except OSError:
        others.remove(os.fsdecode(b"caf\xe9.bmp"))
    Image.fromarray(np.ones((40, 48), np.float32)).save(folder / "float.tif")
    (folder / "notes.txt").write_text("no picture")
    words = ["--predict", folder, "--ckpt", tmp_path / "step.pth", "--out", tmp_path / "out"]
    (outcome,) = commands(tmp_path, words)
    assert outcome.code == 2 and "float.tif: the image's pixels are floating-point" in outcome.last_error
    assert "9 of 10 images predicted" in outcome.out
    found = {path.stem: Image.open(path).size for path in (tmp_path / "out" / "predictions").iterdir()}
    assert len(found) == 9 and {Path(name).stem for name in others} <= set(found)
    assert set(found.values()) == {(48, 40)}, "as stored, also where the camera's orientation is another"
