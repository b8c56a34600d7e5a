"""CPU time of one training sample on one core, by part, and images per second of a training loader.

    python -m benchmarks.data [--data_root D] [--crop 512] [--samples 200] [--repeats 5] [--out FILE.json]
    python -m benchmarks.data --num_workers 16 [--batch 24] [--seconds 8] ...      with the loader

With ``--data_root`` the images are VOC's, else generated ones of 500×375 pixels with JPEG files of similar
size. ``--short_side`` first resizes small copies of the photos to VOC's size, with grain, so that the files
are as large as VOC's. The figures are medians over the repeats of the mean CPU time per sample. Files are
read from the page cache, so that the disk is not measured. The target is 7 ms per sample and core. The
loader, with ``--num_workers`` processes, is timed after its first two seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import command_line, interleaved, write_report
from dataset import open_dataset
from dataset.base import SegmentationDataset
from dataset.decoding import read_image
from dataset.drawing import SHAPE_CLASSES, draw_sample
from dataset.incremental import Entry, IncrementalDataset, SampleKey, train_lookup
from dataset.loaders import Workers, make_train_loader
from dataset.transforms import normalize, train_transform
from tasks import get_task
from utils.command import run_command
from utils.distributed import World
from utils.option_types import Number, count, path_option, positive_int
from utils.option_types import whole as whole_number
from utils.palette import palette
from utils.processor import available_cores

TARGET_MS = 7.0


def generated(folder: Path, number: int) -> SegmentationDataset:
    """Generated images of VOC's usual size."""
    drawn = (draw_sample(500, (0, 0, i)) for i in range(number))
    pairs = ((Image.fromarray(image[:375]), Image.fromarray(mask[:375].copy())) for image, mask in drawn)
    return _saved(folder, pairs)


def enlarged(folder: Path, dataset: SegmentationDataset, number: int, short_side: int) -> SegmentationDataset:
    """The first photos of a data set, resized."""

    def pair(i: int) -> tuple[Image.Image, Image.Image]:
        image, mask = (Image.open(files[i]) for files in (dataset.images, dataset.masks))
        scale = short_side / min(image.size)
        size = (round(scale * image.width), round(scale * image.height))
        return image.resize(size, Image.Resampling.BICUBIC), mask.resize(size, Image.Resampling.NEAREST)

    return _saved(folder, (pair(i) for i in range(min(number, len(dataset)))))


def _saved(folder: Path, pairs: Iterable[tuple[Image.Image, Image.Image]]) -> SegmentationDataset:
    """A data set of JPEG files, with noise so that they are as large as those of photos, and PNG masks."""
    images, masks = [], []
    for number, (image, mask) in enumerate(pairs):
        rng = np.random.default_rng(number)
        noisy = np.asarray(image, np.float32) + rng.normal(0, 8, (image.height, image.width, 1))
        images.append(folder / f"{number}.jpg")
        masks.append(folder / f"{number}.png")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images[-1], quality=90)
        mask.putpalette(palette().flatten().tolist())
        mask.save(masks[-1])
    return SegmentationDataset("shapes", "train", folder, images, masks, SHAPE_CLASSES)


def loader_rate(dataset: SegmentationDataset, args: argparse.Namespace, device: torch.device) -> float:
    """Images per second of a training loader; on CUDA with pinned memory."""
    warm_up, number = 2.0, 200_000
    table = train_lookup(get_task("voc", "15-5"), 1)
    entries = [Entry(i % len(dataset)) for i in range(number)]
    samples = IncrementalDataset(dataset, entries, [table], train_transform(args.crop))
    world = World(0, 0, 1, device, None)
    received, began = 0, 0.0
    with Workers([samples], world, num_workers=args.num_workers) as workers:
        first = time.perf_counter()
        for images, *_ in make_train_loader(samples, args.batch, workers, world=world):
            now = time.perf_counter()
            if not began and now - first >= warm_up:
                began = now
            elif began:
                received += len(images)
                if now - began >= args.seconds:
                    break
    return received / (now - began)


def run(dataset: SegmentationDataset, crop: int, number: int, repeats: int) -> dict[str, float]:
    """Milliseconds per sample of each part and of the whole sample."""
    number = min(number, len(dataset))
    table = train_lookup(get_task("voc", "15-5"), 1)
    transform = train_transform(crop)
    samples = IncrementalDataset(dataset, [Entry(i) for i in range(number)], [table], transform)
    decoded = [dataset.read(i) for i in range(number)]
    plain = [(image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)) for image, mask in decoded]
    lookup = table.numpy()
    batch = [transform(*pair)[0] for pair in plain]
    parts: dict[str, Callable[[int], object]] = {
        "decode JPEG": lambda i: read_image(dataset.images[i]),
        "decode mask": lambda i: dataset.read_mask(i),
        "relabel": lambda i: lookup.take(plain[i][1].numpy()),
        "crop and flip": lambda i: transform(*plain[i]),
        "whole sample": lambda i: samples[SampleKey(i, 0, i)],
        "normalise (on the device)": lambda i: normalize(batch[i]),
    }
    passes = {
        name: partial(lambda part: [part(i) for i in range(number)], part) for name, part in parts.items()
    }
    times = interleaved(passes, torch.device("cpu"), repeats)
    return {name: 1000 * seconds / number for name, seconds in times.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON if ``--out`` is given; returns the figures."""
    parser = command_line(__doc__)
    parser.add_argument("--data_root", type=path_option, help="folder of VOC; default: generated images")
    parser.add_argument("--crop", type=whole_number(32, 16384), default=512)
    parser.add_argument("--samples", type=positive_int, default=200)
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--short_side", type=positive_int, help="resize the photos first; VOC: 375")
    parser.add_argument("--num_workers", type=count, default=0, help="of the loader; 0: it is not timed")
    parser.add_argument("--batch", type=positive_int, default=24, help="of the loader")
    parser.add_argument(
        "--seconds", type=Number(float, 0, 3600, above=True), default=8.0, help="of the loader"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # as in a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        if args.data_root:
            dataset = open_dataset("voc", args.data_root, "train")
            if args.short_side:
                dataset = enlarged(Path(folder), dataset, args.samples, args.short_side)
        else:
            dataset = generated(Path(folder), min(args.samples, 60))
        figures = run(dataset, args.crop, args.samples, args.repeats)
        rate = loader_rate(dataset, args, device) if args.num_workers else None
        kilobytes = statistics.mean(p.stat().st_size for p in dataset.images[: args.samples]) / 1024
    whole = figures["whole sample"]
    inner = {name: figures[name] for name in ("decode JPEG", "decode mask", "relabel", "crop and flip")}
    bound = max(inner, key=lambda name: inner[name])
    for name, ms in figures.items():
        print(f"{name:28s}{ms:8.2f} ms")
    print(f"JPEG files of {kilobytes:.0f} KiB; a core reads {1000 / whole:.0f} samples per second")
    print(f"{whole:.2f} ms, target {TARGET_MS:.0f} ms; decoding alone {figures['decode JPEG']:.2f} ms")
    print(f"bound by: {bound}, {inner[bound] / whole:.0%} of the sample")
    report: dict[str, Any] = {"ms": figures, "kib": kilobytes, "crop": args.crop}
    if rate is not None:
        print(f"loader: {rate:.0f} images/s with {args.num_workers} processes, {available_cores()} cores")
        report |= {"images_per_second": rate, "num_workers": args.num_workers, "cores": available_cores()}
    write_report(args.out, device, **report)
    return report


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.data", main))
