"""Shared by the benchmarks: clocks, interleaved repeats, name of the machine, reports."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from utils.files import atomic_write_text
from utils.option_types import Parser, path_option
from utils.processor import model_name

Row = dict[str, Any]
Column = tuple[str, str, str]  # heading, key and format


def processor_time(device: torch.device) -> bool:
    """Whether ``seconds`` measures CPU time, which other jobs affect less; with one CPU thread only."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call with the device's work, as wall time or CPU time (see ``processor_time``)."""
    clock = time.process_time if processor_time(device) else time.perf_counter
    synchronise(device)
    start = clock()
    result = function()
    synchronise(device)
    elapsed = clock() - start
    del result
    return elapsed


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, *, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each contender; each repeat runs all, so that other load affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(warm_up + repeats):
        for name, function in contenders.items():
            elapsed = seconds(function, device)
            if repeat >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak memory of tensors during a call in bytes, above the memory in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def device_name(device: torch.device) -> str:
    """Model of the GPU or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else model_name()


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, clock and PyTorch version of a measurement."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if processor_time(device) else "wall time",
        "torch": torch.__version__,
    }


def heading(device: torch.device) -> str:
    """``machine`` as one line, for the heading of a table."""
    return "{device}, threads: {threads}, {clock}, torch {torch}".format(**machine(device))


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A Markdown table for the screen and the documentation.

    Args:
        columns: heading, key and format of each column; the cell is empty if a row lacks the key.
        rows: figures by key.
    """
    lines = [
        "| " + " | ".join(title for title, _, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for _, key, form in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, with its ``--out``."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_option, help="write the figures as JSON")
    return parser


def write_report(path: Path | None, device: torch.device, **content: Any) -> None:
    """Write figures and machine as JSON, if a path is given."""
    if path is not None:
        atomic_write_text(path, json.dumps({**machine(device), **content}, indent=2) + "\n")
