import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import decoding
from dataset.check import check_pair
from dataset.decoding import read_image, read_mask
from dataset.splits import mask_values
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


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_camera_orientation_is_applied_only_where_the_mask_asks_for_it(
    tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "pillow":
        monkeypatch.setattr(decoding, "decode_jpeg", _refuse)
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
    with pytest.raises(DataError, match=r"x\.jpg: the mask is no PNG"):
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
    import struct
    import zlib

    levels = list(range(2**depth))
    bits = "".join(format(level, f"0{depth}b") for level in levels)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(levels), 1, depth, 0, 0, 0, 0)
    path = tmp_path / "x.png"
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert read_mask(path).tolist() == [[levels]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_mask_of_colours_is_refused(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(PICTURE).convert(mode))
    with pytest.raises(DataError, match=r"x\.png: the mask holds colours"):
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
        unreadable = "unreadable images" in dict(check_pair(path, mask, num_classes=21).faults)
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
