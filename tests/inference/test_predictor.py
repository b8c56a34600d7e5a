"""Prediction from a checkpoint, on real files."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import DEEPLAB, SEGFORMER, save_untrained

from argparser import parse_options
from dataset.decoding import read_image
from dataset.transforms import normalize
from inference import images as module
from inference.images import Predictor, find_images, predict
from inference.legend import with_legend
from inference.load import model_from_checkpoint
from inference.multiscale import FusedPrediction
from utils.distributed import World
from utils.errors import DataError, UserError
from utils.palette import palette
from utils.visualize import overlay

ALONE = World(0, 0, 1, torch.device("cpu"), None)


def write_image(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST).save(path)
    return path


def run(folder: Path, ckpt: Path, *more: str) -> tuple[int, Path]:
    """Predict an image or folder; returns the exit code and the folder of results."""
    out = folder.parent / "out"
    argv = ["--predict", folder, "--out", out, "--ckpt", ckpt, *more]
    return predict(parse_options([str(word) for word in argv]), ALONE), out


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deeplab") / "step.pth"
    save_untrained(path)
    return path


@pytest.mark.parametrize("options", [DEEPLAB, SEGFORMER, f"{DEEPLAB} --unknown"])
def test_raw_masks_are_the_arg_max_of_the_network_in_data_set_ids(tmp_path: Path, options: str) -> None:
    model, opts = save_untrained(tmp_path / "step.pth", options)
    file = write_image(tmp_path / "in" / "a.png", 70, 91)
    with torch.no_grad():
        logits, _ = model(normalize(read_image(file)[None]))
        classes = model.scores(logits).argmax(1)[0].numpy()
    wanted = np.array(opts.task_.seen_classes(1))[classes]
    assert len(np.unique(wanted)) > 2
    assert not np.array_equal(wanted, classes), "the task's order is not the data set's"
    for raw in (["--raw"], []):  # the second time over the files of the first
        code, out = run(file, tmp_path / "step.pth", *raw)
        assert code == 0
        with Image.open(out / "predictions" / "a.png") as mask:
            assert mask.mode == ("L" if raw else "P")
            assert np.array_equal(np.asarray(mask), wanted)
            if not raw:
                assert mask.getpalette() == palette().flatten().tolist()


def test_overlays_keep_the_image_and_name_the_classes(tmp_path: Path, ckpt: Path) -> None:
    file = write_image(tmp_path / "in" / "a.png", 80, 120)
    _, out = run(file, ckpt)
    with Image.open(out / "predictions" / "a.png") as mask, Image.open(out / "overlays" / "a.png") as shown:
        ids, picture = np.asarray(mask), np.asarray(shown)
    np.testing.assert_array_equal(picture[:80, :120], overlay(read_image(file), ids))
    legend = {tuple(colour) for colour in picture[80:].reshape(-1, 3).tolist()}
    for c in set(np.unique(ids).tolist()) - {0}:
        assert tuple(palette()[c].tolist()) in legend


def test_legend_has_more_lines_if_names_do_not_fit() -> None:
    picture, mask = np.full((10, 400, 3), 7, np.uint8), np.array([[0, 1, 2, 255]])
    few = with_legend(picture, mask, ["background", "cat", "dog"])
    assert few.shape[1] == 400 and (few[:10] == 7).all()
    many = with_legend(picture, mask, ["background", "a name " * 8, "another name " * 5])
    assert many.shape[0] > few.shape[0] and many.shape[1] > 400


@pytest.mark.parametrize("options", [DEEPLAB, SEGFORMER])
def test_any_size_and_several_scales(tmp_path: Path, options: str) -> None:
    save_untrained(tmp_path / "step.pth", options)
    sizes = [(1, 1), (3, 200), (31, 33), (67, 129)]
    for height, width in sizes:
        write_image(tmp_path / "in" / f"{height}.jpg", height, width)
    fused = ("--test_scales", "0.5", "1.25", "--test_flip", "--fusion-mode", "max", "--opt_level", "O1")
    for more in ((), fused):
        code, out = run(tmp_path / "in", tmp_path / "step.pth", *more)
        assert code == 0
        for height, width in sizes:
            with Image.open(out / "predictions" / f"{height}.png") as mask:
                assert mask.size == (width, height)


def test_scales_and_flip_are_those_of_the_evaluation(tmp_path: Path) -> None:
    model, opts = save_untrained(tmp_path / "step.pth")
    image = read_image(write_image(tmp_path / "a.png", 64, 96))
    argv = f"--predict x --out x --ckpt {tmp_path / 'step.pth'} --test_scales 0.75 1.5 --test_flip"
    network = model_from_checkpoint(tmp_path / "step.pth", parse_options(shlex.split(argv)))
    found = Predictor(network, torch.device("cpu"))(image).numpy()
    with torch.no_grad():
        scores = FusedPrediction([0.75, 1.5], True, "mean")(model, normalize(image[None]))
    wanted = np.array(opts.task_.seen_classes(1))[scores.argmax(1)[0].numpy()]
    assert np.array_equal(found, wanted)


def test_folders_keep_their_structure(tmp_path: Path) -> None:
    names = ["a.png", "sub/b.JPG", "sub/deep/c.jpeg", ".hidden/d.png", "sub/.e.png", "sub/f.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "old.png").touch()
    found = find_images(tmp_path, tmp_path)
    assert list(map(str, found)) == ["a.png", "sub/b.png", "sub/deep/c.png"]
    assert [path.name for path in found.values()] == ["a.png", "b.JPG", "c.jpeg"]
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.png: a\.jpg would get the same name"):
        find_images(tmp_path, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no image"):
        find_images(tmp_path / "empty", tmp_path)


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path: Path) -> None:
    photos, names = tmp_path / "photos", ("photos/a.png", "photos/own/b.png", "else/c.png", "else/.d.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"linked": "../else", "again": "../else", "first": "own", "own/loop": "..", "linked/loop": "."}
    for name, target in links.items():
        (photos / name).symlink_to(target)
    (photos / ".hidden").symlink_to("../else")
    (tmp_path / "out" / "predictions").mkdir(parents=True)
    (tmp_path / "out" / "predictions" / "old.png").touch()
    (photos / "results").symlink_to("../out")
    found = find_images(photos, tmp_path / "out")
    assert {str(name): file.relative_to(photos) for name, file in found.items()} == {
        name: Path(name) for name in ("a.png", "again/c.png", "own/b.png")
    }


def test_broken_links_and_pipes_are_left_out_with_a_line(
    tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_image(tmp_path / "in" / "a.png", 40, 40).parent
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    said = {
        "broken.png": "a broken link; correct or remove it",
        "loop.png": "a broken link; correct or remove it",
        "pipe.png": "not a regular file; give an image, or a folder of images",
    }
    code, out = run(folder, ckpt)
    assert code == 2 and [path.name for path in (out / "predictions").iterdir()] == ["a.png"]
    lines = [f"run.py: error: {folder / name}: {reason}" for name, reason in said.items()]
    assert capsys.readouterr().err.splitlines() == lines
    for name, reason in said.items():
        with pytest.raises(UserError, match=f"^--predict .*{name}: {reason}"):
            find_images(folder / name, out)


def test_one_image_is_counted_as_one(tmp_path: Path, ckpt: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run(write_image(tmp_path / "in" / "a.png", 40, 40), ckpt)
    assert "classes; 1 image\n" in caplog.text and "1 of 1 image predicted" in caplog.text


def test_a_released_checkpoint_needs_the_options_typed(tmp_path: Path) -> None:
    path = tmp_path / "released.pth"
    model, _ = save_untrained(path, manifest=False)
    base = f"--predict x --out x --ckpt {path}"
    with pytest.raises(UserError, match=r"released\.pth: has no manifest; type --dataset, --task and --step"):
        model_from_checkpoint(path, parse_options(shlex.split(base)))
    network = model_from_checkpoint(path, parse_options(shlex.split(f"{base} {DEEPLAB}")))
    assert all(torch.equal(a, b) for a, b in zip(network.model.parameters(), model.parameters(), strict=True))
    other = DEEPLAB.replace("mobilenet_v2", "resnet50")
    with pytest.raises(UserError, match=r"released\.pth: the checkpoint .* another network"):
        model_from_checkpoint(path, parse_options(shlex.split(f"{base} {other}")))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--model segformer_b0", "has --model deeplab, not segformer_b0"),
        ("--backbone resnet50", "has --backbone mobilenet_v2, not resnet50"),
        ("--dataset voc", "is of --dataset shapes, not voc"),
        ("--dataset shapes --task 15-5", "is of --task 10-5-5, not 15-5"),
        ("--dataset shapes --task 10-5-5 --class_order_seed 3 --step 2", "is of step 1, not 2"),
    ],
)
def test_typed_options_must_fit(ckpt: Path, typed: str, words: str) -> None:
    opts = parse_options(shlex.split(f"--predict x --out x --ckpt {ckpt} {typed}"))
    with pytest.raises(UserError, match=words):
        model_from_checkpoint(ckpt, opts)


def test_typed_options_that_fit_have_priority(ckpt: Path) -> None:
    opts = parse_options(shlex.split(f"--predict x --out x --ckpt {ckpt} --pooling 7 --crop_size 96"))
    network = model_from_checkpoint(ckpt, opts)
    assert network.model.network.head.pooling == 7
    assert (network.opts.crop_size, network.opts.dataset, network.step) == (96, "shapes", 1)
    assert opts.dataset == "voc", "the caller's options stay"


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [[0, "a"], [1]]},
        {"steps": []},
        {"step": 9},
        {"step": "1"},
        {"dataset": "none"},
        {"task": None},
        {"options": {"pooling": "many"}},
        {"options": {"backbone": "vgg"}},
    ],
)
def test_an_invalid_manifest_is_one_line(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "step.pth"
    save_untrained(path, **changes)
    with pytest.raises(UserError, match=r"step\.pth: its manifest has .*; give another checkpoint") as error:
        model_from_checkpoint(path, parse_options(shlex.split(f"--predict x --out x --ckpt {path}")))
    assert "\n" not in str(error.value)


def test_own_classes_have_names_if_their_file_exists(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("nothing\ncat\ndog\n")
    path = tmp_path / "step.pth"
    save_untrained(
        path,
        f"--dataset folder --data_root {tmp_path} --task 1-1 --step 1 --backbone mobilenet_v2 --pooling 0",
    )
    opts = parse_options(shlex.split(f"--predict x --out x --ckpt {path}"))
    assert model_from_checkpoint(path, opts).class_names == ("nothing", "cat", "dog")
    (tmp_path / "classes.txt").unlink()
    assert model_from_checkpoint(path, opts).class_names == ("class 0", "class 1", "class 2")


def test_an_image_larger_than_memory_is_named(tmp_path: Path) -> None:
    def too_large(image: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**50)

    with pytest.raises(DataError, match=r"a\.png: 5×4 pixels need more memory"):
        module._within_memory(tmp_path / "a.png", too_large, torch.zeros(3, 4, 5))
