"""What is reported while a step trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from argparser import parse_options
from dataset.loaders import Tolerance
from runs.folder import RunFolder
from session.monitor import Monitor
from session.run import Run
from train import NonFiniteLoss
from utils.distributed import World
from utils.signals import StopRequest


def monitor(folder: Path, *, interval: int, batches: int) -> Monitor:
    words = ["--logdir", str(folder), "--print_interval", str(interval), "--no_tensorboard"]
    opts, world = parse_options(words), World(0, 0, 1, torch.device("cpu"), None)
    run = Run(opts, world, RunFolder(opts, world), StopRequest(), Tolerance())
    return Monitor(run, 0, batches_per_epoch=batches, iteration=None)


def reported(made: Monitor) -> list[tuple[int, float]]:
    lines = (made.history._path).read_text(encoding="utf-8").splitlines()
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [(entry["iteration"], entry["losses"]["ce"]) for entry in entries if "losses" in entry]


def train(made: Monitor, values: list[float], accumulate: int = 1, epoch: int = 0) -> None:
    """Report an epoch whose batches have these losses."""
    made.begin_epoch(epoch, 0)
    for first in range(0, len(values), accumulate):
        group = values[first : first + accumulate]
        made.add({"ce": torch.tensor(sum(group) / len(group))}, len(group), lr=0.1)
    made.end_epoch()


@pytest.mark.parametrize(
    ("accumulate", "number", "expected"),
    [(1, 5, [(2, 0.5), (4, 2.5)]), (3, 7, [(3, 1.0), (6, 4.0)])],
)
def test_reports_are_means_since_the_last_one_at_the_end_of_an_optimiser_step(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    accumulate: int,
    number: int,
    expected: list[tuple[int, float]],
) -> None:
    made = monitor(tmp_path, interval=2, batches=number)
    with caplog.at_level("INFO"):
        train(made, list(range(number)), accumulate)
    assert reported(made) == expected
    # The epoch's mean counts every batch alike, also in a last group that is smaller.
    assert f"step 0 epoch 1/30: ce {(number - 1) / 2:g} (" in caplog.text


def test_a_short_epoch_is_reported_at_its_end(tmp_path: Path) -> None:
    made = monitor(tmp_path, interval=10, batches=3)
    train(made, [1.0, 2.0, 6.0])
    train(made, [1.0, 1.0, 1.0], epoch=1)
    assert reported(made) == [(3, 3.0), (6, 1.0)]


def test_a_loss_that_is_not_finite_stops_at_the_next_report_not_at_the_end_of_the_epoch(
    tmp_path: Path,
) -> None:
    made = monitor(tmp_path, interval=2, batches=8)
    made.begin_epoch(0, 0)
    for value in (0.5, 0.5, math.nan):
        made.add({"ce": torch.tensor(value)}, 1, lr=0.1)
    with pytest.raises(NonFiniteLoss, match="ce nan"):
        made.add({"ce": torch.tensor(0.5)}, 1, lr=0.1)
    short = monitor(tmp_path / "short", interval=10, batches=3)
    with pytest.raises(NonFiniteLoss, match="ce nan"):
        train(short, [0.5, 0.5, math.nan])
