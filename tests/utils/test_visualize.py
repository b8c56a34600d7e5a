import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from utils.errors import UserError
from utils.palette import palette
from utils.visualize import colorize, confusion_image, overlay, prediction_grid, write_samples

NAMES = dict(enumerate(["background", "aeroplane", "bicycle", "bird"]))


def sample(height=20, width=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), rng.integers(0, 4, (height, width))


def test_voc_colours():
    colours = palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    expected[255] = (224, 224, 192)
    assert {index: tuple(colours[index].tolist()) for index in expected} == expected


def test_colours_differ_for_any_number_of_classes():
    assert len(np.unique(palette(5000), axis=0)) == 5000


@pytest.mark.parametrize("kind", [np.uint8, np.int64, torch.uint8, torch.long])
def test_colorize(kind):
    mask = np.array([[0, 1], [20, 255]])
    given = torch.from_numpy(mask).to(kind) if isinstance(kind, torch.dtype) else mask.astype(kind)
    picture = colorize(given)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[0, 0, 0], [128, 0, 0]], [[0, 64, 128], [224, 224, 192]]]
    assert colorize(np.array([[300]]))[0, 0].tolist() == palette(301)[300].tolist()


def test_overlay_leaves_background_and_void_alone():
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    picture = overlay(image, np.array([[0, 1, 255]]))
    assert picture.tolist() == [[[100] * 3, [117, 40, 40], [100] * 3]]
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    np.testing.assert_array_equal(overlay(tensor, torch.tensor([[0, 1, 255]])), picture)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_overlay_refuses_other_images(image):
    with pytest.raises(ValueError, match="uint8"):
        overlay(image, np.zeros((4, 4), int))


def test_grid_of_images_of_several_sizes(tmp_path):
    (first, mask), (second, other) = sample(), sample(40, 24, seed=1)
    path = tmp_path / "new" / "grid.png"
    grid = prediction_grid([first, torch.from_numpy(second)], [mask, other], [mask, other], NAMES, path=path)
    assert grid.dtype == np.uint8 and grid.ndim == 3 and grid.shape[2] == 3
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), grid)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    # The legend's colours are there undiluted.
    colours = {tuple(colour) for colour in grid.reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in palette(4)[1:].tolist()} <= colours


def test_grid_without_any_class_and_with_an_unnamed_one():
    image, mask = sample()
    prediction_grid([image], [np.full_like(mask, 255)], [np.zeros_like(mask)], NAMES)
    prediction_grid([image], [np.full_like(mask, 7)], [mask], NAMES)


def test_grid_needs_as_many_masks_as_images(tmp_path):
    image, mask = sample()
    for arguments in (([], [], []), ([image], [mask], []), ([image], [mask], [mask, mask])):
        with pytest.raises(ValueError, match="at least one"):
            prediction_grid(*arguments, NAMES)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prediction_grid([image], [mask], [mask], NAMES, path=tmp_path / "file" / "grid.png")


@pytest.mark.parametrize(("classes", "cell"), [(4, 30), (40, 30), (41, 12), (151, 12)])
def test_cells_of_a_confusion_matrix(classes, cell):
    counts = np.zeros((classes, classes))
    counts[range(1, classes), range(classes - 1)] = 7  # as the class before; the first is absent
    counts[2] = 2
    names = [f"class {index}" for index in range(classes)]
    image = confusion_image(torch.from_numpy(counts), names, "a title")
    full, none = ((255 * np.asarray(colormaps["Blues"](share)[:3])).astype(int) for share in (1.0, 0.0))
    rows, columns = (image == full).all(axis=2).nonzero()
    left, top = columns.min(), rows.max() + 1 - cell * classes
    corners = image[top + 1 :: cell, left + 1 :: cell][:classes, :classes]  # beside the numbers
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.testing.assert_array_equal((corners == full).all(axis=2), shares == 100)
    np.testing.assert_array_equal((corners == none).all(axis=2), shares == 0)
    inside = image[top : top + cell * classes, left : left + cell * classes]
    assert (inside == 255).all(axis=2).any() == (classes <= 40), "white numbers"
    assert not np.array_equal(image, confusion_image(counts, names[::-1], "a title"))
    assert not np.array_equal(image, confusion_image(counts, names))


def test_grid_with_the_old_models_prediction_has_a_column_more():
    image, mask = sample()
    without = prediction_grid([image], [mask], [mask], NAMES)
    assert prediction_grid([image], [mask], [mask], NAMES, old_predictions=[mask]).shape[1] > without.shape[1]
    with pytest.raises(ValueError, match="at least one"):
        prediction_grid([image], [mask], [mask], NAMES, old_predictions=[])


def test_samples_of_every_step_lie_side_by_side(tmp_path):
    (image, mask), (large, other) = sample(), sample(400, 800, seed=1)
    for step in (0, 1):
        write_samples(tmp_path / "samples", [image, large], [mask, other], [mask * step, other], step)
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {f"{i}_{kind}.png" for i in (0, 1) for kind in ("input", "truth", "step0", "step1")}

    def read(name):
        with Image.open(tmp_path / "samples" / name) as picture:
            return np.asarray(picture)

    np.testing.assert_array_equal(read("0_input.png"), image)
    np.testing.assert_array_equal(read("0_step0.png"), image)  # all background
    np.testing.assert_array_equal(read("0_step1.png"), overlay(image, mask))
    assert read("1_truth.png").shape == (160, 320, 3)
