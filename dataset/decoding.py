"""Reading pictures and label masks into uint8 tensors.

Torchvision's decoder reads JPEG; Pillow reads the rest: torchvision's PNG decoder ends the process (a
segmentation fault) on some damaged files. Each file is decoded as its author meant it or refused by name with
a :class:`~utils.errors.DataError`.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from utils.errors import DataError

# What Pillow raises for a file that it cannot read (SyntaxError: a broken PNG chunk).
_PIL_ERRORS = (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
# PNG header (IHDR): byte 24 is the bit depth, 25 the colour type.
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
    if len(data) < 29 or not data.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: the mask is no PNG file; save it as PNG with one class index per pixel")
    depth, colour_type = data[24], data[25]
    if colour_type not in (_PNG_GREY, _PNG_PALETTE):
        raise DataError(
            f"{path}: the mask holds colours, not class indices; save it as a palette or greyscale PNG"
        )
    _check_png(path, "mask", data)
    try:
        with PILImage.open(io.BytesIO(data)) as picture:
            indices = np.array(picture)
    except _PIL_ERRORS as error:
        raise _broken(path, "mask", error) from error
    if indices.max(initial=0) > 255:
        raise DataError(
            f"{path}: class index {indices.max()} found; masks hold 0 to 254, and 255 for void: mend it"
        )
    indices = indices.astype(np.uint8)
    if colour_type == _PNG_GREY and depth in (2, 4):
        indices //= 255 // (2**depth - 1)  # Pillow spreads these grey levels over 0..255
    return torch.from_numpy(indices)[None]


def _read_bytes(path: Path, kind: str) -> bytearray:
    try:
        return bytearray(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: the {kind} is missing; check the list file and --data_root") from error
    except OSError as error:
        raise DataError(
            f"{path}: the {kind} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _decode_rgb(path: Path, data: bytearray, *, upright: bool) -> Tensor:
    if data.startswith(_JPEG_SIGNATURE):
        with contextlib.suppress(RuntimeError):  # what it cannot read (CMYK of some kinds), Pillow may
            encoded = torch.frombuffer(data, dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=upright)
    if data.startswith(PNG_SIGNATURE):
        _check_png(path, "image", data)
    try:
        with PILImage.open(io.BytesIO(data)) as picture:
            turned = ImageOps.exif_transpose(picture) if upright else picture
            if turned.mode.startswith("I;16"):  # Pillow's own conversion would clip 16-bit greys at 255
                turned = PILImage.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
            return F.pil_to_tensor(turned.convert("RGB"))
    except _PIL_ERRORS as error:
        raise _broken(path, "image", error) from error


def png_image_data(data: bytes | bytearray) -> bytes | None:
    """The joined IDAT chunks of a PNG file (a zlib stream); None where it is cut or a chunk's CRC is wrong.

    Pillow does not check the CRC of the pixels, and gives wrong ones for some damaged files.
    """
    view, parts, start = memoryview(data), [], len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return None
        kind = view[start + 4 : start + 8]
        if kind == b"IDAT":
            parts.append(view[start + 8 : end])
        elif kind == b"IEND":
            return b"".join(parts)
        start = end + 4
    return None


def _check_png(path: Path, kind: str, data: bytearray) -> None:
    if png_image_data(data) is None:
        raise _broken(path, kind, "a chunk is missing or its checksum is wrong")


def _broken(path: Path, kind: str, reason: object) -> DataError:
    if isinstance(reason, PILImage.UnidentifiedImageError):
        reason = "unknown format"  # Pillow's words name an object in memory
    words = " ".join(str(reason).split())[:120]
    return DataError(
        f"{path}: the {kind} cannot be read, it is truncated or corrupt; replace the file ({words})"
    )
