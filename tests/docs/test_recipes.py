"""The commands of docs/recipes.md, parsed, agree with its table."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from small_checkpoint import DEEPLAB, save_untrained

import run
from argparser import parse_options
from inference import tsne
from scripts import experiment

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
_TRAINING, _REST = TEXT.split("## Predictions and features")
_PREDICTION, _REST = _REST.split("## Backbones of timm")
_TIMM, _RELEASED = _REST.split("## Checkpoints of the released programs")


def commands(text: str) -> list[str]:
    return [
        line
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]


COMMANDS = [command for command in commands(_TRAINING + _RELEASED) if " run.py " in command]


def test_all_commands_are_found() -> None:
    assert len(COMMANDS) == 13
    assert len(commands(_PREDICTION)) == 4


def test_the_experiment_of_a_table_is_planned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = set(commands(_TRAINING)) - set(COMMANDS)
    python, m, module, *words = shlex.split(command)
    assert (python, m, module) == ("python", "-m", "scripts.experiment")
    assert experiment.main([*words, "--dry-run"]) == 0
    assert "--nproc_per_node=4" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_command_follows_the_table(command: str) -> None:
    launcher, options = command.split(" run.py ")
    opts = parse_options(shlex.split(options))
    if opts.check_data:
        return
    processes = int(launcher.partition("--nproc_per_node=")[2] or 1)
    voc = opts.dataset == "voc"
    total, epochs, crop, first, later = 24, 30 if voc else 60, 512, 0.01, 0.001
    if opts.unknown:
        total, epochs, crop, later = 32, 100, 513, 0.05
    if opts.loss_de_prototypes:  # SDR
        total, first, later = 8, 0.001, 0.0001
    assert (processes * opts.batch_size, opts.epochs, opts.crop_size) == (total, epochs, crop)
    assert opts.lrs == [later if step else first for step in opts.steps]
    assert (opts.momentum, opts.weight_decay, opts.lr_policy, opts.lr_power) == (0.9, 1e-4, "poly", 0.9)
    assert opts.opt_level == ("O0" if opts.unknown or opts.loss_de_prototypes else "O1")


def test_backbones_of_timm() -> None:
    swin, vit = commands(_TIMM)
    launcher, options = swin.split(" run.py ")
    opts = parse_options(shlex.split(options))
    assert opts.batch_size * int(launcher.split("=")[1]) == 24
    assert (opts.backbone, opts.drop_path) == ("timm/swin_base_patch4_window12_384", 0.3)
    assert (opts.lrs, opts.loss_kd, opts.epochs, opts.warm_epochs) == ([0.02, *[0.001] * 5], 10, 30, 5)
    launcher, options = vit.split(" run.py ")
    opts = parse_options(shlex.split(options))
    assert opts.batch_size * int(launcher.split("=")[1]) == 16
    assert (opts.lrs, opts.epochs, opts.weight_decay) == ([0.001, *[0.0001] * 5], 32, 1e-5)
    assert "| VOC 16; 1e-3, 1e-4; 32. " in _TIMM


@pytest.mark.parametrize("command", commands(_PREDICTION))
def test_commands_on_a_checkpoint_need_nothing_of_its_run(
    command: str, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "logs" / "15-5-voc_MIB" / "15-5-voc_MIB_1.pth"
    save_untrained(path, f"{DEEPLAB} --data_root {shapes_root} --crop_size 64")
    (tmp_path / "photos").mkdir()
    for file in sorted((shapes_root / "JPEGImages").iterdir())[:4]:
        shutil.copy(file, tmp_path / "photos")
    (tmp_path / "data").symlink_to(shapes_root)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words[:2] == ["python", "run.py"]:
        assert run.main(words[2:]) == 0
        assert len(list(Path("results/predictions").iterdir())) == 4
    else:
        assert words[:3] == ["python", "-m", "inference.tsne"]
        assert tsne.main([*words[3:], "--images", "3"]) == 0
        written = Path("features.png") if "--out" in words else path.with_name("15-5-voc_MIB_1_tsne.png")
        assert written.is_file() and written.with_suffix(".csv").is_file()


def test_what_depends_on_the_data_set() -> None:
    ade = ["--dataset", "ade", "--task", "100-50"]
    assert parse_options([*ade, "--method", "SSUL-M"]).memory == 300
    assert parse_options([*ade, "--method", "PLOP"]).pod_factor == 1e-3
    assert parse_options(["--method", "MIB", "--task", "15-1"]).loss_kd == 100
