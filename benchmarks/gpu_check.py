"""All checks that need a GPU, each with a time limit: tests, real runs, benchmarks.

    bash scripts/gpu_check.sh                # on a machine with a GPU; see there
    bash scripts/gpu_check.sh --small        # small sizes, on the CPU

Parts of one stage run concurrently, stages in sequence, the most important first. After every part
``gpu_check.json`` (exit code and seconds of each part) and ``gpu_check.txt`` (their output) are updated in
the output folder, so that an interrupted check keeps its results. Exit code 1 if a part fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import Row, device_name, write_report
from utils.command import run_command
from utils.option_types import Number, path_option

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: as in the report.
        words: arguments of Python.
        limit: seconds after which it is killed.
        stage: parts of one stage run concurrently.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    stage: int


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts, in order of execution."""
    small = options.small
    networks = ("deeplab-mobilenet_v2", "segformer_b0") if small else ("deeplab-resnet101", "segformer_b2")
    methods = ("FT", "MIB") if small else ("all",)
    losses = ("--only", "prototype", "--repeats", "1") if small else ("--device", "cuda", "--repeats", "7")
    size = ("--batch", "2", "--crop", "64", "--repeats", "1")
    full = ("--batch", "24", "--crop", "512", "--repeats", "3")
    step = ("step", *(size if small else full), "--models")

    def benchmark(name: str, stage: int, limits: tuple[int, int], file: str, *words: str) -> Part:
        command = ("-m", f"benchmarks.{words[0]}", *words[1:], "--out", f"{options.out}/{file}.json")
        return Part(name, command, limits[small], stage)

    tests = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "cuda")
    return [
        Part("tests", ("-m", "pytest", *tests, *options.pytest.split()), 150, 0),
        benchmark("real runs", 0, (150, 900), "real_runs", "real_runs", *_real_runs(options)),
        benchmark("losses", 1, (60, 300), "losses", "losses", *losses),
        benchmark("peak", 2, (60, 300), "peak", *step, networks[0], "--peak"),
        *(
            benchmark(f"methods on {name}", stage, (120, 300), name, *step, name, "--methods", *methods)
            for stage, name in enumerate(networks, start=3)
        ),
    ]


def _real_runs(options: argparse.Namespace) -> tuple[str, ...]:
    """Arguments of ``benchmarks.real_runs``: photos if given, else generated data."""
    words = ["--data_root", str(options.photos or options.shapes), "--logs", str(options.logs)]
    if not options.photos:
        words += ["--dataset", "shapes"]
    if options.weights:
        words += ["--weights", str(options.weights)]
    words += ["--small", "--side_by_side", "1", "--only", "MIB"] if options.small else ["--num_workers", "2"]
    return tuple(words)


def run_part(part: Part, folder: Path, left: float) -> tuple[int, float, str]:
    """Run a part within its limit and the time left: exit code (-1: over its time), seconds, output."""
    began = time.monotonic()
    output = folder / f".{part.name.replace(' ', '_')}.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *part.words],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its child processes can be killed with it
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            code = process.wait(max(1.0, min(part.limit, left)))
        except subprocess.TimeoutExpired:
            code = -1
        with contextlib.suppress(ProcessLookupError):  # all processes have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    printed = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    return code, time.monotonic() - began, printed


def record(part: Part, folder: Path, code: int, seconds: float, printed: str) -> Row:
    """Print the end of a part's output and add all of it to ``gpu_check.txt``; returns its row."""
    verdict = "ok" if code == 0 else "over its time" if code < 0 else f"exit code {code}"
    print(f"{part.name}: {verdict} after {seconds:.0f} s", flush=True)
    print("\n".join(printed.splitlines()[-12 if code == 0 else -30 :]), flush=True)
    with (folder / "gpu_check.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n=== {part.name}: {verdict} after {seconds:.0f} s\n{printed}")
    return {"part": part.name, "verdict": verdict, "seconds": round(seconds, 1)}


def main(argv: list[str] | None = None) -> int:
    """Run the parts within the time limit; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=path_option, required=True, help="folder of the reports")
    parser.add_argument("--logs", type=path_option, required=True, help="folder of the real runs")
    parser.add_argument("--shapes", type=path_option, help="generated data set")
    parser.add_argument("--photos", type=path_option, help="data root of VOC photos")
    parser.add_argument("--weights", type=path_option, help="MobileNetV2's pretrained weights")
    parser.add_argument(
        "--minutes", type=Number(float, 0, 1440, above=True), default=9.0, help="time limit of all parts"
    )
    parser.add_argument("--pytest", default="", help="more arguments for pytest, e.g. '-n 8'")
    parser.add_argument("--small", action="store_true", help="small sizes, any device")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose name contains one of these")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(device_name(device), "torch", torch.__version__, flush=True)
    began, rows = time.monotonic(), list[Row]()
    end = began + 60 * options.minutes
    chosen = [part for part in parts(options) if any(word in part.name for word in options.only)]
    for stage in sorted({part.stage for part in chosen}):
        now = [part for part in chosen if part.stage == stage]
        with ThreadPoolExecutor(len(now)) as pool:
            left = end - time.monotonic()
            running = {pool.submit(run_part, part, options.out, left): part for part in now}
            for ended in as_completed(running):
                rows.append(record(running[ended], options.out, *ended.result()))
                seconds = round(time.monotonic() - began, 1)
                write_report(options.out / "gpu_check.json", device, seconds=seconds, parts=rows)
    return int(any(row["verdict"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.gpu_check", main))
