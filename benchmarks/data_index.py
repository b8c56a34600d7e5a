"""How fast is the presence index? (``dataset.splits.scan_presence``)

    python benchmarks/data_index.py [MASKS] [--limit N] [--rounds R]

MASKS is a folder of PNG masks; the default is VOC's 10,582 training masks in ``shared/`` beside the checkout.
The reference opens each mask with PIL and takes ``numpy.unique``. Both are measured in turn, round by round
in one process, by the processor time they take, so that the ratio is one per core. Then come the time with
all cores, and that of a second start, which reads the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from utils.command import run_command

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.splits import default_workers, scan_presence  # noqa: E402
from utils.option_types import path_option, positive_int  # noqa: E402

VOC = ROOT.parent / "shared" / "voc_masks"


def reference(paths: list[Path]) -> list[frozenset[int]]:
    """Class ids in every mask, the plain way."""
    presence = []
    for path in paths:
        with Image.open(path) as image:
            ids = np.unique(np.asarray(image))
        presence.append(frozenset(ids.tolist()) - {0, 255})
    return presence


def training_masks() -> list[Path]:
    """VOC's augmented training masks, in list order."""
    lines = (VOC / "splits" / "train_aug.txt").read_text(encoding="utf-8").splitlines()
    return [VOC / line.split()[1].lstrip("/") for line in lines]


def timed(function: Callable[[], list[frozenset[int]]], clock: Callable[[], float]) -> tuple[float, list]:
    """Seconds on the clock, and the result."""
    start = clock()
    result = function()
    return clock() - start, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("masks", type=path_option, nargs="?", help="folder of PNG masks")
    parser.add_argument("--limit", type=positive_int, default=None, help="only the first N masks")
    parser.add_argument("--rounds", type=positive_int, default=3, help="repetitions; medians are shown")
    args = parser.parse_args()
    paths = (sorted(args.masks.glob("*.png")) if args.masks else training_masks())[: args.limit]
    for path in paths:
        path.read_bytes()  # both find the files in the system's cache

    slow, fast = [], []
    for _ in range(args.rounds):
        seconds, expected = timed(lambda: reference(paths), time.process_time)
        slow.append(seconds)
        seconds, found = timed(lambda: scan_presence(paths, workers=1, progress=False), time.process_time)
        fast.append(seconds)
        if found != expected:
            raise SystemExit("the index differs from the reference")
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    per_mask = 1e6 / len(paths)
    print(f"{len(paths)} masks, {args.rounds} rounds, processor time per mask on one core")
    print(f"PIL + numpy.unique   {statistics.median(slow) * per_mask:7.0f} µs")
    print(f"presence index       {statistics.median(fast) * per_mask:7.0f} µs")
    print(f"ratio                {statistics.median(ratios):7.2f}   (lowest {min(ratios):.2f})")

    cores = default_workers()
    one, _ = timed(lambda: scan_presence(paths, workers=1, progress=False), time.perf_counter)
    all_, _ = timed(lambda: scan_presence(paths, progress=False), time.perf_counter)
    print(
        f"wall time            {one:7.2f} s with 1 core, {all_:.2f} s with {cores} ({one / all_:.2f} times)"
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        first, _ = timed(lambda: scan_presence(paths, cache_dir=cache, progress=False), time.perf_counter)
        second, _ = timed(lambda: scan_presence(paths, cache_dir=cache, progress=False), time.perf_counter)
    print(f"with a cache         {first:7.2f} s at the first start, {second:.2f} s at the second")


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.data_index", main))
