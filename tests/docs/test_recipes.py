"""The commands of docs/recipes.md are what its table says, by the real parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from argparser import parse_options

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


def test_all_commands_are_found() -> None:
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command_follows_the_table(command: str) -> None:
    launcher, options = command.split(" run.py ")
    opts = parse_options(shlex.split(options))
    assert opts.dataset == "ade"
    if opts.check_data:
        return
    processes = int(launcher.split("=")[1])
    first_lr = {0: 0.01, 1: 0.05 if opts.unknown else 0.001}
    total, epochs, crop = (32, 100, 513) if opts.unknown else (24, 60, 512)
    assert (processes * opts.batch_size, opts.epochs, opts.crop_size) == (total, epochs, crop)
    assert opts.lrs == [first_lr[min(step, 1)] for step in opts.steps]
    assert (opts.momentum, opts.weight_decay, opts.lr_policy, opts.lr_power) == (0.9, 1e-4, "poly", 0.9)
    assert opts.opt_level == ("O0" if opts.unknown else "O1")


def test_what_depends_on_the_data_set() -> None:
    ade = ["--dataset", "ade", "--task", "100-50"]
    assert parse_options([*ade, "--method", "SSUL-M"]).memory == 300
    assert parse_options([*ade, "--method", "PLOP"]).pod_factor == 1e-3
    assert parse_options(["--method", "MIB", "--task", "15-1"]).loss_kd == 100
