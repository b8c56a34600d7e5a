"""Time of a step for different numbers of processes, classes and steps, and crop sizes.

    python -m benchmarks.scaling [--model M] [--method N] [--batch N] [--crop N] [--repeats N] [--out F.json]
    python -m benchmarks.scaling --compile                   only the step without and with torch.compile

Processes: two Gloo processes with one thread each. In each repeat the first trains alone, then both train
with gradients exchanged; the efficiency is the images per second of both divided by twice those of one.
Classes, steps and crop: the step of ``--method`` on tasks of 21 and 151 classes in 1 or 11 steps, and at
three crop sizes, interleaved, as ratios to the first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Row, command_line, interleaved
from benchmarks.workbench import ALL_METHODS, MODELS, Bench, add_options, bench, options, prepare, show, sizes
from train import Trainer
from utils.command import run_command
from utils.memory import keep_freed_memory

COLUMNS = [
    ("case", "case", ""),
    ("ms", "ms", ".1f"),
    ("images/s", "images_per_second", ".2f"),
    ("ratio to the first", "ratio", ".2f"),
    ("efficiency", "efficiency", ".0%"),
]
# Name, task, last step of the task.
CLASSES = (
    ("21 classes, 1 step", ("--dataset", "voc", "--task", "offline"), 0),
    ("21 classes, 11 steps", ("--dataset", "voc", "--task", "10-1"), 10),
    ("151 classes, 1 step", ("--dataset", "ade", "--task", "offline"), 0),
    ("151 classes, 11 steps", ("--dataset", "ade", "--task", "100-5"), 10),
)


def _process(rank: int, folder: str, args: argparse.Namespace) -> None:
    """Run both kinds of steps in one of two processes; the first writes the seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    meeting = f"file://{folder}/group"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=30)
    )
    made = bench(options(args.method, args.model, batch=args.batch, crop=args.crop), torch.device("cpu"))
    together = Trainer(
        made.context,
        made.trainer.methods,
        made.trainer.optimizer,
        forward=DistributedDataParallel(made.context.model, gradient_as_bucket_view=True),
    )
    together.model.train()

    def alone() -> None:
        if rank == 0:
            made.run()
        dist.barrier()

    def both() -> None:
        together.train_step(*made.sample)
        dist.barrier()

    times = interleaved({"alone": alone, "both": both}, torch.device("cpu"), args.repeats)
    if rank == 0:
        torch.save(times, Path(folder) / "times.pth")
    dist.destroy_process_group()


def processes(args: argparse.Namespace) -> list[Row]:
    """Images per second of one and of two processes, and the efficiency."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, args=(folder, args), nprocs=2)
        times = torch.load(Path(folder) / "times.pth", weights_only=True)
    rates = {"1 process": args.batch / times["alone"], "2 processes": 2 * args.batch / times["both"]}
    return [
        {
            "case": name,
            "ms": 1000 * time,
            "images_per_second": rates[name],
            "efficiency": rates[name] / (number * rates["1 process"]),
        }
        for number, (name, time) in enumerate(zip(rates, times.values(), strict=True), start=1)
    ]


def compare(made: dict[str, Bench], device: torch.device, repeats: int) -> list[Row]:
    """Time the steps, interleaved; ratios to the first."""
    times = interleaved({name: item.run for name, item in made.items()}, device, repeats)
    first = next(iter(times.values()))
    return [
        {
            "case": name,
            "ms": 1000 * time,
            "images_per_second": made[name].opts.batch_size / time,
            "ratio": time / first,
        }
        for name, time in times.items()
    ]


def main(argv: list[str] | None = None) -> list[Row]:
    """Parse the options, measure, print, and write JSON if ``--out`` is given; returns the rows."""
    parser = command_line(__doc__)
    parser.add_argument("--method", choices=ALL_METHODS, default="FT", help="FT: no teacher at any step")
    parser.add_argument("--model", choices=MODELS, default="deeplab-mobilenet_v2")
    parser.add_argument("--compile", action="store_true", help="only compare with torch.compile (minutes)")
    add_options(parser)
    args = parser.parse_args(argv)
    device = prepare(args)
    rows = compilation(args, device) if args.compile else growth(args, device)
    show(args, device, COLUMNS, rows)
    return rows


def compilation(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The step without and with ``--compile``; the time of compiling is not included."""
    made = {
        name: bench(options(args.method, args.model, words=words, **sizes(args)), device)
        for name, words in (("as it is", ()), ("compiled", ("--compile",)))
    }
    return compare(made, device, args.repeats)


def growth(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Classes, steps and crop sizes; on the CPU also processes."""
    by_classes = {
        name: bench(options(args.method, args.model, words=words, **sizes(args)), device, step=step)
        for name, words, step in CLASSES
    }
    rows = compare(by_classes, device, args.repeats)
    del by_classes
    by_crop = {
        f"crop {crop}²": bench(options(args.method, args.model, **{**sizes(args), "crop": crop}), device)
        for crop in (args.crop, args.crop * 3 // 2, args.crop * 2)
    }
    rows += compare(by_crop, device, args.repeats)
    del by_crop
    if device.type == "cpu":
        rows += processes(args)
    return rows


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.scaling", main))
