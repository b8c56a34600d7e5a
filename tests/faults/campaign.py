"""Kills runs at random moments and damages files at random places; slow, so no part of the test suite.

    python tests/faults/campaign.py --kills 30 --fuzz 2000 [--seed 0] [--folder /tmp/campaign]

Kills: runs of FT, MIB, SDR, RW, PLOP and SSUL-M on one process and on two, killed (-9) at a random moment of
a kind: at the start, in a batch, in a save, in an evaluation, between steps. Every checkpoint on disk must
be whole, and the same command again must end with what the unbroken run ends with, bit for bit: weights,
optimiser, methods' states, random generators, best score, results.

Fuzz: see ``fuzz.py``. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "faults")]

import faults  # noqa: E402
import fuzz  # noqa: E402

from dataset.shapes import ShapesConfig, make_shapes  # noqa: E402
from runs.checkpoint import load_checkpoint  # noqa: E402
from utils.option_types import count, seed  # noqa: E402

METHODS = {
    "FT": [],
    "MIB": [],
    "SDR": [],
    "RW": ["--reg_iterations", "2"],
    "PLOP": [],
    "SSUL-M": ["--memory", "6"],
}
MOMENTS = ("start", "batch", "save", "evaluation", "between steps")


def arguments(method: str, data: Path, logs: Path, name: str) -> list[object]:
    return [
        *(*faults.TINY, "--data_root", data, "--epochs", "2", "--step", "0", "1", "--method", method),
        *("--logdir", logs, "--name", name, *METHODS[method]),
    ]


def wait_for_moment(run: faults.Run, moment: str, run_dir: Path, draw: random.Random) -> None:
    """Return at a random moment of the kind (or when the run has ended before)."""
    step, epoch = draw.randrange(2), 1 + draw.randrange(2)
    if moment == "start":
        time.sleep(draw.uniform(0, 2.5))
    elif moment == "batch":
        run.wait_for(rf"step {step} epoch {epoch}/2: {draw.randint(1, 3)}/")
        time.sleep(draw.uniform(0, 0.5))
    elif moment == "save":
        run.wait_for(rf"step {step} epoch {epoch}/2: 1/")
        run.wait_until(lambda: faults.saves_now(run_dir))
        time.sleep(draw.uniform(0, 0.1))
    elif moment == "evaluation":
        run.wait_for(rf"step {step} epoch {epoch}/2: .*images/s\)")
        time.sleep(draw.uniform(0, 0.5))
    else:
        run.wait_for("results: ")
        time.sleep(draw.uniform(0, 1.5))


def kill_and_resume(
    command: list[object], folder: Path, run_dir: Path, size: int, moment: str, draw: random.Random
) -> tuple[str, float]:
    """Kill a run at a moment, then run it to its end; the victims and how long the others took to end."""
    with faults.running(command, folder, size) as run:
        wait_for_moment(run, moment, run_dir, draw)
        victims = [draw.randrange(size)] if draw.random() < 0.5 else list(range(size))
        run.kill(victims)
        began = time.monotonic()
        run.wait(faults.BOUND)
        ended = time.monotonic() - began
    for path in run_dir.glob("*.pth"):
        load_checkpoint(path)  # whole, or an error ends the campaign
    faults.completed(command, folder, size)
    return "+".join(map(str, victims)), ended


def kills(number: int, seed: int, folder: Path) -> int:
    """Number of resumed runs that differ from the unbroken one."""
    draw = random.Random(seed)
    data, logs = folder / "shapes", folder / "logs"
    make_shapes(data, ShapesConfig(train=32, val=8, size=64, seed=3), num_workers=1)
    cases = [(method, size) for method in METHODS for size in (1, 2)]
    whole: dict[tuple[str, int], dict[str, object]] = {}
    bad = 0
    for index in range(number):
        method, size = case = cases[index % len(cases)]
        if case not in whole:
            name = f"{method}-{size}-whole"
            faults.completed(arguments(method, data, logs, name), folder / name, size)
            whole[case] = faults.left_by(logs / f"15-5-shapes_{name}")
        name = f"{method}-{size}-{index}"
        moment = MOMENTS[(index + index // len(MOMENTS)) % len(MOMENTS)]
        run_dir = logs / f"15-5-shapes_{name}"
        victims, ended = kill_and_resume(
            arguments(method, data, logs, name), folder / name, run_dir, size, moment, draw
        )
        differing = faults.differences(whole[case], faults.left_by(run_dir))
        bad += bool(differing)
        verdict = f"DIFFERS at {differing[:3]} ({len(differing)} places)" if differing else "same bits"
        line = f"kill {index + 1}/{number}: {method}, {size} process(es), {moment}, rank {victims}"
        print(f"{line}, all ended after {ended:.1f} s: {verdict}", flush=True)
        for path in run_dir.glob("*.pth"):
            path.unlink()
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=count, default=30)
    parser.add_argument("--fuzz", type=count, default=2000)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    bad = kills(options.kills, options.seed, folder) if options.kills else 0
    print(f"{options.kills} kills, {bad} resumed runs differ", flush=True)
    failures, counts = fuzz.run_cases(options.fuzz, options.seed, folder / "fuzz")
    print(f"{options.fuzz} damaged files: {counts}; {len(failures)} failures", flush=True)
    for failure in failures:
        print(failure)
    return int(bool(bad or failures))


if __name__ == "__main__":
    sys.exit(main())
