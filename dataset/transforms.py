"""Random and fixed crops of a picture with its mask, on uint8 tensors.

Pictures stay uint8 up to the device, a quarter of the bytes to keep and to copy; :func:`normalize` makes
floats. Pictures are resized bilinearly with antialiasing. Masks take the value at the centre of each output
pixel (``nearest-exact``, which is Pillow's nearest; ``nearest`` would shift the mask by up to half a pixel).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LONGEST = 16  # times its width that a picture is resized whole
_EXACT = InterpolationMode.NEAREST_EXACT

PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RandomCropFlip:
    """Training: random resized crop, then a horizontal flip of every second sample.

    The crop has ``scale`` of the picture's area and an aspect ratio of 3/4 to 4/3. A crop larger than the
    picture is drawn again, ten times at most; then the whole picture is taken (v2.RandomResizedCrop).
    All draws come from torch's global generator.
    """

    def __init__(self, crop: int, scale: tuple[float, float] = (0.5, 2.0), flip: float = 0.5) -> None:
        self.crop = [crop, crop]
        self.flip = flip
        self._draw = v2.RandomResizedCrop(crop, scale=scale)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(3×H×W, 1×H×W) → (3×crop×crop, 1×crop×crop), uint8."""
        box = self._draw.make_params([image])
        image = F.resized_crop_image(image, **box, size=self.crop, antialias=True)
        mask = F.resized_crop_image(mask, **box, size=self.crop, interpolation=_EXACT)
        if torch.rand(()) < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask


class ResizeCenterCrop:
    """Validation: short side to ``crop``, then the square in the middle.

    Of a picture more than 16 times as long as wide only the middle is resized: a row of 1×5000 pixels would
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
    """Validation with ``--crop_val`` off: the picture as it is (batch size 1)."""
    return image, mask


def train_transform(crop: int) -> PairTransform:
    """The published training augmentation at one crop size in pixels."""
    return RandomCropFlip(crop)


def eval_transform(crop: int | None) -> PairTransform:
    """The published validation crop, or the whole picture where ``crop`` is None."""
    return whole_image if crop is None else ResizeCenterCrop(crop)


def normalize(images: Tensor) -> Tensor:
    """uint8 RGB ...×3×H×W → float32 with ImageNet's mean and deviation, on the tensor's own device.

    Float input comes back as it is: it has been normalised already.
    """
    if images.is_floating_point():
        return images
    mean, std = _imagenet_statistics(images.device)
    return images.float().sub_(mean).div_(std)


@cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation in 0..255, 3×1×1. Kept per device: made anew, they would be copied each time."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)[..., None, None] * 255
    return mean, std
