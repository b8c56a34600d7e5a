"""Real runs of two steps on the device, with kill and resume, ``--test``, ``--compile`` and process groups.

    python -m benchmarks.real_runs --data_root DIR [--dataset voc] [--small] [--out FILE.json]

MIB runs twice with ``--deterministic``: once without interruption, once killed by SIGKILL in the middle of
step 1 and resumed. All tensors of the last checkpoints must be bit-identical, and ``--test`` must reproduce
the results of training; ``--predict`` and t-SNE must read the checkpoint. SDR, PLOP, SATS, DKD, EWC and
SSUL-M run two steps, FT with ``--compile``, MIB in two Gloo processes that share the device and in an NCCL
group of one (``benchmarks.one_gpu``), and on a GPU in float16. The cases run concurrently, and each outcome
is printed and written when it is there. Exit code 1 if one fails or differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import command_line, write_report
from runs.checkpoint import load_checkpoint
from runs.files import CHECKPOINT, PREDICTIONS, RESULTS, step_file
from utils.command import run_command
from utils.option_types import count, path_option, positive_int

ROOT = Path(__file__).resolve().parent.parent
TASK = "15-5"
KILL_AT = "step 1 epoch 1/"  # printed once training has started


class Failed(Exception):
    """A run ended with an exit code other than 0, or with wrong results."""


class Runs:
    """Commands of ``run.py`` with the same data and network."""

    def __init__(self, options: argparse.Namespace, logs: Path) -> None:
        self.logs = logs
        self.dataset = options.dataset
        crop, batch = (64, 4) if options.small else (192, 24)
        self.batch = batch
        self.words = [
            *("--dataset", options.dataset, "--data_root", str(options.data_root)),
            *("--task", TASK, "--overlap"),
            *("--logdir", str(logs), "--epochs", "1", "--crop_size", str(crop)),
            *("--step", "0", "1", "--lr", "0.01", "0.001", "--opt_level", "O1"),
            *("--num_workers", str(options.num_workers), "--ckpt_minutes", "0.01", "--print_interval", "1"),
        ]
        weights = ["--pretrained_path", str(options.weights)] if options.weights else ["--no_pretrained"]
        self.deeplab = ["--backbone", "mobilenet_v2", *weights]
        self.segformer = ["--model", "segformer_b0", "--no_pretrained"]

    def folder(self, name: str) -> Path:
        """Folder of a run."""
        return self.logs / f"{TASK}-{self.dataset}_{name}"

    def command(self, name: str, *words: str) -> list[str]:
        """The command line of a run in one process."""
        return [sys.executable, "run.py", *self.options(name, self.batch, *words)]

    def options(self, name: str, batch: int, *words: str) -> list[str]:
        """Options of ``run.py``."""
        return [*self.words, "--batch_size", str(batch), "--name", name, *words]

    def checkpoint(self, name: str) -> Path:
        """Checkpoint of step 1 of a run."""
        return step_file(self.folder(name), CHECKPOINT, 1)

    def execute(self, name: str, command: list[str]) -> None:
        """Run a command and wait for its end.

        Raises:
            Failed: the exit code is not 0.
        """
        log = self.logs / f"{name}.txt"
        with log.open("ab") as file:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        if code != 0:
            raise Failed(f"exit code {code}: {log.read_text(errors='replace')[-3000:]}")

    def complete(self, name: str, *words: str) -> dict[str, Any]:
        """Train a run to its end; returns the results of step 1.

        Raises:
            Failed: the exit code is not 0.
        """
        return self.ended(name, self.command(name, *words))

    def ended(self, name: str, command: list[str]) -> dict[str, Any]:
        """Run a command to its end; returns the run's results of step 1.

        Raises:
            Failed: the exit code is not 0.
        """
        self.execute(name, command)
        return dict(json.loads(step_file(self.folder(name), RESULTS, 1).read_text(encoding="utf-8")))

    def kill(self, name: str, *words: str) -> None:
        """Start a run and kill it in the middle of step 1, once that step has a checkpoint.

        Raises:
            Failed: it ended before it was killed.
        """
        log = self.logs / f"{name}.txt"
        checkpoint = self.checkpoint(name)
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(name, *words), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
            )
        while process.poll() is None:
            if checkpoint.is_file() and KILL_AT in log.read_text(errors="replace"):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return
            time.sleep(0.02)
        raise Failed(f"ended before it was killed: {log.read_text(errors='replace')[-3000:]}")

    # ── cases ────────────────────────────────────────────────────────────────────────────────────────

    def resumed(self) -> dict[str, Any]:
        """Compare a killed and resumed run with an uninterrupted one, and ``--test`` with training."""
        words = (*self.deeplab, "--method", "MIB", "--deterministic", "--sample_num", "2")
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(self.complete, "whole", *words)
            pool.submit(self.kill, "killed", *words).result()
            results = whole.result()
        resumed = self.complete("killed", *words)
        weights = [load_checkpoint(self.checkpoint(name))["model_state"] for name in ("whole", "killed")]
        differing = [k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])]
        if differing or resumed != results:
            raise Failed(f"the resumed run differs in {len(differing)} tensors: {differing[:5]}")
        ckpt = ("--ckpt", str(self.checkpoint("whole")))
        masks, picture = self.folder("whole") / "masks", step_file(self.folder("whole"), PREDICTIONS, 1)
        predict = [sys.executable, "run.py", "--predict", str(picture), *ckpt, "--out", str(masks)]
        tsne = [sys.executable, "-m", "inference.tsne", *ckpt, "--images", "8", "--per_class", "20"]
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(self.execute, "predict", predict), pool.submit(self.execute, "tsne", tsne)]
            tested = self.complete("whole", *words, "--test")
            for other in others:
                other.result()
        if tested["class_iou"] != results["class_iou"]:
            raise Failed("--test gives other numbers than the end of training")
        return results

    def method(self, name: str) -> Callable[[], dict[str, Any]]:
        """Two steps of a method, SATS on SegFormer, others on DeepLab."""
        network = self.segformer if name == "SATS" else self.deeplab
        memory = ("--memory", "20") if name == "SSUL-M" else ()
        return lambda: self.complete(name, *network, "--method", name, *memory)

    def compiled(self) -> dict[str, Any]:
        """Two steps through ``torch.compile``."""
        return self.complete("compiled", *self.deeplab, "--method", "FT", "--compile")

    def in_float16(self) -> dict[str, Any]:
        """Two steps with loss scaling, also on a GPU that has bfloat16."""
        return self.complete("float16", *self.deeplab, "--method", "MIB", "--half", "float16")

    def grouped(self, backend: str, processes: int) -> Callable[[], dict[str, Any]]:
        """Two steps of MIB in a process group on one device, with the same total batch.

        Its norm layers are not synchronised: processes that share a device would wait for each other a
        hundred times per batch.
        """
        name = f"{backend}-{processes}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}", "-m", "benchmarks.one_gpu", backend]
        words = self.options(name, self.batch // processes, *self.deeplab, "--method", "MIB")
        words += ["--norm_act", "abn"]
        return lambda: self.ended(name, [*launcher, *words])

    def cases(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All cases by name, those that take longest first."""
        methods = {name: self.method(name) for name in ("SDR", "PLOP", "SATS", "DKD", "EWC", "SSUL-M")}
        cases = {
            "MIB killed and resumed": self.resumed,
            "FT --compile": self.compiled,
            "MIB, two Gloo processes": self.grouped("gloo", 2),
            **methods,
        }
        if dist.is_nccl_available() and torch.cuda.is_available():
            cases["MIB, NCCL with one process"] = self.grouped("nccl", 1)
        if torch.cuda.is_available():
            cases["MIB in float16"] = self.in_float16
        return cases


def measure(case: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Run a case; returns outcome, seconds and mIoU."""
    began = time.monotonic()
    try:
        results = case()
        outcome: dict[str, Any] = {"ok": True, "miou": results["miou_all"]}
    except Failed as failure:
        outcome = {"ok": False, "reason": str(failure)}
    return {**outcome, "seconds": round(time.monotonic() - began, 1)}


def main(argv: list[str] | None = None) -> int:
    """Run the cases, print and write the outcomes; returns the exit code."""
    parser = command_line(__doc__)
    parser.add_argument("--data_root", type=path_option, required=True)
    parser.add_argument("--dataset", default="voc", choices=("voc", "shapes"))
    parser.add_argument("--weights", type=path_option, help="weights of MobileNetV2; default: random")
    parser.add_argument(
        "--logs", type=path_option, default=Path("build/real_runs"), help="folder of the runs"
    )
    parser.add_argument("--num_workers", type=count, default=1)
    parser.add_argument("--side_by_side", type=positive_int, default=10, help="concurrent cases")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--small", action="store_true", help="small crops and batches")
    options = parser.parse_args(argv)
    options.logs.mkdir(parents=True, exist_ok=True)
    cases = {
        k: v for k, v in Runs(options, options.logs).cases().items() if any(w in k for w in options.only)
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcomes: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(options.side_by_side) as pool:
        pending = {pool.submit(measure, case): name for name, case in cases.items()}
        for ended in as_completed(pending):
            name = pending[ended]
            outcomes[name] = ended.result()
            print(name, json.dumps(outcomes[name]), flush=True)
            write_report(options.out, device, cases=outcomes)
    return 0 if all(outcome["ok"] for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.real_runs", main))
