"""Every benchmark, one after the other, on a quiet machine: the tables and pictures of docs/performance.md.

    python -m benchmarks.tables [--out DIR] [--threads N] [--repeats N] [--toy]

Each runs in a process of its own, prints its table, and writes DIR/<name>.json; the two methods with the
largest overhead are profiled, with pictures DIR/<method>-<model>.png. ``--toy`` runs the benchmarks of whole
steps in a minute, on sizes that say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from utils.command import run_command
from utils.option_types import path_option, positive_int


def run(module: str, *words: str) -> None:
    """Run a benchmark; ends with its exit status if it fails."""
    print(f"\n$ python -m benchmarks.{module} {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def slowest(report: Path, number: int) -> list[tuple[str, str]]:
    """Method and model of the rows with the largest overhead, each method once."""
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    found: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: -row["overhead"]):
        found.setdefault(row["method"], row["model"])
    return list(found.items())[:number]


def main(argv: list[str] | None = None) -> None:
    """Parse the options and run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=path_option, default=Path("/tmp/benchmarks"), help="folder of the results"
    )
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=positive_int, default=7)
    parser.add_argument("--toy", action="store_true", help="the smallest sizes, once")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    common = ["--threads", str(args.threads), "--repeats", "1" if args.toy else str(args.repeats)]
    toy = ["--batch", "2", "--crop", "128"] if args.toy else []
    steps = [*common, *toy]

    def out(name: str) -> list[str]:
        return ["--out", str(args.out / f"{name}.json")]

    if not args.toy:
        run("losses", *common, *out("losses"), "--device", "cuda" if cuda else "cpu")
        run("data", *out("data"))
    models = ["--models", "segformer_b0"] if args.toy else []
    run("step", *steps, *out("step"), "--methods", *(["MIB", "SDR"] if args.toy else ["all"]), *models)
    if cuda:
        run("step", "--peak", *steps, *out("peak"))
    run("scaling", *steps, *out("scaling"))
    for method, model in slowest(args.out / "step.json", 2):
        name = f"{method}-{model}"
        picture = ["--picture", str(args.out / f"{name}.png")]
        run("profile", "--method", method, "--model", model, *steps, *picture, *out(name))


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.tables", main))
