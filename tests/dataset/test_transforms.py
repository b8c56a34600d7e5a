import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dataset.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RandomCropFlip,
    eval_transform,
    normalize,
    train_transform,
)


def ramp(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture whose red is its row, green its column; the mask is the picture's blue, a coarse checker."""
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
        # The picture's blue, cut at half height, is the mask, but for ties on the checker's lines. A mask
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


def test_draws_come_from_torchs_generator() -> None:
    image, mask = ramp(300, 400)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(train_transform(64)(image, mask))
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
