"""Every method through the real command: three steps, state carried through checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import MOBILENET, SEGFORMER, SMALL, launch

MLP = ("--model", "mlp", *SMALL)
RELEASED = ("--fidelity", "released")
# (method, network, further options, processes): each network, precision, protocol and number of processes
# meets many methods; those of tests/faults/test_examples.py run there with another number of processes.
RUNS = [
    ("FT", SMALL, ["--opt_level", "O1"], 1),
    ("FT", SEGFORMER, ["--opt_level", "O3"], 2),
    ("LWF", SMALL, ["--opt_level", "O1"], 2),
    ("LWF-MC", SMALL, [], 1),
    ("LWF-MC", MLP, ["--icarl_disjoint", "--opt_level", "O1"], 1),
    ("ILT", SMALL, ["--opt_level", "O2"], 1),
    ("ILT", MLP, ["--loss_de_maskedold", "--loss_de_cosine"], 2),
    ("EWC", ("--model", "mlp", *MOBILENET), ["--crop_size", "32"], 2),
    ("RW", SMALL, ["--opt_level", "O1", "--reg_iterations", "2"], 1),
    ("PI", MLP, [], 1),
    ("MIB", SEGFORMER, ["--opt_level", "O1", "--memory", "6"], 2),
    ("CIL", SMALL, ["--opt_level", "O1"], 1),
    ("SDR", MOBILENET, ["--crop_size", "32", "--loss_SNNL", "1e-3"], 2),
    ("SDR", SMALL, ["--opt_level", "O1", *RELEASED], 1),
    ("PLOP", SMALL, ["--opt_level", "O1"], 1),
    ("PLOP", SEGFORMER, ["--spp_scales", "1", "2", *RELEASED], 2),
    ("SSUL", SMALL, [], 2),
    ("SSUL-M", SMALL, ["--opt_level", "O1", "--memory", "6"], 1),
    ("RCIL", MOBILENET, ["--crop_size", "32", "--norm_act", "abn", "--opt_level", "O1", *RELEASED], 2),
    ("DFT", MLP, ["--opt_level", "O1"], 2),
    ("SATS", SEGFORMER, [], 2),
    ("SATS-M", SEGFORMER, ["--opt_level", "O1", "--memory", "6"], 1),
    ("SATS", SMALL, ["--distill_object", "sats-feature-CNN"], 1),
    ("SATS", SEGFORMER, ["--distill_object", "sats-selfattn-GP", *RELEASED], 1),
    ("LGKD", SMALL, [*RELEASED], 1),
    ("DKD", MLP, ["--lr", "0.001", "--opt_level", "O1"], 2),
    ("DKD-M", SMALL, ["--lr", "0.001", "--memory", "6"], 1),
    ("STAR", SMALL, [*RELEASED], 1),
    ("STAR-M", MLP, ["--memory", "6"], 2),
    ("MIB+EWF", SMALL, ["--opt_level", "O1"], 1),
    ("PLOP+EWF", MLP, [], 2),
    ("MIB+NeST", SMALL, ["--warm_epochs", "2", "--opt_level", "O3"], 1),
    ("PLOP+NeST", SMALL, ["--warm_epochs", "2", "--opt_level", "O1"], 2),
]


@pytest.mark.parametrize(("method", "network", "options", "processes"), RUNS)
def test_three_steps(
    tiny_data: Path, tmp_path: Path, method: str, network: tuple[str, ...], options: list[str], processes: int
) -> None:
    outcome = launch(
        *("--dataset", "shapes", "--data_root", tiny_data, *network),
        *("--task", "10-5-5", "--overlap", "--step", "all", "--lr", "0.01"),
        *("--logdir", tmp_path, "--name", "run", "--method", method, *options),
        processes=processes,
    )
    assert outcome.code == 0, outcome.err[-3000:]
    run_dir = tmp_path / "10-5-5-shapes_run"
    for step in range(3):
        results = json.loads((run_dir / f"results_{step}.json").read_text(encoding="utf-8"))
        assert 0 <= results["miou_all"] <= 1
    content = torch.load(run_dir / "10-5-5-shapes_run_2.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in content["model_state"].values())
