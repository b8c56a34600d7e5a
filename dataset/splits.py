"""Which images a step trains on: the presence index of a data set and the protocols over it.

The masks are read once. For every image the *presence* is the set of class ids in its mask, without
background (0) and void (255); every task, step and protocol is then a set operation:

- ``overlapped``: images that have a new class (MiB, arXiv 2002.00718).
- ``disjoint`` and ``sequential``: of these, images without a class that is not yet seen.
- ``partitioned``: every image belongs to one step. This is the rule behind ADE20K's published disjoint lists.

``task_indices`` picks the rule that the published lists of a data set follow.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from dataset.decoding import PNG_SIGNATURE, png_image_data, read_mask
from tasks import Steps, Task, check_step, get_task, task_names
from utils.errors import DataError, UserError
from utils.files import atomic_write, queue_lock
from utils.labels import VOID

logger = logging.getLogger(__name__)

Protocol = Literal["sequential", "disjoint", "overlapped", "partitioned"]
BoolArray = npt.NDArray[np.bool_]


_PUBLISHED = Path(__file__).with_name("published_splits.json")
_CACHE_VERSION = "presence-1"
# What numpy raises for a damaged file: it parses the header as Python's words and believes the size there.
_DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError),
    *(SyntaxError, tokenize.TokenError),
)
_BATCH = 64  # masks per unit of work and step of the progress bar
_ONE_CHANNEL = (0, 3)  # PNG colour types: grey, palette
_MAX_PIXELS = 2**27  # a header that claims more is left to the decoder's own limits

# ADE20K: the published 100-50 lists are those of 100-10 with steps 1..5 merged.
_MERGED = {"100-50": "100-10", "100-50b": "100-10b"}


# --- reading one mask ---------------------------------------------------------------------------------------


def mask_values(path: Path) -> BoolArray:
    """Which of the values 0..255 occur in a mask; bool, shape (256,). Raises DataError like ``read_mask``."""
    try:
        data = path.read_bytes()
    except OSError:
        return _values(read_mask(path).numpy())  # names the fault
    if not _is_plain(data):
        return _values(read_mask(path).numpy())
    deflated = png_image_data(data)
    if deflated is None:
        raise DataError(f"{path}: the mask is truncated or its checksum is wrong; replace the file")
    seen = _values_in_stream(deflated, *_size(data))
    return _values(_decode(path, data)) if seen is None else seen


def _is_plain(data: bytes) -> bool:
    """Whether a file is a PNG with one byte per pixel, not interlaced."""
    if data[:8] != PNG_SIGNATURE or len(data) < 33:
        return False
    depth, colour_type, interlace = data[24], data[25], data[28]
    return depth == 8 and colour_type in _ONE_CHANNEL and not interlace


def _size(data: bytes) -> tuple[int, int]:
    """(width, height)."""
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _values_in_stream(deflated: bytes, width: int, height: int) -> BoolArray | None:
    """Values of a plain PNG straight from its inflated stream; None where the stream needs a real decoder.

    Where no row is filtered (so VOC's masks are), the inflated stream is the pixels with a 0 before each row.
    Inflating it in one piece takes two thirds of the time of a decoder, which works row by row. The chunks'
    CRC stands in for the stream's Adler-32, which is slower.
    """
    size = (width + 1) * height
    if not 0 < width * height <= _MAX_PIXELS:
        return None
    try:
        stream = np.frombuffer(zlib.decompress(deflated[2:], wbits=-15, bufsize=size), dtype=np.uint8)
    except zlib.error:
        return None
    if stream.size != size or stream[:: width + 1].any():
        return None
    seen = _values(stream)
    # Every row starts with a 0 that is no pixel.
    seen[0] = np.count_nonzero(stream) < width * height
    return seen


def _values(pixels: npt.NDArray[np.uint8]) -> BoolArray:
    """Which values occur. Only the ends of runs are looked up; a mask has few of them."""
    flat, seen = pixels.reshape(-1), np.zeros(256, dtype=bool)
    seen[flat[np.flatnonzero(flat[1:] != flat[:-1])]] = True
    seen[flat[-1:]] = True
    return seen


def _decode(path: Path, data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a plain PNG. Pillow decodes: torchvision 0.29 crashes on damaged data."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)
    # Pillow reports damage as any of these.
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the mask is truncated or corrupt; replace the file ({reason})") from error


# --- presence index -----------------------------------------------------------------------------------------


def scan_presence(
    mask_paths: Sequence[Path],
    *,
    cache_dir: Path | None = None,
    num_classes: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[frozenset[int]]:
    """Class ids in every mask, in list order, without background (0) and void (255).

    Args:
        mask_paths: PNG masks with one class id per pixel.
        cache_dir: where the index is kept between runs (``None``: nowhere). It is rebuilt when the list, or a
            mask's size or modification time changes.
        num_classes: number of classes with background; a larger id in a mask is an error.
        workers: threads (inflating does not hold the interpreter's lock); default one per core at hand.
        progress: show a progress bar while masks are read.

    Raises:
        DataError: a mask is missing, damaged, not a one-channel PNG, or has an unknown class id.
    """
    paths = [Path(path) for path in mask_paths]
    if cache_dir is None:
        index = _scan(paths, workers, progress)
    else:
        index = _scan_cached(paths, cache_dir, workers, progress)
    if num_classes is not None:
        _check_known(paths, index, num_classes)
    return _to_sets(index)


def presence_matrix(presence: Sequence[Collection[int]]) -> BoolArray:
    """Bool, shape (images, 256): class c is in image i. Background and void columns are cleared."""
    sizes = np.fromiter((len(ids) for ids in presence), dtype=np.int64, count=len(presence))
    ids = np.fromiter((c for ids in presence for c in ids), dtype=np.int64, count=int(sizes.sum()))
    if ids.size and (ids.min() < 0 or ids.max() > VOID):
        raise UserError("presence index: class ids must lie between 0 and 255")
    matrix = np.zeros((len(presence), 256), dtype=bool)
    matrix[np.repeat(np.arange(len(presence)), sizes), ids] = True
    matrix[:, [0, VOID]] = False
    return matrix


def default_workers() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_sets(index: BoolArray) -> list[frozenset[int]]:
    index = index.copy()
    index[:, [0, VOID]] = False
    ids = np.nonzero(index)[1].tolist()
    ends = np.cumsum(index.sum(axis=1)).tolist()
    return [frozenset(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _check_known(paths: Sequence[Path], index: BoolArray, num_classes: int) -> None:
    bad = np.flatnonzero(index[:, num_classes:VOID].any(axis=1))
    if bad.size:
        first = int(bad[0])
        ids = ", ".join(str(num_classes + c) for c in np.flatnonzero(index[first, num_classes:VOID])[:5])
        others = f" (and {bad.size - 1} more masks)" if bad.size > 1 else ""
        raise DataError(
            f"mask {paths[first]}{others}: unknown class id(s) {ids}; "
            f"expected 0 to {num_classes - 1}, or {VOID} for void; mend the mask"
        )


def _scan(paths: Sequence[Path], workers: int | None, progress: bool) -> BoolArray:
    """Values of every mask; bool, shape (masks, 256)."""
    index = np.zeros((len(paths), 256), dtype=bool)

    def read(start: int) -> int:
        batch = paths[start : start + _BATCH]
        for i, path in enumerate(batch, start):
            index[i] = mask_values(path)
        return len(batch)

    pool = ThreadPoolExecutor(workers or default_workers())
    try:
        with tqdm(total=len(paths), desc="reading masks", unit="mask", disable=not progress) as bar:
            for done in pool.map(read, range(0, len(paths), _BATCH)):
                bar.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return index


# --- cache --------------------------------------------------------------------------------------------------


def _scan_cached(paths: Sequence[Path], cache_dir: Path, workers: int | None, progress: bool) -> BoolArray:
    name, key = _cache_key(paths)
    path = cache_dir / f"presence-{name}.npz"
    index = _load_cache(path, key, len(paths))
    if index is not None:
        return index
    with contextlib.ExitStack() as stack:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(queue_lock(path.with_suffix(".lock")))
        except OSError as error:
            logger.warning("presence index is not kept: %s cannot be written (%s)", cache_dir, error.strerror)
            return _scan(paths, workers, progress)
        index = _load_cache(path, key, len(paths))  # another process may have built it while this one waited
        if index is None:
            index = _scan(paths, workers, progress)
            try:
                with atomic_write(path) as file:
                    np.savez(file, key=np.array(key), index=np.packbits(index, axis=1))
            except UserError as error:
                logger.warning("presence index is not kept: %s", error)
    return index


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
        name = os.fsencode(path.absolute())  # the working folder's name may be no UTF-8 text
        names.update(name + b"\n")
        state.update(name + f"\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return names.hexdigest()[:16], state.hexdigest()


def _load_cache(path: Path, key: str, num_images: int) -> BoolArray | None:
    """The stored index, or None where there is none, it is out of date or the file is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            packed = stored["index"]
    except (*_DAMAGE, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        logger.warning("presence index %s is damaged (%s); building it again", path, error)
        return None
    if packed.dtype != np.uint8 or packed.shape != (num_images, 32):
        logger.warning("presence index %s has an unexpected shape; building it again", path)
        return None
    return np.unpackbits(packed, axis=1).astype(bool)


# --- protocols ----------------------------------------------------------------------------------------------


def step_indices(
    presence: Sequence[Collection[int]], steps: Sequence[Sequence[int]], step: int, protocol: Protocol
) -> list[int]:
    """Indices, ascending, of the images that a step trains on.

    Args:
        presence: class ids of every image (background and void may be among them; they do not count).
        steps: dataset class ids of every step.
        step: index into ``steps``.
        protocol: see the module's description.

    Raises:
        UserError: unknown step or protocol.
    """
    if protocol not in get_args(Protocol):
        raise UserError(f"protocol {protocol!r}: unknown; choose from {', '.join(get_args(Protocol))}")
    if not 0 <= step < len(steps):
        raise UserError(f"--step {step}: the task's steps are 0 to {len(steps) - 1}")
    matrix = presence_matrix(presence)
    if protocol == "partitioned":
        return _indices(_partition(matrix, steps) == step)
    chosen = np.logical_or.reduce(matrix[:, list(steps[step])], axis=1)
    if protocol != "overlapped":
        seen = {c for classes in steps[: step + 1] for c in classes}
        chosen &= ~matrix[:, [c for c in range(256) if c not in seen]].any(axis=1)
    return _indices(chosen)


def task_indices(
    dataset: str, task: str | Task, step: int, protocol: Protocol, presence: Sequence[Collection[int]]
) -> list[int]:
    """Indices, ascending, of the published list of a task's step.

    ADE20K's disjoint (and sequential) lists are ``partitioned``; those of ``100-50`` and ``100-50b`` are the
    lists of ``100-10`` and ``100-10b`` with steps 1..5 merged. Everywhere else the protocol says it all.

    Raises:
        UserError: unknown task, step or protocol.
    """
    if isinstance(task, str):
        task = get_task(dataset, task)
    check_step(task, step)
    if dataset != "ade" or protocol == "overlapped":
        return step_indices(presence, task.steps, step, protocol)
    finer = _finer_steps(task)
    if finer is None:
        return step_indices(presence, task.steps, step, "partitioned")
    owner = _partition(presence_matrix(presence), finer)
    return _indices(owner == 0 if step == 0 else owner > 0)


def _finer_steps(task: Task) -> Steps | None:
    """Steps of the task whose lists, merged, are this ADE20K task's; by the classes, whatever its name."""
    for name, finer in _MERGED.items():
        if task.steps == get_task("ade", name).steps:
            return get_task("ade", finer).steps
    return None


def why_empty(
    task: Task,
    step: int,
    protocol: Protocol,
    presence: Sequence[Collection[int]],
    class_names: Sequence[str] = (),
) -> str:
    """Why a step's rule chooses no image, and what to change; for a message."""
    new = [c for c in task.new_classes(step) if c != 0]
    if not any(c in ids for ids in presence for c in new):
        return f"no training mask shows {named_classes(new, class_names)}; mend the masks or change the task"
    if task.dataset == "ade" and protocol != "overlapped":
        return "every image with its classes belongs to another step; --overlap gives an image to several"
    return (
        f"every image with its classes also shows one of a later step, which {protocol} leaves out; "
        "--overlap takes these images too"
    )


def named_classes(ids: Sequence[int], class_names: Sequence[str] = (), most: int = 5) -> str:
    """Class ids with their names, the first few of them, for a message."""
    shown = [f"{c} {class_names[c]}" if c < len(class_names) else f"class {c}" for c in ids[:most]]
    more = f" and {len(ids) - most} more classes" if len(ids) > most else ""
    return ", ".join(shown) + more


def _indices(chosen: BoolArray) -> list[int]:
    return np.flatnonzero(chosen).tolist()


def _partition(matrix: BoolArray, steps: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """The step of every image, -1 for an image without a class; int64, shape (images,).

    The greedy rule, which was recovered from the published ADE20K lists: a rare class, or one that
    has got few of its images so far, takes the image to its step. The order of visits and that of the
    floating-point operations decides ties, so both are kept as they are.
    """
    owner = {c: s for s, classes in enumerate(steps) for c in classes if c not in (0, VOID)}
    known = np.zeros(256, dtype=bool)
    known[list(owner)] = True
    matrix = matrix & known
    count = matrix.sum(axis=0).tolist()
    given = [0] * 256
    result = np.full(len(matrix), -1, dtype=np.int64)

    filled = np.flatnonzero(matrix.any(axis=1))
    visits = filled[np.argsort(matrix[filled].argmax(axis=1), kind="stable")]
    for i in visits.tolist():
        classes = np.flatnonzero(matrix[i]).tolist()
        total = sum(count[c] for c in classes)
        best = max(classes, key=lambda c: 120 * (1 - given[c] / count[c]) + total / count[c])
        step = owner[best]
        result[i] = step
        for c in classes:
            if owner[c] == step:
                given[c] += 1
    return result


# --- lists on disk ------------------------------------------------------------------------------------------


def load_step_list(splits_dir: Path, step: int, num_images: int) -> list[int]:
    """Image indices of ``<splits_dir>/train-<step>.npy`` (``--splits_dir``), in the file's order.

    Raises:
        UserError: the file is missing or not a 1-D array of distinct indices below ``num_images``.
    """
    path = splits_dir / f"train-{step}.npy"
    try:
        indices = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(
            f"--splits_dir: {path} is missing; the folder needs one train-<step>.npy per step"
        ) from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--splits_dir: {path} is not a readable .npy array ({reason})") from error
    if not isinstance(indices, np.ndarray) or indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError(f"--splits_dir: {path} must hold a one-dimensional array of integers")
    if indices.size == 0:
        raise UserError(f"--splits_dir: {path} is empty; step {step} would have no image")
    outside = indices[(indices < 0) | (indices >= num_images)]
    if outside.size:
        raise UserError(
            f"--splits_dir: {path} has index {outside[0]}; "
            f"the training set has {num_images} images (0 to {num_images - 1}); mend the list"
        )
    places: dict[int, int] = {}
    for place, index in enumerate(indices.tolist()):
        if (first := places.setdefault(index, place)) != place:
            raise UserError(
                f"--splits_dir: {path} lists image {index} at the places {first} and {place}, and an image "
                "counts once; take one of the two out"
            )
    return indices.tolist()


def list_digest(indices: Collection[int]) -> str:
    """sha256 of the sorted indices joined by commas, as in ``published_splits.json``."""
    return hashlib.sha256(",".join(str(i) for i in sorted(indices)).encode()).hexdigest()


def published_list(task: Task, step: int, protocol: Protocol) -> tuple[int, str] | None:
    """(number of images, digest) of the published list; None where none is known.

    ``sequential`` trains on the images of ``disjoint``. A task counts as published by its classes, so a task
    file with other classes under a published name is not compared.
    """
    if task.dataset not in ("voc", "ade") or task.name not in task_names(task.dataset):
        return None
    if task.steps != get_task(task.dataset, task.name).steps:
        return None
    wanted = "overlapped" if protocol == "overlapped" else "disjoint"
    key = (task.dataset, task.name, step, wanted)
    for entry in json.loads(_PUBLISHED.read_text(encoding="utf-8")):
        if (entry["dataset"], entry["task"], entry["step"], entry["protocol"]) == key:
            return entry["images"], entry["sha256"]
    return None
