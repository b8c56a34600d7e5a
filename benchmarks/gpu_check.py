"""All checks that need a GPU, each with a time limit: tests, real runs, speed, loader, a small comparison.

    bash scripts/gpu_check.sh                # on a machine with a GPU; see there
    bash scripts/gpu_check.sh --small        # small sizes, on the CPU

Parts of one stage run concurrently, stages in sequence, the most important first. After every part the
output folder's ``gpu_check.json`` (each part's outcome, seconds and figures, and the answers) and
``gpu_check.txt`` (their output) are updated, so that an interrupted check keeps its results; a part that is
stopped keeps the figures written until then. The answers compare each figure with its target. Exit code 1 if
a part fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu_answers import ANSWER_COLUMNS, answers
from benchmarks.measure import Row, device_name, markdown, write_report
from train import Precision
from utils.command import run_command
from utils.errors import UserError
from utils.files import read_text
from utils.option_types import Number, Parser, path_option, positive_int
from utils.structured_text import parse_text

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15.0  # seconds between SIGTERM, after which experiments save and print their table, and SIGKILL


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: as in the report.
        words: arguments of Python.
        limit: seconds after which it is stopped.
        stage: parts of one stage run concurrently.
        figures: the JSON file that it writes.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    stage: int
    figures: Path | None = None


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts, in order of execution."""
    small = options.small
    networks = ("deeplab-mobilenet_v2", "segformer_b0") if small else ("deeplab-resnet101", "segformer_b2")
    methods = ("FT", "MIB", "DKD") if small else ("all",)
    losses = ("--only", "prototype", "--repeats", "1") if small else ("--device", "cuda", "--repeats", "7")
    size = ("--batch", "2", "--crop", "64", "--repeats", "1")
    step = size if small else ("--batch", "24", "--crop", "512", "--repeats", "3")

    def benchmark(name: str, stage: int, limits: tuple[int, int], *words: str) -> Part:
        file = options.work / f"{name.replace(' ', '_')}.json"
        command = ("-m", f"benchmarks.{words[0]}", *words[1:], "--out", str(file))
        return Part(name, command, limits[small], stage, file)

    tests = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "cuda")
    found = [
        Part("tests", ("-m", "pytest", *tests, *options.pytest.split()), 170, 0),
        benchmark("real runs", 0, (170, 2400), "real_runs", *_real_runs(options)),
        benchmark("peak", 1, (60, 300), "step", *step, "--models", *networks, "--peak"),
        *(
            benchmark(f"methods on {name}", stage, (120, 300), "step", *step, *chosen)
            for stage, name in enumerate(networks, start=2)
            for chosen in [("--models", name, "--methods", *methods)]
        ),
        benchmark("losses", 4, (60, 300), "losses", "--plain", *losses),
        benchmark("loader", 5, (45, 300), "data", *_loader(options)),
    ]
    if not small:  # the test of benchmarks.scaling has --compile; on the CPU it takes minutes
        compiled = ("--compile", *step, "--model", networks[0], "--method", "MIB")
        found.append(benchmark("compile", 6, (90, 90), "scaling", *compiled))
    if options.experiment and options.photos:
        words = ("-m", "scripts.experiment", str(_comparison(options)), "--local", "--set")
        found.append(Part("comparison", (*words, *_replaced(options)), 3600, 7))
    return found


def _real_runs(options: argparse.Namespace) -> tuple[str, ...]:
    """Arguments of ``benchmarks.real_runs``: photos if given, else generated data."""
    words = ["--data_root", str(options.photos or options.shapes), "--logs", str(options.work / "runs")]
    if not options.photos:
        words += ["--dataset", "shapes"]
    if options.weights:
        words += ["--weights", str(options.weights)]
    words += ["--small", "--side_by_side", "1", "--only", "MIB", "DKD"] if options.small else []
    return tuple(words)


def _loader(options: argparse.Namespace) -> tuple[str, ...]:
    """Arguments of ``benchmarks.data``: photos enlarged to VOC's size if given, else generated ones."""
    photos = ("--data_root", str(options.photos), "--short_side", "375") if options.photos else ()
    samples = "8" if options.small else "200"
    workers = "1" if options.small else "16"
    return (*photos, "--samples", samples, "--repeats", "1", "--num_workers", workers)


def _comparison(options: argparse.Namespace) -> Path:
    """The experiment with the chosen runs and those they start from, in a file of its own.

    Raises:
        UserError: the experiment has no run of a chosen name.
    """
    content: dict[str, Any] = parse_text(read_text(options.experiment), str(options.experiment))
    waiting, chosen = list(options.runs or content["runs"]), dict[str, Any]()
    while waiting:
        name = waiting.pop()
        if name not in content["runs"]:
            raise UserError(f"--runs {name}: {options.experiment} has no such run")
        chosen[name] = content["runs"][name]
        waiting += [other for other in (chosen[name].get("from"),) if other and other not in chosen]
    content |= {"runs": chosen, "logdir": str(options.work / "comparison"), "processes": options.processes}
    file = Path(options.work / "comparison.yaml")
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def _replaced(options: argparse.Namespace) -> tuple[str, ...]:
    """Options of the experiment's commands: where photos and weights are, and what ``--set`` names."""
    weights = f"pretrained_path={options.weights}" if options.weights else "no_pretrained"
    return (f"data_root={options.photos}", weights, *options.set)


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
            code = process.wait(max(1.0, min(part.limit, left - GRACE)))
        except subprocess.TimeoutExpired:
            code = -1
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # all processes have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    printed = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    return code, time.monotonic() - began, printed


def record(part: Part, folder: Path, code: int, seconds: float, printed: str) -> Row:
    """Print the end of a part's output and add all of it to ``gpu_check.txt``; returns its row."""
    verdict = "ok" if code == 0 else "over its time" if code < 0 else f"exit code {code}"
    lines = printed.splitlines()
    print(f"{part.name}: {verdict} after {seconds:.0f} s", flush=True)
    print("\n".join(lines[-6 if code == 0 else -25 :]), flush=True)
    with (folder / "gpu_check.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n=== {part.name}: {verdict} after {seconds:.0f} s\n{printed}")
    row: Row = {"part": part.name, "verdict": verdict, "seconds": round(seconds, 1)}
    row["last_line"] = lines[-1] if lines else ""
    if part.figures and part.figures.is_file():
        row["figures"] = json.loads(read_text(part.figures))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts within the time limit; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=path_option, required=True, help="folder of the reports")
    parser.add_argument("--work", type=path_option, required=True, help="folder of the runs and figures")
    parser.add_argument("--shapes", type=path_option, help="generated data set")
    parser.add_argument("--photos", type=path_option, help="data root of VOC photos")
    parser.add_argument("--weights", type=path_option, help="MobileNetV2's pretrained weights")
    parser.add_argument(
        "--minutes", type=Number(float, 0, 1440, above=True), default=9.0, help="time limit of all parts"
    )
    parser.add_argument("--pytest", default="", help="more arguments for pytest, e.g. '-n 8'")
    parser.add_argument("--small", action="store_true", help="small sizes, any device")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose name contains one of these")
    parser.add_argument("--experiment", type=path_option, help="file of the comparison; it needs --photos")
    parser.add_argument("--runs", nargs="+", default=[], help="runs of the comparison; default: all")
    parser.add_argument("--processes", type=positive_int, default=4, help="concurrent runs of the comparison")
    parser.add_argument("--set", nargs="+", default=[], help="options of the comparison, e.g. epochs=4")
    options = parser.parse_args(argv)
    if options.experiment and not options.photos:
        raise UserError("--experiment: the comparison needs photos; give --photos, or pack them")
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision("O1", device).description
    print(f"{device_name(device)}, torch {torch.__version__}, --opt_level O1: {precision}", flush=True)
    began, rows = time.monotonic(), list[Row]()
    end = began + 60 * options.minutes

    def write_json() -> None:
        seconds = round(time.monotonic() - began, 1)
        told = {"precision": precision, "seconds": seconds, "answers": answers(rows)}
        write_report(options.out / "gpu_check.json", device, **told, parts=rows)

    chosen = [part for part in parts(options) if any(word in part.name for word in options.only)]
    for part in chosen:
        if part.figures:
            part.figures.unlink(missing_ok=True)  # an earlier check's
    for stage in sorted({part.stage for part in chosen}):
        now = [part for part in chosen if part.stage == stage]
        left = end - time.monotonic()
        if left < 2 * GRACE:
            rows += [{"part": part.name, "verdict": "no time left", "seconds": 0.0} for part in now]
            continue
        with ThreadPoolExecutor(len(now)) as pool:
            running = {pool.submit(run_part, part, options.out, left): part for part in now}
            for ended in as_completed(running):
                rows.append(record(running[ended], options.out, *ended.result()))
                write_json()
    write_json()  # with the parts for which no time was left
    table = markdown(ANSWER_COLUMNS, answers(rows))
    with (options.out / "gpu_check.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n=== answers\n{table}\n")
    print(table)
    return int(any(row["verdict"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.gpu_check", main))
