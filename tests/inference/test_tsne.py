"""The t-SNE plot: collected features, and the command."""

from __future__ import annotations

import argparse
import csv
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import python
from PIL import Image
from small_checkpoint import SEGFORMER, save_untrained

from argparser import parse_options
from dataset.decoding import read_image, read_mask
from dataset.step_data import DataSpec, evaluation_data
from dataset.transforms import eval_transform
from inference.load import model_from_checkpoint
from inference.tsne import Reservoir, collect, draw, embed, main, parse
from train import to_device
from utils.distributed import World
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 0, 1, torch.device("cpu"), None)


def small_run(shapes_root: Path) -> str:
    return (
        f"--dataset shapes --data_root {shapes_root} --task 10-5-5 --class_order_seed 3 --step 1 "
        "--backbone mobilenet_v2 --pooling 4 --crop_size 64"
    )


def test_the_command_writes_a_reproducible_plot_and_its_points(shapes_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "step.pth"
    _, opts = save_untrained(path, small_run(shapes_root))

    def command(name: str, seed: int) -> list[str]:
        return shlex.split(
            f"--ckpt {path} --out {tmp_path / name}.png --seed {seed} --images 12 --per_class 6"
        )

    done = python("-m", "inference.tsne", *command("a", 1))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 500
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        assert main(command(name, seed)) == 0
    first, same, other = ((tmp_path / f"{name}.csv").read_bytes() for name in "bcd")
    assert first == same != other

    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ids = Counter(int(row["class_id"]) for row in rows)
    task = opts.task_
    assert set(ids) <= set(task.seen_classes(1)) and len(ids) > 3
    assert max(ids.values()) == 6
    for row in rows:
        assert (row["new"] == "1") == (int(row["class_id"]) in task.new_classes(1))
        assert (shapes_root / "JPEGImages" / row["image"]).is_file()


@pytest.mark.parametrize("layer", ["pre_logits", "body"])
def test_features_are_the_network_s_at_pixels_of_the_class(
    shapes_root: Path, tmp_path: Path, layer: str
) -> None:
    path = tmp_path / "step.pth"
    model, opts = save_untrained(path, small_run(shapes_root))
    network = model_from_checkpoint(path, parse_options(["--ckpt", str(path)]))
    data = evaluation_data(DataSpec.of(network.opts), 1)
    args = argparse.Namespace(images=3, per_class=2, layer=layer, seed=0)
    found = collect(network, data, ALONE, args)
    assert max(Counter(found.classes.tolist()).values()) == 2
    model.to(memory_format=torch.channels_last).intermediates = frozenset({layer})
    for vector, index, (image, row, column) in zip(
        found.vectors, found.classes, found.places.tolist(), strict=True
    ):
        file = data.test.dataset.images[image]
        mask = read_mask(shapes_root / "SegmentationClassAug" / f"{file.stem}.png")
        cropped, labels = eval_transform(64)(read_image(file), mask)
        with torch.no_grad():
            features = model(to_device(cropped[None], ALONE.device))[1][layer][0]
        assert np.array_equal(vector, features[:, row, column].numpy())
        stride = 64 // features.shape[1]
        centre = labels[0, row * stride + stride // 2, column * stride + stride // 2]
        assert opts.task_.order[index] == centre


def test_a_reservoir_is_bounded_leaves_void_out_and_draws_evenly() -> None:
    reservoir = Reservoir(30, np.random.default_rng(0))
    labels = torch.tensor([[0, 0, 1, 255]]).repeat(8, 1)
    for image in range(200):
        reservoir.add(image, torch.full((3, 8, 4), float(image)), labels)
    found = reservoir.content()
    assert Counter(found.classes.tolist()) == {0: 30, 1: 30}
    assert np.array_equal(found.vectors[:, 0], found.places[:, 0])
    assert (found.places[found.classes == 1][:, 2] == 2).all()
    first_half = (found.places[:, 0] < 100).mean()
    assert 0.25 < first_half < 0.75
    assert len(Reservoir(3, np.random.default_rng(0)).content().classes) == 0


def test_clusters_stay_apart() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 40)
    vectors = (rng.normal(size=(3, 80))[classes] * 5 + rng.normal(size=(120, 80))).astype(np.float32)
    points = embed(vectors, seed=3)
    assert np.array_equal(points, embed(vectors, seed=3))
    centres = np.stack([points[classes == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(1)
    assert np.array_equal(nearest, classes)


@pytest.mark.parametrize("old", [0, 2])
def test_legend_names_every_class_under_old_or_new(old: int) -> None:
    classes = np.array([0, 0, 1, 2, 2])
    figure = draw(np.zeros((5, 2)), classes, ["background", "cat", "dog"], (0, 7, 3), old=old)
    axes = figure.axes[0]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    expected = ["classes", "background", "cat", "dog"]
    assert words == (["old classes", "background", "cat", "new classes", "dog"] if old else expected)
    colours = [tuple(np.rint(255 * c.get_facecolor()[0][:3]).astype(int).tolist()) for c in axes.collections]
    assert colours == [(0, 0, 0), (128, 128, 128), (128, 128, 0)]
    corners = [len(c.get_paths()[0].vertices) for c in axes.collections]
    assert (corners[2] != corners[0]) == bool(old)


def test_segformer_and_a_missing_data_set(shapes_root: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "step.pth"
    save_untrained(path, f"{SEGFORMER} --data_root {tmp_path / 'gone'} --crop_size 64")
    common = ["--ckpt", str(path), "--images", "4", "--per_class", "3"]
    assert main(common) == 2
    assert f"--data_root {tmp_path / 'gone'}: no such folder" in capsys.readouterr().err
    assert main([*common, "--data_root", str(shapes_root)]) == 0
    assert (tmp_path / "step_tsne.png").is_file() and (tmp_path / "step_tsne.csv").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--ckpt FILE is required"),
        ("--ckpt a.pth --images 0", "--images: 0 is not .* at least 1"),
        ("--ckpt a.pth --per_class inf", "--per_class: inf is not a whole number"),
        ("--ckpt a.pth --out a.jpg", r"--out a\.jpg: .* \.png"),
        ("--ckpt a.pth --imags 3", "unknown option --imags"),
        ("--ckpt a.pth --out a.png --check_data", "--check_data: t-SNE only draws a plot; drop it"),
        ("--ckpt a.pth --test --epochs 3", "--test: t-SNE only draws a plot; drop it"),
        ("--ckpt a.pth --out a.png --predict=z", "--predict: t-SNE only draws a plot; drop it"),
    ],
)
def test_wrong_options(argv: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(shlex.split(argv))
