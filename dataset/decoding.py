"""Reading images and label masks into uint8 tensors.

Torchvision decodes JPEG, Pillow all other formats: torchvision's PNG decoder crashes (segmentation fault) on
some damaged files. A file that cannot be decoded reliably raises a :class:`~utils.errors.DataError`.

Of 12 and 16 bits per channel the highest 8 are used, so that the largest value is white, as defined for PNG.
Pixels without a defined white raise an error: floating-point and 32-bit pixels, and 16-bit images without a
value above 4095, which are probably 12 bits stored in 16.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage

from utils.errors import DataError
from utils.lazy import image_functions, torch, torchvision_io

if TYPE_CHECKING:
    from torch import Tensor

# Pillow's errors for unreadable files (SyntaxError: damaged PNG chunk).
_PIL_ERRORS = (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
# Modes that Pillow's `convert("RGB")` scales correctly.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_12_BITS = 4095
_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_BITS_PER_SAMPLE = 0x0102  # tag of TIFF
_Turn = PILImage.Transpose
# Orientation -> transposition that makes the stored image upright.
_UPRIGHT = {
    **{2: _Turn.FLIP_LEFT_RIGHT, 3: _Turn.ROTATE_180, 4: _Turn.FLIP_TOP_BOTTOM, 5: _Turn.TRANSPOSE},
    **{6: _Turn.ROTATE_270, 7: _Turn.TRANSVERSE, 8: _Turn.ROTATE_90},
}
_BACK = {**_UPRIGHT, 6: _Turn.ROTATE_90, 8: _Turn.ROTATE_270}
# PNG header (IHDR): byte 24 is the bit depth, 25 the colour type.
_PNG_GREY, _PNG_PALETTE = 0, 3


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image as uint8 RGB, 3×H×W. Greyscale and CMYK files are converted.

    Args:
        path: any format of torchvision or Pillow.
        size: (height, width) of the image's mask. The camera's orientation (EXIF) is applied only if the
            image has this size just with it: VOC's and ADE20K's masks were drawn on the stored pixels.
            Without ``size`` the orientation is not applied.

    Raises:
        DataError: the file is missing, damaged, of another size than its mask, or its pixels have no defined
            white.
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
    """Read a PNG label mask as uint8 class indices, 1×H×W, from palette indices or grey levels.

    Raises:
        DataError: the file is missing, damaged or not a PNG, has several channels, or an index above 255.
    """
    data = _read_bytes(path, "mask")
    if len(data) < 29 or not data.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: the mask is not a PNG file; save it as PNG with one class index per pixel")
    depth, colour_type = data[24], data[25]
    if colour_type not in (_PNG_GREY, _PNG_PALETTE):
        raise DataError(
            f"{path}: the mask contains colours, not class indices; save it as a palette or greyscale PNG"
        )
    try:
        _check_png(data)
        with PILImage.open(io.BytesIO(data)) as image:
            indices = np.array(image)
    except _PIL_ERRORS as error:
        raise _broken(path, "mask", error) from error
    if indices.max(initial=0) > 255:
        raise DataError(
            f"{path}: class index {indices.max()} found; masks contain 0 to 254, and 255 for void: correct it"
        )
    indices = indices.astype(np.uint8)
    if colour_type == _PNG_GREY and depth in (2, 4):
        indices //= 255 // (2**depth - 1)  # Pillow scales these grey levels to 0..255
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
        with contextlib.suppress(RuntimeError):  # e.g. some kinds of CMYK, which Pillow may read
            encoded = torch.frombuffer(data, dtype=torch.uint8)
            rgb = torchvision_io.ImageReadMode.RGB
            return torchvision_io.decode_jpeg(encoded, mode=rgb, apply_exif_orientation=upright)
    try:
        stored = load_image(path, data)
    except _PIL_ERRORS as error:
        raise _broken(path, "image", error) from error
    turn = _UPRIGHT.get(stored.orientation) if upright else None
    return image_functions.pil_to_tensor(stored.image if turn is None else stored.image.transpose(turn))


@dataclass(frozen=True)
class StoredImage:
    """An image as stored, without the camera's orientation applied.

    Attributes:
        image: 8-bit RGB.
        orientation: of the camera (EXIF), 1 to 8; 1 is upright.
        bits: per channel in the file.
    """

    image: PILImage.Image
    orientation: int
    bits: int


def load_image(path: Path, data: bytes | bytearray) -> StoredImage:
    """Decode an image by Pillow from the bytes of its file.

    Raises:
        DataError: its pixels have no defined white.
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the file is damaged.
    """
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
    with PILImage.open(io.BytesIO(data)) as image:
        value, bits = image.getexif().get(_ORIENTATION), _bits(image, data)
        orientation = value if value in _UPRIGHT else 1
        image.load()
        # load() has applied the orientation of a TIFF, and of no other format.
        back = _BACK.get(orientation) if image.format == "TIFF" else None
        rgb = _rgb(path, image, bits)
    return StoredImage(rgb if back is None else rgb.transpose(back), orientation, bits)


def _bits(image: PILImage.Image, data: bytes | bytearray) -> int:
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))))  # type: ignore[attr-defined]
    return 16 if image.mode.startswith("I;16") else 8


def _rgb(path: Path, image: PILImage.Image, bits: int) -> PILImage.Image:
    """A Pillow image as 8-bit RGB; for more bits see the module's docstring."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):  # I: Pillow before 11
        values = np.asarray(image)
        is_dark = bits == 16 and values.max(initial=0) <= _12_BITS
        # Pillow's conversion would clip at 255.
        rgb = PILImage.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    elif mode in _MODES:
        rgb = image.convert("RGB")
        is_dark = bits == 16 and np.asarray(rgb).max(initial=0) <= _12_BITS >> 8  # high bytes
    else:
        kind = {"F": "floating-point", "I": "32-bit or signed whole"}.get(mode, mode)
        raise DataError(
            f"{path}: the image's pixels are {kind} numbers, for which no black and white is defined; save "
            "it as 8-bit PNG or JPEG with the right scale"
        )
    if is_dark:
        raise DataError(
            f"{path}: the image has 16 bits per channel but no value above {_12_BITS} of 65535, and would "
            "be read as black (12 bits stored in 16?); save it as 8-bit PNG or JPEG with the right scale"
        )
    return rgb


def _check_png(data: bytes | bytearray) -> None:
    """Raise Pillow's error for a PNG that is truncated or has a chunk with a wrong CRC.

    Decoding does not check the CRC of the pixels.
    """
    with PILImage.open(io.BytesIO(data)) as image:
        image.verify()


def _broken(path: Path, kind: str, reason: object) -> DataError:
    if isinstance(reason, PILImage.UnidentifiedImageError):
        reason = "unknown format"  # Pillow's message names an object in memory
    words = " ".join(str(reason).split())[:120]
    return DataError(
        f"{path}: the {kind} cannot be read, it is truncated or corrupt; replace the file ({words})"
    )
