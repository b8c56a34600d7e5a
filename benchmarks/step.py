"""Time and memory of a whole training step of each method, relative to the network alone.

    python -m benchmarks.step [--models M ...] [--methods N ...|all] [--batch N] [--crop N] [--peak] [--out F]

Each repeat runs three steps in turn on the same network and images: cross entropy alone, the same after a
forward pass of the teacher, and the method in the real ``Trainer``. The overhead is the median time of the
method divided by that of the network (with the teacher's forward pass, if the method uses the teacher), minus
one; the target is 10 %. Peak memory is that of the tensors of one step, without weights and optimiser state.
``--peak`` (for CUDA) measures the share of the bf16 matrix peak that MIB's step reaches, and the same step in
fp32 without channels-last, with and without TF32. The JSON is rewritten after each row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, command_line, heading, interleaved, markdown, peak_bytes, write_report
from benchmarks.workbench import (
    ALL_METHODS,
    MODELS,
    Bench,
    add_options,
    bench,
    methods_of,
    options,
    prepare,
    sizes,
)
from utils.command import run_command

METHODS = ("FT", "MIB", "SDR", "PLOP", "SATS")
TARGET = 0.10
PEAK_TARGET = 0.30
FLOAT32 = "fp32, not channels-last"
COLUMNS = [
    ("network", "model", ""),
    ("method", "method", ""),
    ("images/s", "images_per_second", ".2f"),
    ("network, ms", "network_ms", ".1f"),
    ("+ teacher, ms", "network_teacher_ms", ".1f"),
    ("method, ms", "method_ms", ".1f"),
    ("overhead", "overhead", ".1%"),
    ("memory, MB", "memory_mb", ".0f"),
    ("network's, MB", "network_memory_mb", ".0f"),
]
PEAK_COLUMNS = [
    ("step", "step", ""),
    ("images/s", "images_per_second", ".2f"),
    ("TFLOP/s", "tflops", ".2f"),
    ("share of bf16 peak", "share", ".1%"),
]


def measure(made: Bench, repeats: int) -> Row:
    """Times in ms, images/s, overhead and peak memory of one method on one network."""
    device = made.context.device
    contenders = {"network": made.bare(teacher=False), "method": made.run}
    if made.context.model_old is not None:
        contenders["network_teacher"] = made.bare(teacher=True)
    times = interleaved(contenders, device, repeats)
    reference = times["network" if made.trainer.teacher is None else "network_teacher"]
    memory = {}
    for name in ("network", "method"):
        made.trainer.optimizer.zero_grad(set_to_none=True)
        memory[name] = peak_bytes(contenders[name], device) / 1e6
    return {
        **{f"{name}_ms": 1000 * value for name, value in times.items()},
        "images_per_second": made.opts.batch_size / times["method"],
        "overhead": times["method"] / reference - 1,
        "memory_mb": memory["method"],
        "network_memory_mb": memory["network"],
    }


def matrix_peak(device: torch.device, size: int, repeats: int) -> float:
    """FLOP/s of the product of two bf16 matrices size×size, median of ``repeats``."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, device, repeats, warm_up=2)["matmul"]


def measure_methods(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """One row for each method on each network."""
    for model in args.models:
        for method in methods_of(model) if "all" in args.methods else args.methods:
            made = bench(options(method, model, **sizes(args)), device)
            yield {"model": model, "method": method, **measure(made, args.repeats)}
            del made


def measure_peak(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """MIB's step in bf16, and in fp32 without channels-last, relative to the matrix peak."""
    size = 8192 if device.type == "cuda" else 512  # emulated bf16 is slow
    peak = matrix_peak(device, size, args.repeats)
    yield {"step": f"bf16 matrix product {size}³", "tflops": peak / 1e12, "share": 1.0}
    forms = [("as it is, --opt_level O1", "O1", True), (FLOAT32, "O0", True)]
    if device.type == "cuda":
        forms.append((f"{FLOAT32}, without TF32", "O0", False))
    for model in args.models:
        for name, level, tf32 in forms:
            torch.backends.cudnn.allow_tf32 = tf32
            opts = options("MIB", model, **{**sizes(args), "opt_level": level})
            made = bench(opts, device, channels_last=level != "O0")
            made.run()
            with FlopCounterMode(display=False) as counter:
                made.run()
            time = interleaved({"step": made.run}, device, args.repeats)["step"]
            flops = counter.get_total_flops() / time
            yield {
                "step": f"MIB {model}, B = {args.batch}, {args.crop}², {name}",
                "model": model,
                "form": name,
                "images_per_second": args.batch / time,
                "tflops": flops / 1e12,
                "share": flops / peak,
            }
            del made
    torch.backends.cudnn.allow_tf32 = True


def main(argv: list[str] | None = None) -> list[Row]:
    """Parse the options, measure, print, and write JSON if ``--out`` is given; returns the rows."""
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deeplab-resnet101", "segformer_b2"])
    parser.add_argument("--methods", nargs="+", choices=(*ALL_METHODS, "all"), default=METHODS)
    parser.add_argument("--peak", action="store_true", help="share of the matrix peak instead; B = 24")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.peak and args.batch is None:
        args.batch = 24
    device = prepare(args)
    measured, columns = (measure_peak, PEAK_COLUMNS) if args.peak else (measure_methods, COLUMNS)
    print(heading(device))
    target = f"{PEAK_TARGET:.0%} of the peak" if args.peak else f"overhead at most {TARGET:.0%}"
    print(f"B = {args.batch}, {args.crop}², {args.opt_level}; target: {target}")
    print(markdown(columns, []), flush=True)
    rows: list[Row] = []
    for row in measured(args, device):
        rows.append(row)
        print(markdown(columns, [row]).splitlines()[-1], flush=True)
        write_report(args.out, device, **sizes(args), target=TARGET, rows=rows)
    return rows


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.step", main))
