"""Reading pictures and label masks into uint8 tensors.

Torchvision's decoder reads what it can; Pillow reads the rest. Each file is decoded as its author meant it or
refused by name with a :class:`~utils.errors.DataError`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, decode_png, read_file
from torchvision.transforms.v2 import functional as F

from utils.errors import DataError

# What Pillow raises for a file that it cannot read (SyntaxError: a broken PNG chunk).
_PIL_ERRORS = (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError)

_PNG_SIGNATURE = (0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A)
# PNG header (IHDR): byte 24 is the bit depth, 25 the colour type, 28 the interlace method.
_PNG_GREY, _PNG_PALETTE = 0, 3


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a picture as uint8 RGB, 3×H×W. Greyscale and CMYK files are converted.

    Args:
        path: any format of torchvision or Pillow.
        size: (height, width) of the picture's mask. The camera's orientation (EXIF) is applied only where
            that makes the picture fit its mask. VOC's and ADE20K's masks were drawn on the stored pixels, so
            what fits as it is stored stays as it is. Without ``size`` the orientation is never applied.

    Raises:
        DataError: the file is missing, broken, truncated, or of another size than its mask.
    """
    data = _read_bytes(path, "image")
    image = _decode_rgb(path, data, upright=False)
    if size is None or image.shape[-2:] == size:
        return image
    if image.shape[-2:] == size[::-1]:
        upright = _decode_rgb(path, data, upright=True)
        if upright.shape[-2:] == size:
            return upright
    height, width = image.shape[-2:]
    raise DataError(
        f"{path}: the image is {width}×{height} but its mask is {size[1]}×{size[0]}; replace the wrong one"
    )


def read_mask(path: Path) -> Tensor:
    """Read a PNG label mask as uint8 class indices, 1×H×W: palette indices or grey levels, never colours.

    Raises:
        DataError: the file is missing, broken or no PNG, has several channels, or an index above 255.
    """
    data = _read_bytes(path, "mask")
    if len(data) < 29 or tuple(data[:8].tolist()) != _PNG_SIGNATURE:
        raise DataError(f"{path}: the mask is no PNG file; save it as PNG with one class index per pixel")
    depth, colour_type, interlace = (int(data[i]) for i in (24, 25, 28))
    if colour_type not in (_PNG_GREY, _PNG_PALETTE):
        raise DataError(
            f"{path}: the mask holds colours, not class indices; save it as a palette or greyscale PNG"
        )
    if depth == 8 and not interlace:
        # torchvision leaves indices of fewer bits packed and scales grey levels of fewer bits, hence only 8.
        try:
            return decode_png(data, mode=ImageReadMode.UNCHANGED)
        except RuntimeError as error:
            raise _broken(path, "mask", error) from error
    return _read_mask_with_pil(path, depth, colour_type)


def _read_mask_with_pil(path: Path, depth: int, colour_type: int) -> Tensor:
    try:
        with PILImage.open(path) as picture:
            indices = np.array(picture)
    except _PIL_ERRORS as error:
        raise _broken(path, "mask", error) from error
    if indices.max(initial=0) > 255:
        raise DataError(f"{path}: class index {indices.max()} found; masks hold 0 to 254, and 255 for void")
    indices = indices.astype(np.uint8)
    if colour_type == _PNG_GREY and depth in (2, 4):
        indices //= 255 // (2**depth - 1)  # Pillow spreads these grey levels over 0..255
    return torch.from_numpy(indices)[None]


def _read_bytes(path: Path, kind: str) -> Tensor:
    try:
        return read_file(str(path))
    except RuntimeError as error:
        if not path.is_file():
            raise DataError(f"{path}: the {kind} is missing; check the list file and --data_root") from error
        raise _broken(path, kind, error) from error


def _decode_rgb(path: Path, data: Tensor, *, upright: bool) -> Tensor:
    try:
        image = decode_image(data, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
    except RuntimeError:
        return _decode_rgb_with_pil(path, upright=upright)
    return F.to_dtype_image(image, torch.uint8, scale=True)  # 16-bit PNG


def _decode_rgb_with_pil(path: Path, *, upright: bool) -> Tensor:
    try:
        with PILImage.open(path) as picture:
            turned = ImageOps.exif_transpose(picture) if upright else picture
            return F.pil_to_tensor(turned.convert("RGB"))
    except _PIL_ERRORS as error:
        raise _broken(path, "image", error) from error


def _broken(path: Path, kind: str, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())[:120]
    return DataError(
        f"{path}: the {kind} cannot be read, it is truncated or corrupt; replace the file ({reason})"
    )
