"""Random and fixed crops of an image with its mask, on uint8 tensors.

Images are copied to the device as uint8, a quarter of the bytes of float32, and converted by
:func:`normalize`. Images are resized bilinearly with antialiasing, masks by ``nearest-exact`` (Pillow's
nearest; ``nearest`` would shift the mask by up to half a pixel).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from utils.labels import VOID

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SCALE = (0.5, 2.0)  # of a random crop: its share of the area, or the factor on both sides
_FLIP = 0.5  # share of flipped samples
_LONGEST = 16  # largest aspect ratio at which the whole image is resized
_EXACT = InterpolationMode.NEAREST_EXACT

PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RandomCropFlip:
    """Training: random resized crop, then a horizontal flip of every second sample.

    The crop has 0.5 to 2 times the image's area and an aspect ratio of 3/4 to 4/3. A crop larger than the
    image is drawn again, at most ten times; then the whole image is used (v2.RandomResizedCrop). All random
    numbers come from torch's global generator.
    """

    def __init__(self, crop: int) -> None:
        self.crop = [crop, crop]
        self.flip = _FLIP
        self._draw = v2.RandomResizedCrop(crop, scale=_SCALE)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(3×H×W, 1×H×W) → (3×crop×crop, 1×crop×crop), uint8."""
        box = self._draw.make_params([image])
        image = F.resized_crop_image(image, **box, size=self.crop, antialias=True)
        mask = F.resized_crop_image(mask, **box, size=self.crop, interpolation=_EXACT)
        return _sometimes_flipped(image, mask, self.flip)


class ScaleCropFlip:
    """Training as in SSUL: random scale, random crop, then a horizontal flip of every second sample.

    Height and width are multiplied by one factor, uniform in 0.5 to 2. If a side is shorter than the crop,
    it is padded at both ends with black and void. The crop's position is uniform. All random numbers come
    from torch's global generator.

    Args:
        crop: side of the crop in pixels.
        released: as in SSUL's program: a short side pads all four sides, and padding is background instead of
            void.
    """

    def __init__(self, crop: int, *, released: bool = False) -> None:
        self.crop, self.scale, self.flip, self.released = crop, _SCALE, _FLIP, released

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(3×H×W, C×H×W) → (3×crop×crop, C×crop×crop), uint8; channel 0 of the mask has the labels."""
        factor = float(torch.empty(()).uniform_(*self.scale))
        size = [max(int(side * factor), 1) for side in image.shape[-2:]]
        image = F.resize_image(image, size, antialias=True)
        mask = F.resize_image(mask, size, interpolation=_EXACT)
        rows, columns = self._padding(*size)
        image = _padded(image, rows, columns)
        mask = _padded(mask, rows, columns, first=0 if self.released else VOID)
        top, left = (int(torch.randint(side - self.crop + 1, ())) for side in image.shape[-2:])
        inside = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        return _sometimes_flipped(image[inside], mask[inside], self.flip)

    def _padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows of padding above and below, columns left and right."""
        columns = self._half_missing(width)
        if not self.released:
            return self._half_missing(height), columns
        around = columns + self._half_missing(height + 2 * columns)
        return around, around

    def _half_missing(self, side: int) -> int:
        return max(self.crop - side + 1, 0) // 2


def _sometimes_flipped(image: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return (image.flip(-1), mask.flip(-1)) if torch.rand(()) < share else (image, mask)


def _padded(pixels: Tensor, rows: int, columns: int, first: int = 0) -> Tensor:
    """C×H×W padded by rows and columns of zeros, in channel 0 of ``first``."""
    if rows == columns == 0:
        return pixels
    channels, height, width = pixels.shape
    padded = pixels.new_zeros(channels, height + 2 * rows, width + 2 * columns)
    padded[0] = first
    padded[:, rows : rows + height, columns : columns + width] = pixels
    return padded


class ResizeCenterCrop:
    """Validation: resize the short side to ``crop``, then a centre crop.

    Of an image more than 16 times as long as wide only the centre is resized: a row of 1×5000 pixels would
    need gigabytes.
    """

    def __init__(self, crop: int) -> None:
        self.crop = crop

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(3×H×W, 1×H×W) → (3×crop×crop, 1×crop×crop), uint8."""
        height, width = image.shape[-2:]
        most = _LONGEST * min(height, width)
        if max(height, width) > most:
            middle = [min(height, most), min(width, most)]
            image, mask = F.center_crop_image(image, middle), F.center_crop_image(mask, middle)
        image = F.resize_image(image, [self.crop], antialias=True)
        mask = F.resize_image(mask, [self.crop], interpolation=_EXACT)
        return F.center_crop_image(image, [self.crop]), F.center_crop_image(mask, [self.crop])


def whole_image(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Validation with ``--whole_val``: the unchanged image (batch size 1)."""
    return image, mask


def train_transform(
    crop: int, augmentation: str = "resized_crop", *, released: bool = False
) -> PairTransform:
    """A published training augmentation.

    Args:
        crop: side of the crops in pixels.
        augmentation: ``resized_crop`` (:class:`RandomCropFlip`) or ``scale_crop`` (:class:`ScaleCropFlip`).
        released: pad as the released program (``scale_crop`` only).
    """
    if augmentation == "scale_crop":
        return ScaleCropFlip(crop, released=released)
    return RandomCropFlip(crop)


def eval_transform(crop: int | None) -> PairTransform:
    """The published validation crop, or the whole image if ``crop`` is None."""
    return whole_image if crop is None else ResizeCenterCrop(crop)


def normalize(images: Tensor) -> Tensor:
    """uint8 RGB ...×3×H×W → float32, normalised by ImageNet's mean and standard deviation.

    Float input is returned unchanged, as already normalised.
    """
    if images.is_floating_point():
        return images
    mean, std = _imagenet_statistics(images.device)
    return images.float().sub_(mean).div_(std)


@cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in 0..255, 3×1×1; cached per device."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)[..., None, None] * 255
    return mean, std
