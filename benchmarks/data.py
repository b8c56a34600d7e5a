"""CPU time of one training sample on one core, by part.

    python -m benchmarks.data [--data_root D] [--crop 512] [--samples 200] [--repeats 5] [--out FILE.json]

With ``--data_root`` the images are VOC's, else generated ones of 500×375 pixels with JPEG files of similar
size. The figures are medians over the repeats of the mean CPU time per sample. Files are read from the page
cache, so that the disk is not measured. The target is 7 ms per sample and core.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import command_line, interleaved, write_report
from dataset import open_dataset
from dataset.base import SegmentationDataset
from dataset.decoding import read_image
from dataset.drawing import SHAPE_CLASSES, draw_sample
from dataset.incremental import Entry, IncrementalDataset, SampleKey, train_lookup
from dataset.transforms import normalize, train_transform
from tasks import get_task
from utils.command import run_command
from utils.option_types import path_option, positive_int
from utils.option_types import whole as whole_number
from utils.palette import palette

TARGET_MS = 7.0


def generated(folder: Path, count: int) -> SegmentationDataset:
    """Generated images of VOC's usual size, with noise so that files are as large as those of photos."""
    images, masks = [], []
    for number in range(count):
        rng = np.random.default_rng(number)
        image, mask = draw_sample(500, (0, 0, number))
        grain = image[:375].astype(np.float32) + rng.normal(0, 8, (375, 500, 1))
        images.append(folder / f"{number}.jpg")
        masks.append(folder / f"{number}.png")
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(images[-1], quality=90)
        indexed = Image.fromarray(mask[:375].copy())
        indexed.putpalette(palette().flatten().tolist())
        indexed.save(masks[-1])
    return SegmentationDataset("shapes", "train", folder, images, masks, SHAPE_CLASSES)


def run(dataset: SegmentationDataset, crop: int, count: int, repeats: int) -> dict[str, float]:
    """Milliseconds per sample of each part and of the whole sample."""
    count = min(count, len(dataset))
    table = train_lookup(get_task("voc", "15-5"), 1)
    transform = train_transform(crop)
    samples = IncrementalDataset(dataset, [Entry(i) for i in range(count)], [table], transform)
    decoded = [dataset.read(i) for i in range(count)]
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
        name: partial(lambda part: [part(i) for i in range(count)], part) for name, part in parts.items()
    }
    times = interleaved(passes, torch.device("cpu"), repeats)
    return {name: 1000 * seconds / count for name, seconds in times.items()}


def main() -> None:
    """Measure and print a table."""
    parser = command_line(__doc__)
    parser.add_argument("--data_root", type=path_option, help="folder of VOC; default: generated images")
    parser.add_argument("--crop", type=whole_number(32, 16384), default=512)
    parser.add_argument("--samples", type=positive_int, default=200)
    parser.add_argument("--repeats", type=positive_int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        if args.data_root:
            dataset = open_dataset("voc", args.data_root, "train")
        else:
            dataset = generated(Path(folder), min(args.samples, 60))
        figures = run(dataset, args.crop, args.samples, args.repeats)
        kilobytes = statistics.mean(p.stat().st_size for p in dataset.images[: args.samples]) / 1024
    whole = figures["whole sample"]
    inner = {name: figures[name] for name in ("decode JPEG", "decode mask", "relabel", "crop and flip")}
    bound = max(inner, key=lambda name: inner[name])
    for name, ms in figures.items():
        print(f"{name:28s}{ms:8.2f} ms")
    print(f"JPEG files of {kilobytes:.0f} KiB; a core reads {1000 / whole:.0f} samples per second")
    print(f"{whole:.2f} ms, target {TARGET_MS:.0f} ms; decoding alone {figures['decode JPEG']:.2f} ms")
    print(f"bound by: {bound}, {inner[bound] / whole:.0%} of the sample")
    write_report(args.out, torch.device("cpu"), ms=figures)


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.data", main))
