"""What ``--fidelity released`` changes around the losses, in a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from command import MOBILENET, Launch

from dataset import open_dataset
from dataset.image_labels import scan_image_labels
from tasks import get_task


def test_norms_void_and_tested_images(cli: Launch, tiny_data: Path, tmp_path: Path) -> None:
    outcome = cli(
        *(*MOBILENET, "--task", "5-5", "--step", "0", "--lr", "0.01", "--method", "LWF", "--no_mask"),
        *("--fidelity", "released", "--fix_bn", "--logdir", tmp_path, "--name", "run"),
    )
    assert outcome.code == 0, outcome.err[-3000:]
    assert "void_label=ignore (preset)" in outcome.err + outcome.out

    seen = set(get_task("shapes", "5-5").seen_classes(0))
    masks = open_dataset("shapes", tiny_data, "val").masks
    shown = sum(bool(seen & ids) for ids in scan_image_labels(masks, progress=False))
    assert 0 < shown < len(masks)
    results = json.loads((tmp_path / "5-5-shapes_run" / "results_0.json").read_text(encoding="utf-8"))
    assert results["evaluation"] == {"fidelity": "released"}  # other images than without
    tested = re.findall(r"(\d+) for the final evaluation", outcome.err + outcome.out)
    assert tested == [str(shown)]

    state = torch.load(tmp_path / "5-5-shapes_run" / "5-5-shapes_run_0.pth", weights_only=True)["model_state"]
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    assert norms
    for norm in norms:
        assert (state[f"{norm}weight"] == 1).all() and (state[f"{norm}bias"] == 0).all(), norm
        assert state[f"{norm}running_mean"].any(), norm
