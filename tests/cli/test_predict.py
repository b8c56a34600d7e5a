"""``--predict`` as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from command import SMALL, Launch, Outcome, launch
from PIL import Image
from small_checkpoint import save_untrained

from run import main


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "step.pth"
    save_untrained(path)
    return path


@pytest.fixture
def photos(tiny_data: Path, tmp_path: Path) -> Path:
    """Five pictures in two folders."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, file in enumerate(sorted((tiny_data / "JPEGImages").iterdir())[:5]):
        shutil.copy(file, folder / "sub" / file.name if number % 2 else folder / file.name)
    return folder


def masks(out: Path) -> dict[str, np.ndarray]:
    folder = out / "predictions"
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def test_a_trained_step_needs_only_its_checkpoint(cli: Launch, photos: Path, tmp_path: Path) -> None:
    options = ("--task", "15-5", "--overlap", "--logdir", tmp_path, "--name", "FT")
    trained = cli(*SMALL, *options)
    assert trained.code == 0, trained.err
    path = tmp_path / "15-5-shapes_FT" / "15-5-shapes_FT_0.pth"
    outcome = launch("--predict", photos, "--out", tmp_path / "out", "--ckpt", path)
    assert outcome.code == 0, outcome.err
    assert "step 0 of task 15-5 on shapes, 16 classes; 5 images" in outcome.out
    assert f"5 of 5 images predicted into {tmp_path / 'out'}" in outcome.out.splitlines()[-1]
    found = masks(tmp_path / "out")
    wanted = {str(path.relative_to(photos).with_suffix(".png")) for path in photos.rglob("*.jpg")}
    assert set(found) == wanted
    for name, mask in found.items():
        assert mask.shape == (64, 64) and mask.max() < 16
        assert (tmp_path / "out" / "overlays" / name).is_file()


def test_two_processes_share_the_pictures_and_a_broken_one_is_left_out(
    photos: Path, ckpt: Path, tmp_path: Path
) -> None:
    common = ("--predict", photos, "--ckpt", ckpt, "--raw")
    alone = launch(*common, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    (photos / "sub" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    both = launch(*common, "--out", tmp_path / "both", processes=2)
    # torchrun makes a 1 of its processes' 2.
    assert both.code != 0 and "5 of 6 images predicted" in both.out
    assert f"run.py: error: {photos}/sub/broken.jpg: the image cannot be read" in both.err
    again = launch(*common, "--out", tmp_path / "again")
    assert again.code == 2 and "broken.jpg" in again.last_error and "Traceback" not in again.err
    first, second, third = (masks(tmp_path / name) for name in ("alone", "both", "again"))
    assert set(first) == set(second) == set(third) and len(first) == 5
    assert all(np.array_equal(first[name], mask) for name, mask in [*second.items(), *third.items()])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--predict", "{photos}", "--ckpt", "{ckpt}"], ["--predict needs --out"]),
        (["--predict", "{photos}", "--out", "{out}"], ["--predict needs --ckpt"]),
        (["--predict", "{photos}/no", "--out", "{out}", "--ckpt", "{ckpt}"], ["photos/no", "no such file"]),
        (["--predict", "{photos}", "--out", "{out}", "--ckpt", "no.pth"], ["no.pth: no such checkpoint"]),
        (["--predict", "{ckpt}", "--out", "{out}", "--ckpt", "{ckpt}"], ["step.pth", "cannot be read"]),
        (["--predict", "{photos}", "--out", "{ckpt}", "--ckpt", "{ckpt}"], ["step.pth/", "another --out"]),
        (["--predict", "{photos}", "--out", "{out}", "--ckpt", "{ckpt}", "--test"], ["--predict and --test"]),
        (["--raw"], ["--raw goes with --predict"]),
        (["--test", "--test_scales", "0"], ["--test_scales: 0 is not a number of at least"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    photos: Path,
    ckpt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    # In this process: importing torch nine times would take a minute.
    code = main([word.format(photos=photos, ckpt=ckpt, out=tmp_path / "out") for word in arguments])
    outcome = Outcome(code, *capsys.readouterr())
    assert outcome.code == 2, outcome.err
    for word in words:
        assert word in outcome.last_error
    assert not masks(tmp_path / "out")
