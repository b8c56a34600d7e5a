"""``--predict``: masks and overlays of image files, from a checkpoint.

Writes a PNG mask per image to ``<out>/predictions/``, and the image with class colours and a legend to
``<out>/overlays/``. The camera's orientation (EXIF) is not applied, so that a mask fits the stored image
pixel by pixel.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from argparser import Options
from dataset.base import IMAGE_SUFFIXES
from dataset.decoding import read_image
from inference.legend import with_legend
from inference.load import TrainedNetwork, model_from_checkpoint
from inference.multiscale import predict_classes, predictor
from train import Precision
from utils import distributed
from utils.distributed import World
from utils.errors import DataError, UserError
from utils.files import atomic_write
from utils.logger import progress, setup_logging
from utils.memory import is_out_of_memory
from utils.palette import palette
from utils.visualize import overlay

PREDICTIONS, OVERLAYS = "predictions", "overlays"

log = logging.getLogger(__name__)


class Predictor:
    """Predicts images of any size as dataset class ids, the values in the data set's masks."""

    def __init__(self, network: TrainedNetwork, device: torch.device) -> None:
        opts = network.opts
        self.device = device
        self.precision = Precision.of(opts, device)
        self.model = self.precision.place(network.model)
        self.predict = predictor(opts.test_scales, opts.test_flip, opts.fusion_mode)
        self.class_ids = torch.tensor(network.class_ids, dtype=torch.uint8)

    def __call__(self, image: Tensor) -> Tensor:
        """Image uint8 3×H×W → class ids uint8 H×W, on the CPU."""
        classes = predict_classes(
            self.model, image, device=self.device, precision=self.precision, predict=self.predict
        )
        return self.class_ids[classes]


def predict(opts: Options, world: World) -> int:
    """Predict ``opts.predict``, an image or a folder of images, into ``opts.out``.

    Images are divided among the processes. An unreadable image is reported on standard error and skipped.

    Returns:
        0, or 2 if an image could not be predicted.

    Raises:
        UserError: there is no image, the checkpoint cannot be used, or results cannot be written.
    """
    setup_logging(world, None, debug=opts.debug)
    for note in opts.notes:
        log.info(note)
    files = find_images(opts.predict, opts.out)
    network = model_from_checkpoint(opts.ckpt, opts)
    classes = len(network.class_ids)
    what = f"step {network.step} of task {network.task.name} on {network.task.dataset}, {classes} classes"
    counted = f"{len(files)} image{'' if len(files) == 1 else 's'}"
    log.info("%s: %s; %s", opts.ckpt, what, counted)
    began = time.perf_counter()
    with distributed.shared_errors():
        own = list(files.items())[world.rank :: world.size]
        shown = progress(own, total=len(own), desc="images", world=world, interval=opts.print_interval)
        predictor = Predictor(network, world.device)
        if world.is_main:
            predictor.precision.log_choice("opt_level" in opts.typed)
        failed = sum(not _predict_one(path, name, predictor, network) for name, path in shown)
    failed = sum(distributed.gather_objects(failed))
    seconds = time.perf_counter() - began
    left_out = f", {failed} skipped" if failed else ""
    done = len(files) - failed
    log.info(
        "%d of %s predicted into %s/{%s,%s}%s (%.1f s)",
        *(done, counted, opts.out, PREDICTIONS, OVERLAYS, left_out, seconds),
    )
    return 2 if failed else 0


def find_images(path: Path, out: Path) -> dict[Path, Path]:
    """The image, or all images in a folder and its subfolders, sorted, without hidden files and results.

    Of a folder, also what is named like an image and is a broken link or no regular file. The keys are the
    paths of their results, relative to the result folders.

    Raises:
        UserError: no such file or folder, no image in it, or two images would get the same name.
    """
    if path.is_file():
        return {Path(f"{path.stem}.png"): path}
    if not path.is_dir():
        raise UserError(f"--predict {path}: {_why_no_file(path)}")
    results = {(out / name).resolve() for name in (PREDICTIONS, OVERLAYS)}
    files: dict[Path, Path] = {}
    for file in sorted(_files(path, results)):
        if file.name.startswith(".") or file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        name = file.relative_to(path).with_suffix(".png")
        if name in files:
            raise UserError(f"{file}: {files[name].name} would get the same name; rename one of them")
        files[name] = file
    if not files:
        raise UserError(f"--predict {path}: contains no image ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return files


def _files(path: Path, left_out: set[Path]) -> Iterator[Path]:
    """Files in a folder and its subfolders, without hidden folders.

    Linked folders are followed. Each folder is read once, so that loops end; by its own path if it has one.
    """
    read, waiting = set[Path](), [path]
    for start in waiting:
        for top, subfolders, names in os.walk(start):  # does not follow links
            folder = Path(top)
            real = folder.resolve()
            if real in read or not left_out.isdisjoint((real, *real.parents)):
                subfolders.clear()
                continue
            read.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            waiting += [folder / name for name in subfolders if (folder / name).is_symlink()]
            yield from (folder / name for name in names)


def _why_no_file(path: Path) -> str:
    """Why a path is neither a file nor a folder, and the remedy."""
    if path.exists():
        return "not a regular file; give an image, or a folder of images"
    if path.is_symlink():
        return "a broken link; correct or remove it"
    return "no such file or folder; check the path"


def _predict_one(path: Path, name: Path, predictor: Predictor, network: TrainedNetwork) -> bool:
    """Predict one image and write its results; on failure print the reason and return False."""
    opts = network.opts
    try:
        if not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path}: {_why_no_file(path)}")
        image = read_image(path)
        ids = _within_memory(path, predictor, image).numpy()
    except DataError as error:
        print(f"run.py: error: {error}", file=sys.stderr, flush=True)
        return False
    mask = Image.fromarray(ids)
    if not opts.raw:
        mask.putpalette(palette().tobytes())
    _save(mask, opts.out / PREDICTIONS / name)
    shown = with_legend(overlay(image, ids), ids, network.class_names)
    _save(Image.fromarray(shown), opts.out / OVERLAYS / name)
    return True


def _within_memory(path: Path, predictor: Predictor, image: Tensor) -> Tensor:
    try:
        return predictor(image)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        height, width = image.shape[-2:]
        raise DataError(
            f"{path}: {width}×{height} pixels need more memory than is available; scale it down"
        ) from error


def _save(image: Image.Image, path: Path) -> None:
    with atomic_write(path, "free some space or choose another --out") as file:
        image.save(file, format="PNG")
