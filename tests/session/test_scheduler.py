"""Learning-rate schedules against the released numbers and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from session.optimizer import Schedule
from utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def rates(options, iterations, lrs=(0.01,)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = Schedule(**options).make(optimizer, iterations)
    seen = []
    for _ in range(iterations):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(seen)


@pytest.mark.parametrize("seed", [0, 1])
def test_golden_poly(seed):
    with np.load(GOLDEN / f"poly_lr-{seed}.npz", allow_pickle=False) as archive:
        meta, expected = json.loads(str(archive["meta"])), archive["lrs"]
    chosen = {"lr_policy": "poly", "lr_power": meta["power"]}
    found = rates(chosen, meta["max_iters"], (meta["lr"], meta["lr"] / 10))[: len(expected)]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], expected / 10, rtol=1e-6)


def test_step():
    found = rates({"lr_policy": "step", "lr_decay_step": 4, "lr_decay_factor": 0.1}, 10)[:, 0]
    np.testing.assert_allclose(found, [0.01] * 4 + [0.001] * 4 + [0.0001] * 2)


def test_golden_warm_up_times_poly():
    """A share of 0.2 of 59 iterations is 11.8 of them."""
    with np.load(GOLDEN / "dkd_warmup_poly-0.npz", allow_pickle=False) as archive:
        meta, expected = json.loads(str(archive["meta"])), archive["lr"]
    chosen = {"warmup": meta["warmup"], "warmup_form": "exact_factor"}
    found = rates(chosen, meta["iterations"], meta["base_lr"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["poly", "step"])
def test_warm_up(policy):
    options = {"lr_policy": policy, "lr_decay_step": 3}
    found = rates({**options, "warmup": 0.2}, 20)[:, 0]
    np.testing.assert_allclose(found[:4], 0.01 * np.arange(1, 5) / 5)
    np.testing.assert_allclose(found[4:], rates(options, 16)[:, 0], rtol=1e-6)


def ssul_rates(lr, iterations, warmup):
    """SSUL's released schedules, restated: poly with a floor, or a warm-up times poly without one."""
    for i in range(iterations):
        curve = lr * (1 - i / iterations) ** 0.9
        if warmup == 0:
            yield max(curve, 1e-6)
        else:
            line = 1.0 if i >= warmup else 0.001 * (1 - i / warmup) + i / warmup
            yield line * curve


@pytest.mark.parametrize("warmup", [0, 6])
def test_ssul_released(warmup):
    """Rates of the new head, the background's (1e-6, which never decays on VOC) and one below the floor."""
    lrs = (0.01, 0.01 * 1e-4, 1e-8)
    floor = {} if warmup else {"min_lr": 1e-6}
    options = {"warmup": warmup / 60, "warmup_form": "factor", **floor}
    found = rates(options, 60, lrs)
    for group, lr in enumerate(lrs):
        np.testing.assert_allclose(found[:, group], list(ssul_rates(lr, 60, warmup)), rtol=1e-12)


def test_floor_after_the_warm_up():
    """Beside the paper's warm-up the floor holds for the policy's part alone."""
    options = {"warmup": 0.2}
    plain, floored = rates(options, 20, (0.01,)), rates({**options, "min_lr": 2e-3}, 20, (0.01,))
    np.testing.assert_allclose(floored[:4], plain[:4])
    np.testing.assert_allclose(floored[4:], np.maximum(plain[4:], 2e-3))
    assert floored[-1, 0] == 2e-3 > plain[-1, 0]


@pytest.mark.parametrize("more", [{}, {"min_lr": 1e-3}, {"min_lr": 1e-6, "warmup_form": "factor"}])
def test_state_resumes(more):
    parameter = torch.nn.Parameter(torch.zeros(1))

    def make():
        optimizer = torch.optim.SGD([parameter], lr=0.01)
        return optimizer, Schedule(warmup=0.15, **more).make(optimizer, 20)

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


def test_a_warm_up_that_leaves_nothing_is_a_user_error():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    with pytest.raises(UserError, match="warm-up"):
        Schedule(warmup=1.0).make(optimizer, 10)
