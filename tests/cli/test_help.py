"""``--help`` as a user reads it."""

from __future__ import annotations

import os
import subprocess
import sys

from command import ROOT

from argparser import build_parser


def test_help_fits_the_screen_and_shows_defaults() -> None:
    done = subprocess.run(
        [sys.executable, "run.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("usage: python run.py [options]")
    assert max(map(len, lines)) <= 100
    text = " ".join(done.stdout.split())
    for shown in (
        "--batch_size N images per process (default: 4)",
        "--lr LR [LR ...] one for all steps, or one per step (default: 0.007)",
        "--spp_scales N [N ...] grid sizes of local POD (default: 1 2 4)",
        "--data_root PATH folder of the data set (default: data)",
        "--overlap, --overlapped overlapped protocol (default: disjoint)",
        "--whole_val, --crop_val evaluate on whole images, one by one",
        "--mib_network, --net_pytorch the network of MiB and PLOP",
        "--no_tensorboard, --visualize write no TensorBoard file",
        "--unce unbiased cross entropy (MiB) --focal_loss",
    ):
        assert shown in text


def test_every_option_is_explained() -> None:
    silent = [action.option_strings for action in build_parser()._actions if not action.help]
    assert silent == []
