import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image, ImageOps

from dataset.check import check_pair
from dataset.decoding import PNG_SIGNATURE, read_image, read_mask
from dataset.image_labels import mask_values
from utils.errors import DataError

# Left half red, right half blue, top right corner green: any turn or flip shows.
PICTURE = np.zeros((40, 64, 3), np.uint8)
PICTURE[:, :32] = (200, 30, 30)
PICTURE[:, 32:] = (30, 30, 200)
PICTURE[:16, 48:] = (30, 200, 30)
INDICES = np.arange(12, dtype=np.uint8).reshape(3, 4)


def close(image: torch.Tensor, expected: np.ndarray, tolerance: int = 12) -> bool:
    """Equal up to JPEG's loss, which at the colour borders is larger: compare the blocks' middles."""
    got = image.permute(1, 2, 0).numpy()[4::8, 4::8].astype(int)
    return got.shape == expected[4::8, 4::8].shape and bool(
        (abs(got - expected[4::8, 4::8]) <= tolerance).all()
    )


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("torchvision cannot read this")


def write_png(path: Path, header: bytes, rows: bytes) -> None:
    """A PNG of a kind that Pillow does not write."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    checked = ((kind + data, len(data)) for kind, data in chunks)
    parts = (struct.pack(">I", n) + part + struct.pack(">I", zlib.crc32(part)) for part, n in checked)
    path.write_bytes(PNG_SIGNATURE + b"".join(parts))


def save(path: Path, picture: Image.Image, **kwargs: object) -> Path:
    picture.save(path, **kwargs)
    return path


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_colours(tmp_path: Path, mode: str, progressive: bool) -> None:
    picture = Image.fromarray(PICTURE).convert(mode)
    image = read_image(save(tmp_path / "x.jpg", picture, quality=95, subsampling=0, progressive=progressive))
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 64)
    assert close(image, PICTURE)


def test_greyscale_has_three_equal_channels(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "x.jpg", Image.fromarray(PICTURE).convert("L")))
    assert image.shape == (3, 40, 64)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    assert close(read_image(save(tmp_path / f"x.{suffix}", Image.fromarray(PICTURE))), PICTURE, tolerance=16)


def test_content_counts_not_the_suffix(tmp_path: Path) -> None:
    assert close(read_image(save(tmp_path / "x.jpg", Image.fromarray(PICTURE), format="PNG")), PICTURE)


def test_alpha_and_16_bit_png(tmp_path: Path) -> None:
    rgba = Image.fromarray(PICTURE).convert("RGBA")
    assert close(read_image(save(tmp_path / "a.png", rgba)), PICTURE)
    grey = Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257)
    image = read_image(save(tmp_path / "b.png", grey))
    assert image.dtype == torch.uint8
    assert close(image, np.repeat(PICTURE[..., :1], 3, axis=2))


LEVELS = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(40, axis=0)
NO_WHITE = {
    "float": Image.fromarray(LEVELS),
    "float of 0 to 255": Image.fromarray(LEVELS * 255),
    "32 bits": Image.fromarray((LEVELS * 1e9).astype(np.int32)),
    "12 bits in 16": Image.fromarray((LEVELS * 4095).astype(np.uint16)),
    "lab": Image.new("LAB", (64, 40)),
}


@pytest.mark.parametrize("kind", NO_WHITE)
def test_pixels_without_a_defined_white_are_refused_by_training_and_check(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "x.tif", NO_WHITE[kind])
    mask = save(tmp_path / "x.png", Image.new("L", (64, 40), 1))
    with pytest.raises(DataError, match=r"^\S*x\.tif: the image.*; save it as 8-bit PNG") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    pair = check_pair(path, mask, num_classes=2)
    assert list(pair.faults) == ["images without a defined black and white"]
    assert "8-bit PNG" in pair.faults["images without a defined black and white"][0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_of_16_bits_the_highest_8_count(tmp_path: Path, suffix: str) -> None:
    values = (LEVELS * 65535).astype(np.uint16)
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(values))
    assert np.array_equal(read_image(path)[1].numpy(), values >> 8)
    assert check_pair(path, save(tmp_path / "mask.png", Image.new("L", (64, 40), 1)), num_classes=2).wide
    dim = save(tmp_path / f"dim.{suffix}", Image.fromarray((LEVELS * 4096).astype(np.uint16)))
    assert int(read_image(dim).max()) == 16
    dark = save(tmp_path / f"dark.{suffix}", Image.fromarray((LEVELS * 4095).astype(np.uint16)))
    with pytest.raises(DataError, match=r"no value above 4095 of 65535.*12 bits stored in 16"):
        read_image(dark)


def test_16_bit_colours_that_stay_dark_are_refused(tmp_path: Path) -> None:
    """Pillow gives their high bytes alone, and writes no such file."""
    for largest, is_dark in ((0xFFFF, False), (0x0FFF, True)):
        pixel = struct.pack(">HHH", largest, largest // 2, 0)
        rows = (b"\0" + pixel * 4) * 3
        header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
        path = tmp_path / "x.png"
        write_png(path, header, rows)
        if is_dark:
            with pytest.raises(DataError, match="16 bits per channel but no value above 4095"):
                read_image(path)
        else:
            assert read_image(path)[:, 0, 0].tolist() == [255, 127, 0]


def test_of_12_bits_packed_in_a_tiff_the_highest_8_count(tmp_path: Path) -> None:
    """Such a file says that it has 12 bits; Pillow reads it, but writes none."""
    pixels = bytes.fromhex("fff8000107ff")  # 4095, 2048; 16, 2047
    short = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in short)
    directory = struct.pack("<H", len(short)) + entries + struct.pack("<I", 0)
    path = tmp_path / "x.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory)
    assert read_image(path)[0].tolist() == [[255, 128], [1, 127]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_every_format_is_read_as_stored_and_turned_for_its_mask_alone(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    """Pillow turns TIFF files by itself, and no others."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(PICTURE), exif=exif, **settings)
    plain = save(tmp_path / "y.png", Image.fromarray(PICTURE), exif=exif)
    assert np.array_equal(read_image(path).permute(1, 2, 0), PICTURE)
    assert np.array_equal(read_image(path, size=(40, 64)).permute(1, 2, 0), PICTURE)
    if orientation >= 5:
        with Image.open(plain) as picture:
            upright = np.asarray(ImageOps.exif_transpose(picture))
        assert np.array_equal(read_image(path, size=(64, 40)).permute(1, 2, 0), upright)
    for size, turned in (((64, 40), False), ((40, 64), True)):
        mask = save(tmp_path / "mask.png", Image.new("L", size, 1))
        pair = check_pair(path, mask, num_classes=2)
        fits = not turned or orientation >= 5
        assert bool(pair.faults) is not fits
        assert (pair.as_stored + pair.turned, pair.turned) == (orientation > 1, turned and fits)


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_camera_orientation_is_applied_only_where_the_mask_asks_for_it(
    tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "pillow":
        monkeypatch.setattr(torchvision.io, "decode_jpeg", _refuse)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise
    path = save(tmp_path / "x.jpg", Image.fromarray(PICTURE), quality=95, subsampling=0, exif=exif)
    assert close(read_image(path), PICTURE)
    assert close(read_image(path, size=(40, 64)), PICTURE)
    assert close(read_image(path, size=(64, 40)), np.rot90(PICTURE, k=-1))


def test_size_differs_from_the_mask(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", Image.fromarray(PICTURE))
    for size in ((64, 40), (40, 63)):
        with pytest.raises(DataError, match=re.escape(str(path)) + ".*64×40"):
            read_image(path, size=size)


@pytest.mark.parametrize("keep", [0, 2, 100, 0.5, 0.97])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_and_empty_images_are_refused_by_name(tmp_path: Path, keep: float, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(noise))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*truncated or corrupt") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_text_file_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with pytest.raises(DataError, match=r"x\.jpg: the image is missing"):
        read_image(path)
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"x\.jpg: the image cannot be read"):
        read_image(path)
    with pytest.raises(DataError, match=r"x\.jpg: the mask is not a PNG"):
        read_mask(path)


@pytest.mark.parametrize("bits", [4, 8])
def test_palette_mask_holds_indices(tmp_path: Path, bits: int) -> None:
    picture = Image.fromarray(INDICES)
    picture.putpalette([(37 * i) % 256 for i in range(48)])
    mask = read_mask(save(tmp_path / "x.png", picture, bits=bits))
    assert mask.dtype == torch.uint8
    assert mask.tolist() == [INDICES.tolist()]


def test_palette_mask_with_transparency(tmp_path: Path) -> None:
    picture = Image.fromarray(INDICES)
    picture.putpalette([(37 * i) % 256 for i in range(768)])
    assert read_mask(save(tmp_path / "x.png", picture, transparency=0)).tolist() == [INDICES.tolist()]


def test_grey_masks_of_8_16_and_1_bit(tmp_path: Path) -> None:
    assert read_mask(save(tmp_path / "8.png", Image.fromarray(INDICES))).tolist() == [INDICES.tolist()]
    wide = Image.fromarray(INDICES.astype(np.uint16))
    assert read_mask(save(tmp_path / "16.png", wide)).tolist() == [INDICES.tolist()]
    assert read_mask(save(tmp_path / "1.png", Image.fromarray(INDICES > 5))).tolist() == [
        (INDICES > 5).tolist()
    ]


@pytest.mark.parametrize("depth", [2, 4])
def test_grey_masks_of_few_bits_are_not_spread(tmp_path: Path, depth: int) -> None:
    """Pillow cannot write these: made by hand, one row of 2**depth pixels."""
    levels = list(range(2**depth))
    bits = "".join(format(level, f"0{depth}b") for level in levels)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    header = struct.pack(">IIBBBBB", len(levels), 1, depth, 0, 0, 0, 0)
    path = tmp_path / "x.png"
    write_png(path, header, row)
    assert read_mask(path).tolist() == [[levels]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_mask_of_colours_is_refused(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(PICTURE).convert(mode))
    with pytest.raises(DataError, match=r"x\.png: the mask contains colours"):
        read_mask(path)


def test_broken_masks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.png: the mask is missing"):
        read_mask(tmp_path / "x.png")
    noise = np.random.default_rng(0).integers(0, 21, (60, 60), dtype=np.uint8)
    path = save(tmp_path / "x.png", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"x\.png: the mask cannot be read"):
        read_mask(path)
    high = save(tmp_path / "y.png", Image.fromarray(np.full((4, 4), 300, np.uint16)))
    with pytest.raises(DataError, match=r"y\.png: class index 300"):
        read_mask(high)


def encoded(picture: Image.Image, **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **kwargs)
    return buffer.getvalue()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut at the end, one bit flipped in the header, some bytes overwritten, or a few taken out."""
    changed, where = bytearray(data), int(rng.integers(len(data)))
    match int(rng.integers(4)):
        case 0:
            return data[:where]
        case 1:
            changed[where % 60] ^= 1 << int(rng.integers(8))
        case 2:
            for _ in range(int(rng.integers(1, 6))):
                changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        case _:
            return data[:where] + data[where + int(rng.integers(1, 9)) :]
    return bytes(changed)


BLOCKS = np.kron(np.arange(35, dtype=np.uint8).reshape(5, 7) % 21, np.ones((8, 8), np.uint8))
PALETTE = Image.fromarray(BLOCKS)
PALETTE.putpalette([(37 * i) % 256 for i in range(768)])
FUZZED_MASKS = {
    "grey": (Image.fromarray(BLOCKS), {}),
    "palette": (PALETTE, {}),
    "4 bits": (Image.fromarray(BLOCKS % 16).convert("P"), {"bits": 4}),
    "16 bits": (Image.fromarray(BLOCKS.astype(np.uint16)), {}),
    "1 bit": (Image.fromarray(BLOCKS > 5), {}),
}


@pytest.mark.parametrize("kind", FUZZED_MASKS)
def test_damaged_mask_gives_its_content_or_an_error(tmp_path: Path, kind: str) -> None:
    picture, settings = FUZZED_MASKS[kind]
    data, pixels = encoded(picture, format="PNG", **settings), np.asarray(picture)
    path, rng = tmp_path / "x.png", np.random.default_rng(len(kind))
    refused = 0
    for _ in range(200):
        path.write_bytes(damaged(data, rng))
        for read, expected in ((read_mask, pixels), (mask_values, np.unique(pixels))):
            try:
                result = read(path)
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
            else:
                found = np.flatnonzero(result) if read is mask_values else result[0].numpy()
                assert np.array_equal(found, expected)
    assert refused > 300


def fuzzed_images() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": encoded(noise, format="JPEG"),
        "progressive": encoded(noise, format="JPEG", progressive=True),
        "cmyk": encoded(noise.convert("CMYK"), format="JPEG"),
        "turned": encoded(noise, format="JPEG", exif=exif),
        "png": encoded(noise, format="PNG"),
        "webp": encoded(noise, format="WEBP"),
        "bmp": encoded(noise, format="BMP"),
        "tiff": encoded(noise, format="TIFF"),
        "gif": encoded(noise.convert("P"), format="GIF"),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", fuzzed_images())
def test_damaged_image_is_read_or_refused_as_the_check_says(tmp_path: Path, kind: str) -> None:
    """JPEG, BMP and others have no checksum: damage may pass as other pixels, never as a crash."""
    data, rng = fuzzed_images()[kind], np.random.default_rng(len(kind))
    path, mask = tmp_path / f"x.{kind}", save(tmp_path / "mask.png", Image.fromarray(BLOCKS))
    refused = 0
    for _ in range(100):
        path.write_bytes(damaged(data, rng))
        unreadable = "unreadable images" in check_pair(path, mask, num_classes=21).faults
        try:
            image = read_image(path)
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            assert unreadable
        else:
            assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
            assert not unreadable
            if kind == "png":
                assert torch.equal(image, torch.from_numpy(png_pixels(data)))
    assert refused > 10


def png_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).copy()


def test_real_masks_equal_pillow(shared: Path) -> None:
    masks = sorted((shared / "voc_masks/SegmentationClassAug").iterdir())[::400]
    assert len(masks) > 20
    for path in masks:
        with Image.open(path) as picture:
            assert np.array_equal(read_mask(path)[0].numpy(), np.array(picture)), path
