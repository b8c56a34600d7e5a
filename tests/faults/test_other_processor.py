"""A step that goes on at a machine whose processor computes bfloat16, or does not."""

from __future__ import annotations

import json
import platform
import signal
from pathlib import Path

import pytest
import torch
from faults import TINY, running

from runs.checkpoint import load_checkpoint
from train import Precision


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an instruction set of x86")
@pytest.mark.parametrize(("level", "others"), [("O1", [True, False]), ("O3", [True, False, True])])
def test_a_step_goes_on_at_the_other_kind_of_machine(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, others: list[bool]
) -> None:
    command = [
        *(*TINY, "--data_root", tiny_data, "--logdir", tmp_path, "--name", "run", "--method", "RW"),
        *("--reg_iterations", "2", "--epochs", len(others), "--step", "0", "--opt_level", level),
    ]
    folder = tmp_path / "15-5-shapes_run"
    here = Precision(level, torch.device("cpu")).description
    for epoch, other in enumerate(others, 1):
        if other:  # what oneDNN takes this machine for, and PyTorch with it
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        else:
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
        with running(command, tmp_path / "out") as run:
            if epoch < len(others):
                run.wait_for(f"step 0 epoch {epoch}/{len(others)}: [12]/")
                run.processes[0].send_signal(signal.SIGTERM)
            assert run.wait() == [75 if epoch < len(others) else 0], run.output()
        told = [line for line in run.output().splitlines() if "float32: this CPU" in line]
        assert len(told) == (other or here == "float32")
        assert all(f"--opt_level {level} is computed in float32" in line for line in told)
        content = load_checkpoint(folder / "15-5-shapes_run_0.pth")
        precision = content["manifest"]["precision"]
        assert precision == ("float32" if other else here)
        weights = {value.dtype for name, value in content["model_state"].items() if name.endswith("weight")}
        assert weights == {torch.bfloat16 if "weights" in precision else torch.float32}
        assert content["manifest"]["options"]["opt_level"] == level
        if epoch > 1:
            assert "step 0 resumes at epoch" in run.output()
    assert json.loads((folder / "results_0.json").read_text())["step"] == 0
