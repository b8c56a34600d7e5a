import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dataset.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RandomCropFlip,
    ScaleCropFlip,
    eval_transform,
    normalize,
    train_transform,
)


def ramp(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose red is its row, green its column; the mask is the image's blue, a coarse checker."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((y // 25 + x // 25) % 2 * 200).to(torch.uint8)
    image = torch.stack([(y * 255 // height).to(torch.uint8), (x * 255 // width).to(torch.uint8), mask])
    return image, mask[None]


@pytest.mark.parametrize(("height", "width"), [(300, 400), (120, 90), (64, 500)])
def test_image_and_mask_stay_in_step(height: int, width: int) -> None:
    image, mask = ramp(height, width)
    crop = train_transform(128)
    torch.manual_seed(0)
    for _ in range(20):
        out, target = crop(image, mask)
        assert out.shape == (3, 128, 128) and target.shape == (1, 128, 128)
        assert out.dtype == target.dtype == torch.uint8
        assert set(target.unique().tolist()) <= {0, 200}
        # The image's blue, cut at half height, is the mask, but for ties on the checker's lines. A mask
        # resized with torch's plain `nearest` is off by half a pixel and differs in 2 to 14 % of the pixels.
        differ = (out[2] > 100) != (target[0] > 100)
        assert differ.float().mean() < 0.005


def test_crops_cover_what_the_published_recipe_draws() -> None:
    """Rows run down, columns to the right or, flipped, to the left; areas lie in 0.5..1 (2 does not fit)."""
    image, mask = ramp(300, 400)
    torch.manual_seed(0)
    flips, areas, whole = 0, [], 0
    for _ in range(300):
        out, _ = RandomCropFlip(96)(image, mask)
        rows, columns = out[0, :, 48].int(), out[1, 48].int()
        assert (rows.diff() >= 0).all()
        flips += int(columns[0] > columns[-1])
        area = (rows[-1] - rows[0]) * abs(columns[-1] - columns[0]) / 255**2
        areas.append(float(area))
        whole += int(area > 0.96)
    assert 110 < flips < 190
    assert 0.45 < min(areas) < 0.6 and whole > 10


def pillow_scale_crop(
    image: torch.Tensor, mask: torch.Tensor, crop: int, released: bool
) -> tuple[np.ndarray, np.ndarray]:
    """SSUL's RandomScale(0.5, 2), RandomCrop(pad_if_needed) and flip, restated with Pillow and `random`.

    Released, a side that is too short pads all four sides; the labels' padding is 0 there, else void.
    """
    height, width = image.shape[1:]
    scale = random.uniform(0.5, 2.0)
    width, height = int(width * scale), int(height * scale)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    labels = Image.fromarray(mask[0].numpy()).resize((width, height), Image.Resampling.NEAREST)
    rows = columns = 0
    if width < crop:
        columns = int((1 + crop - width) / 2)
        rows = columns if released else 0
    if height + 2 * rows < crop:
        more = int((1 + crop - height - 2 * rows) / 2)
        rows, columns = rows + more, columns + (more if released else 0)
    sides = ((rows, rows), (columns, columns))
    pixels = np.pad(np.asarray(picture), (*sides, (0, 0)))
    targets = np.pad(np.asarray(labels), sides, constant_values=0 if released else 255)
    top, left = (random.randint(0, side - crop) for side in targets.shape)
    pixels, targets = (a[top : top + crop, left : left + crop] for a in (pixels, targets))
    if random.random() < 0.5:
        pixels, targets = pixels[:, ::-1], targets[:, ::-1]
    return pixels, targets


class Draws:
    """Hands the numbers that Python's `random` drew to `torch`, in the order in which both ask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[float] = []
        for name in ("uniform", "randint", "random"):
            monkeypatch.setattr(random, name, self.note(getattr(random, name)))
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *_: tensor.fill_(self.drawn.pop(0)))
        monkeypatch.setattr(torch, "randint", lambda *_: self.drawn.pop(0))
        monkeypatch.setattr(torch, "rand", lambda *_: self.drawn.pop(0))

    def note(self, function: Callable[..., float]) -> Callable[..., float]:
        def noted(*arguments: float) -> float:
            self.drawn.append(function(*arguments))
            return self.drawn[-1]

        return noted


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(("height", "width"), [(301, 401), (131, 61), (65, 251), (129, 129)])
def test_scale_crop_equals_pillow(
    height: int, width: int, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws give the same pixels, whichever sides are too short.

    Of odd sides no pixel of the mask lies just between two of the resized one, which Pillow rounds otherwise.
    """
    image, mask = ramp(height, width)
    mask = mask + 1
    crop = train_transform(128, "scale_crop", released=released)
    assert isinstance(crop, ScaleCropFlip)
    random.seed(height)
    draws = Draws(monkeypatch)
    padded = 0
    for _ in range(12):
        pixels, targets = pillow_scale_crop(image, mask, 128, released)
        # Torch keeps the factor in float32.
        draws.drawn[0] = float(np.float32(draws.drawn[0]))
        out, target = crop(image, torch.cat([mask, mask]))
        assert draws.drawn == []
        assert np.array_equal(target[0].numpy(), targets)
        assert np.abs(out.permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 1
        outside = target[0] == (0 if released else 255)
        assert torch.equal(target[1], torch.where(outside, 0, target[0])), "of other channels nothing is void"
        assert not out[:, outside].any()
        padded += int(outside.any())
    assert padded or height == 301


@pytest.mark.parametrize("released", [False, True])
def test_scale_crops_are_distributed_as_the_release_draws_them(released: bool) -> None:
    """Sizes, places and flips of 1500 crops of each, by their distribution functions (Kolmogorov-Smirnov)."""
    count, crop = 1500, 11
    mask = torch.arange(1, 10 * 14 + 1, dtype=torch.uint8).view(1, 10, 14)
    image = mask.expand(3, -1, -1)
    transform = ScaleCropFlip(crop, released=released)
    torch.manual_seed(1)
    random.seed(1)
    found = np.empty((2, count, 6))
    for i in range(count):
        ours = transform(image, mask)[1][0].numpy()
        theirs = pillow_scale_crop(image, mask, crop, released)[1]
        for side, targets in enumerate((ours, theirs)):
            inside = targets[(targets > 0) & (targets < 255)].astype(int) - 1
            columns = inside % 14 if inside.size else np.zeros(1)
            found[side, i] = (
                *(inside.size, len(np.unique(inside)), inside.min(initial=200), inside.max(initial=0)),
                *(columns[0], columns[-1]),
            )
    for place, name in enumerate(("size", "detail", "first", "last", "left", "right")):
        ours, theirs = found[:, :, place]
        values = np.unique([*ours, *theirs])
        below = [np.searchsorted(np.sort(sample), values, side="right") / count for sample in (ours, theirs)]
        assert np.abs(below[0] - below[1]).max() < 1.95 * np.sqrt(2 / count), f"{name}: p < 0.001"


@pytest.mark.parametrize("augmentation", ["resized_crop", "scale_crop"])
def test_draws_come_from_torchs_generator(augmentation: str) -> None:
    image, mask = ramp(300, 400)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(train_transform(64, augmentation)(image, mask))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (60, 47), (128, 128)])
def test_validation_crop_equals_pillow(height: int, width: int) -> None:
    """Short side to 128, middle square: as the released programs do with Pillow."""
    image, mask = ramp(height, width)
    out, target = eval_transform(128)(image, mask)
    long = int(128 * max(height, width) / min(height, width))
    new_height, new_width = (long, 128) if height > width else (128, long)
    top, left = round((new_height - 128) / 2), round((new_width - 128) / 2)

    def pillow(array: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        resized = Image.fromarray(array).resize((new_width, new_height), resample)
        return np.asarray(resized)[top : top + 128, left : left + 128]

    assert np.array_equal(target[0].numpy(), pillow(mask[0].numpy(), Image.Resampling.NEAREST))
    expected = pillow(image.permute(1, 2, 0).numpy(), Image.Resampling.BILINEAR)
    assert np.abs(out.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_whole_image() -> None:
    image, mask = ramp(50, 70)
    out, target = eval_transform(None)(image, mask)
    assert torch.equal(out, image) and torch.equal(target, mask)


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    expected = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)(images.float() / 255)
    out = normalize(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert normalize(out) is out
    torch.testing.assert_close(normalize(images[0]), expected[0], atol=1e-6, rtol=1e-6)
