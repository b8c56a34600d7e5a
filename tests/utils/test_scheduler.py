"""Learning-rate schedules against the released numbers and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.scheduler import make_scheduler

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def rates(scheduler_options, steps, lrs=(0.01,)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = make_scheduler(optimizer, **scheduler_options)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(seen)


@pytest.mark.parametrize("seed", [0, 1])
def test_golden_poly(seed):
    with np.load(GOLDEN / f"poly_lr-{seed}.npz", allow_pickle=False) as archive:
        meta, expected = json.loads(str(archive["meta"])), archive["lrs"]
    chosen = {"policy": "poly", "max_iters": meta["max_iters"], "lr_power": meta["power"]}
    found = rates(chosen, len(expected), (meta["lr"], meta["lr"] / 10))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], expected / 10, rtol=1e-6)


def test_step():
    found = rates({"policy": "step", "max_iters": 10, "lr_decay_step": 4, "lr_decay_factor": 0.1}, 10)[:, 0]
    np.testing.assert_allclose(found, [0.01] * 4 + [0.001] * 4 + [0.0001] * 2)


@pytest.mark.parametrize("policy", ["poly", "step"])
def test_warm_up(policy):
    options = {"policy": policy, "max_iters": 20, "lr_decay_step": 3}
    found = rates({**options, "warmup_iters": 4}, 20)[:, 0]
    np.testing.assert_allclose(found[:4], 0.01 * np.arange(1, 5) / 5)
    np.testing.assert_allclose(found[4:], rates({**options, "max_iters": 16}, 16)[:, 0], rtol=1e-6)


def test_state_resumes():
    parameter = torch.nn.Parameter(torch.zeros(1))

    def make():
        optimizer = torch.optim.SGD([parameter], lr=0.01)
        return optimizer, make_scheduler(optimizer, "poly", max_iters=20, warmup_iters=3)

    optimizer, scheduler = make()
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = make()
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(5):
        for pair in ((optimizer, scheduler), (resumed_optimizer, resumed)):
            pair[0].step()
            pair[1].step()
        assert optimizer.param_groups[0]["lr"] == resumed_optimizer.param_groups[0]["lr"]


def test_bad_options_are_user_errors():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    with pytest.raises(UserError, match="--lr_policy cosine"):
        make_scheduler(optimizer, "cosine", max_iters=10)
    with pytest.raises(UserError, match="warm-up"):
        make_scheduler(optimizer, "poly", max_iters=10, warmup_iters=10)
