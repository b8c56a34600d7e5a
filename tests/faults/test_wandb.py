"""``--wandb``: what a run logs, over a stop and a second step; without login; when the service dies."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import BOUND, TINY, completed, running, start_command
from test_stops import children
from wandb_records import files, history, records

from session.wandb_mirror import WandbMirror, check_login
from utils.errors import UserError


def command(data: Path, logs: Path, *more: object) -> list[object]:
    options = (*TINY, "--ckpt_minutes", "0", "--data_root", data, "--logdir", logs, "--name", "run")
    return [*options, "--wandb", "board", "--epochs", "2", *more]


def kinds(path: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def test_one_run_over_a_stop_and_a_later_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "15-5-shapes_run"
    step_0 = command(tiny_data, tmp_path, "--step", "0", "--no_tensorboard")
    with running(step_0, tmp_path / "out") as run:
        run.wait_for("step 0 epoch 1/2: 2/")
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait(BOUND) == [75], run.output()
    completed(step_0, tmp_path / "out")
    assert not (run_dir / "step_0").exists()
    completed(command(tiny_data, tmp_path, "--step", "1", "--sample_num", "1", "--method", "MIB"), tmp_path)

    starts = files(run_dir)
    identity = (run_dir / "wandb_id").read_text().strip()
    runs = [kinds(path, "run")[0] for path in starts]
    assert [(each.run_id, each.project, each.display_name) for each in runs] == [
        (identity, "board", run_dir.name)
    ] * 3
    logged = [entry for path in starts for entry in history(path)]
    for step in (0, 1):
        lines = (run_dir / f"history_{step}.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if "losses" in entry]
        for name in entries[0]["losses"]:
            curve = [
                (e[f"step_{step}/step"], e[f"step_{step}/loss/{name}"])
                for e in logged
                if f"step_{step}/loss/{name}" in e
            ]
            assert curve == [(e["iteration"], e["losses"][name]) for e in entries]
        results = json.loads((run_dir / f"results_{step}.json").read_text())
        known = {name: iou for name, iou in results["class_iou"].items() if iou is not None}
        (task,) = [e for e in logged if e.get("task/step") == step and "task/miou/all" in e]
        assert {name: task[f"task/iou/{name}"] for name in known} == known
        assert [e[f"step_{step}/step"] for e in logged if f"step_{step}/miou/all" in e] == [1, 2]
        shown = [e for e in logged if e.get("task/step") == step and "task/confusion/_type" in e]
        assert [e["task/confusion/_type"] for e in shown] == ["image-file"]
    last = {tag: value for entry in logged for tag, value in entry.items()}
    assert (last["task/results/0/nrows"], last["task/results/0/ncols"]) == (21, 6)
    assert last["step_1/predictions/_type"] == last["task/predictions/_type"] == "image-file"
    for start, parts in zip(starts, ({"step_0"}, {"step_0", "task"}, {"step_1", "task"}), strict=True):
        axes = {metric.glob_name: metric.step_metric for metric in kinds(start, "metric")}
        assert axes == {f"{part}/*": f"{part}/step" for part in parts}
    (config,) = [
        {item.key: json.loads(item.value_json) for item in config.update}
        for config in kinds(starts[0], "config")
    ]
    assert config["method"] is None and config["epochs"] == 2

    # --fresh begins a new run there, too.
    done = completed([*step_0, "--fresh", "--epochs", "1"], tmp_path / "out")
    assert (run_dir / "wandb_id").read_text().strip() not in ("", identity)
    assert "Traceback" not in done.output()


def test_training_survives_the_end_of_wandbs_service(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with running(command(tiny_data, tmp_path, "--step", "0"), tmp_path / "out", 1, start_command) as run:
        run.wait_for("step 0 epoch 1/2: 1/")
        (service,) = [
            child
            for child in children(run.processes[0].pid)
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]
        ]
        os.kill(service, signal.SIGKILL)
        assert run.wait(BOUND) == [0], run.output()
    assert run.output().count("continuing without it") == 1
    assert "Traceback" not in run.output()
    assert (tmp_path / "15-5-shapes_run" / "results_0.json").is_file()


def test_an_image_that_wandb_cannot_write_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("WANDB_MODE", "offline")
    mirror = WandbMirror("board", tmp_path, anew=False)
    try:
        monkeypatch.setattr("wandb.Image", full)
        for tag in ("predictions", "confusion"):
            mirror.board("task").image(tag, np.zeros((4, 4, 3), np.uint8), 0)
    finally:
        mirror.close(failed=False)
    assert caplog.text.count("No space left on device); continuing without it") == 1


@pytest.mark.parametrize("key", [None, "short"])
def test_without_a_login_nothing_is_loaded_or_written(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    words = command(tiny_data, tmp_path / "logs", "--step", "0")
    with running(words, tmp_path / "out", 2) as run:
        assert run.wait(BOUND) == [2, 2]
    (line,) = (run.output() + run.output(1)).strip().splitlines()
    assert line.startswith("run.py: error: --wandb: ")
    assert line.endswith("use `wandb login`, or set WANDB_MODE=offline")
    assert not (tmp_path / "logs").exists()


def test_what_wandb_refuses_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match=r"^--wandb: Invalid project name 'a/b'.*; correct it$"):
        WandbMirror("a/b", tmp_path, anew=False)
    monkeypatch.setattr("wandb.__version__", "0.19.11")
    with pytest.raises(UserError, match=r"--wandb: wandb 0\.19\.11 is too old; pip install 'wandb>=0\.30'"):
        check_login()
