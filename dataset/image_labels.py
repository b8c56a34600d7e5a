"""Image-level labels: the classes in the mask of each image.

They are read from the masks once and cached in a file; ``dataset.protocols`` selects images by them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dataset.decoding import read_mask
from utils.errors import DataError, UserError
from utils.files import atomic_write, queue_lock
from utils.labels import VOID
from utils.processor import available_cores

logger = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]
Result = TypeVar("Result")

# numpy's errors for a damaged file, whose header it parses as Python tokens and whose size it allocates.
DAMAGED_ARRAY = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError),
    *(SyntaxError, tokenize.TokenError),
)
_CACHE_VERSION = "presence-1"


def mask_values(path: Path) -> BoolArray:
    """Which values 0..255 occur in a mask; bool, shape (256,). Raises DataError like ``read_mask``."""
    flat, seen = read_mask(path).numpy().reshape(-1), np.zeros(256, dtype=bool)
    # Only the ends of runs of equal values, of which a mask has few.
    seen[flat[np.flatnonzero(flat[1:] != flat[:-1])]] = True
    seen[flat[-1:]] = True
    return seen


def scan_image_labels(
    mask_paths: Sequence[Path],
    *,
    cache_dir: Path | None = None,
    num_classes: int | None = None,
    progress: bool = True,
) -> list[frozenset[int]]:
    """Class ids in every mask, in list order, without background (0) and void (255).

    Args:
        mask_paths: PNG masks with one class id per pixel.
        cache_dir: folder of the cache (``None``: no cache). The masks are read again if the list, or a mask's
            size or modification time changes.
        num_classes: number of classes with background; a larger id in a mask is an error.
        progress: show a progress bar while masks are read.

    Raises:
        DataError: a mask is missing, damaged, not a one-channel PNG, or has an unknown class id.
    """
    paths = [Path(path) for path in mask_paths]
    values = _read_masks(paths, progress) if cache_dir is None else _cached(paths, cache_dir, progress)
    if num_classes is not None:
        _check_known(paths, values, num_classes)
    return [frozenset(np.flatnonzero(row).tolist()) - {0, VOID} for row in values]


def label_matrix(image_labels: Sequence[Collection[int]]) -> BoolArray:
    """Bool, shape (images, 256): class c is in image i. Background and void columns are cleared."""
    if any(not 0 <= c <= VOID for ids in image_labels for c in ids):
        raise UserError("image-level labels: class ids must lie between 0 and 255")
    matrix = np.zeros((len(image_labels), 256), dtype=bool)
    for row, ids in zip(matrix, image_labels, strict=True):
        row[list(ids)] = True
    matrix[:, [0, VOID]] = False
    return matrix


def map_in_threads(
    function: Callable[..., Result], *inputs: Sequence[Any], desc: str, unit: str, progress: bool
) -> list[Result]:
    """``list(map(function, *inputs))`` in threads on all available cores, with a progress bar.

    For decoding, which releases the GIL. An error or an interrupt cancels the rest.
    """
    pool = ThreadPoolExecutor(available_cores())
    try:
        results = pool.map(function, *inputs)
        return list(tqdm(results, total=len(inputs[0]), desc=desc, unit=unit, disable=not progress))
    finally:
        pool.shutdown(cancel_futures=True)


def _read_masks(paths: Sequence[Path], progress: bool) -> BoolArray:
    """Values of every mask; bool, shape (masks, 256)."""
    values = map_in_threads(mask_values, paths, desc="reading masks", unit="mask", progress=progress)
    return np.array(values, dtype=bool).reshape(len(paths), 256)


def _check_known(paths: Sequence[Path], values: BoolArray, num_classes: int) -> None:
    bad = np.flatnonzero(values[:, num_classes:VOID].any(axis=1))
    if bad.size:
        first = int(bad[0])
        ids = ", ".join(str(num_classes + c) for c in np.flatnonzero(values[first, num_classes:VOID])[:5])
        others = f" (and {bad.size - 1} more masks)" if bad.size > 1 else ""
        raise DataError(
            f"mask {paths[first]}{others}: unknown class id(s) {ids}; "
            f"expected 0 to {num_classes - 1}, or {VOID} for void; correct the mask"
        )


def _cached(paths: Sequence[Path], cache_dir: Path, progress: bool) -> BoolArray:
    """As ``_read_masks``, from the cache if it is valid."""
    name, key = _cache_key(paths)
    path = cache_dir / f"presence-{name}.npz"
    if (stored := _load_cache(path, key, len(paths))) is not None:
        return stored
    with contextlib.ExitStack() as stack:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(queue_lock(path.with_suffix(".lock")))
        except OSError as error:
            logger.warning(
                "image-level labels are not cached: %s cannot be written (%s)", cache_dir, error.strerror
            )
            return _read_masks(paths, progress)
        stored = _load_cache(path, key, len(paths))  # another process may have written it meanwhile
        if stored is not None:
            return stored
        values = _read_masks(paths, progress)
        try:
            with atomic_write(path) as file:
                np.savez(file, key=np.array(key), index=np.packbits(values, axis=1))
        except UserError as error:
            logger.warning("image-level labels are not cached: %s", error)
        return values


def _cache_key(paths: Sequence[Path]) -> tuple[str, str]:
    """(name of the list, for the file name; digest of the list with the masks' sizes and times)."""
    names, state = hashlib.sha256(), hashlib.sha256(_CACHE_VERSION.encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(
                f"mask {path}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        name = os.fsencode(path.absolute())  # the working directory's name may not be UTF-8
        names.update(name + b"\n")
        state.update(name + f"\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return names.hexdigest()[:16], state.hexdigest()


def _load_cache(path: Path, key: str, num_images: int) -> BoolArray | None:
    """The cached values; None if there are none, they are out of date or the file is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            packed = stored["index"]
    except (*DAMAGED_ARRAY, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        logger.warning("cache %s is damaged (%s); the masks are read again", path, error)
        return None
    if packed.dtype != np.uint8 or packed.shape != (num_images, 32):
        logger.warning("cache %s has an unexpected shape; the masks are read again", path)
        return None
    return np.unpackbits(packed, axis=1).astype(bool)
