"""Generated data on disk, in VOC's layout, drawn by :mod:`dataset.drawing`.

For demonstrations and tests: a small network learns it from scratch on two cores within minutes.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from dataset.base import SegmentationDataset
from dataset.drawing import SHAPE_CLASSES, draw_sample
from dataset.voc import IMAGES, MASKS, find_root, open_voc_layout
from utils.errors import UserError
from utils.palette import palette

_LISTS = {"train": "train_aug", "val": "val"}  # split → name of its list file


@dataclass(frozen=True)
class ShapesConfig:
    """Parameters of a generated data set: numbers of images, side in pixels, seed."""

    train: int = 600
    val: int = 150
    size: int = 128
    seed: int = 0


def open_shapes(data_root: Path, split: str) -> SegmentationDataset:
    """Generated shapes in ``<data_root>/shapes`` or ``<data_root>``. Raises UserError if there are none."""
    remedy = f"generate it with `python data/make_shapes.py --out {data_root / 'shapes'}`"
    root = find_root(data_root, ("shapes", "."), "shapes", remedy)
    return open_voc_layout("shapes", root, split, SHAPE_CLASSES)


def make_shapes(out: Path, config: ShapesConfig, num_workers: int = 2) -> None:
    """Generate a data set. The folder ``out`` is created atomically; an equal one is kept.

    Raises:
        UserError: ``out`` exists with other content, or a number is too small.
    """
    if config.train < 1 or config.val < 1 or config.size < 16 or config.seed < 0:
        raise UserError("--train and --val must be at least 1, --size at least 16, --seed at least 0")
    manifest = json.dumps({"generator": 1, **asdict(config)})
    if (out / "shapes.json").is_file() and (out / "shapes.json").read_text() == manifest:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not this data set; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _complete_or_absent(out) as folder:
        for name in (IMAGES, MASKS, "splits"):
            (folder / name).mkdir()
        jobs = [(split, number) for split in _LISTS for number in range(getattr(config, split))]
        # Ctrl-C reaches the whole process group; only this process handles it.
        ignore = (signal.SIGINT, signal.SIG_IGN)
        pool = ProcessPoolExecutor(max(1, num_workers), initializer=signal.signal, initargs=ignore)
        try:
            list(pool.map(partial(_write_sample, folder, config), jobs, chunksize=16))
        finally:
            pool.shutdown(cancel_futures=True)
        for split, name in _LISTS.items():
            stems = (_stem(split, number) for number in range(getattr(config, split)))
            lines = (f"/{IMAGES}/{stem}.jpg /{MASKS}/{stem}.png\n" for stem in stems)
            (folder / "splits" / f"{name}.txt").write_text("".join(lines))
        (folder / "shapes.json").write_text(manifest)


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.is_dir():
            out.rmdir()  # empty; Windows does not rename onto a folder
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _stem(split: str, number: int) -> str:
    return f"{split}_{number:06d}"


def _write_sample(folder: Path, config: ShapesConfig, job: tuple[str, int]) -> None:
    split, number = job
    image, mask = draw_sample(config.size, (config.seed, list(_LISTS).index(split), number))
    stem = _stem(split, number)
    Image.fromarray(image).save(folder / IMAGES / f"{stem}.jpg", quality=92, subsampling=0)
    indexed = Image.fromarray(mask)
    indexed.putpalette(palette().flatten().tolist())
    indexed.save(folder / MASKS / f"{stem}.png", optimize=False)
