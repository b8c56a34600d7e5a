"""Loading a trained network from its checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from released_networks import NETWORKS, checkpoint, shapes
from small_checkpoint import DEEPLAB, save_untrained

from argparser import Options, parse_options
from inference.load import _value, model_from_checkpoint, with_network_of
from methods.classifiers import ForegroundClassifier, UnknownClassifier
from modules import NetworkSpec
from runs.checkpoint import check_fits, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.option_types import count, path_option


def predicting(path: Path, *words: str) -> Options:
    return parse_options(["--predict", "x", "--ckpt", str(path), "--out", "y", *words])


def as_before(path: Path) -> None:
    """Give a checkpoint the names of weights and the manifest that earlier versions wrote."""
    content = load_checkpoint(path)
    state = {
        name.replace("cls.unknown.", "unknown."): value for name, value in content["model_state"].items()
    }
    manifest = content["manifest"]
    for name in ("classifier", "released_resnet"):
        manifest.pop(name)
    for name in (
        "classifier",
        "eval_images",
        "memory_choice",
        "memory_labels",
        "memory_batches",
        "warmup_form",
    ):
        manifest["options"].pop(name)
    save_checkpoint(path, {**content, "model_state": state})


@pytest.mark.parametrize("words", ["--dkd", "--star --fidelity released"])
def test_the_manifest_alone_says_how_sigmoids_decide(tmp_path: Path, words: str) -> None:
    path = tmp_path / "a_1.pth"
    model, _ = save_untrained(path, f"{DEEPLAB.replace('--pooling 4', '')} {words}")
    found = model_from_checkpoint(path, predicting(path)).model
    assert type(found.cls) is type(model.cls) and isinstance(found.cls, ForegroundClassifier)
    assert found.cls.released == ("released" in words)


@pytest.mark.parametrize("older", [False, True], ids=["today", "earlier version"])
@pytest.mark.parametrize("words", ["", "--unknown", "--unknown --fidelity released"])
def test_the_manifest_alone_names_the_classifier(tmp_path: Path, words: str, older: bool) -> None:
    path = tmp_path / "a_1.pth"
    model, _ = save_untrained(path, f"{DEEPLAB.replace('--pooling 4', '')} {words}")
    if older:
        as_before(path)
    found = model_from_checkpoint(path, predicting(path))
    assert isinstance(found.model.cls, UnknownClassifier) == bool(words)
    assert found.opts.classifier == found.model.cls.name
    state = found.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_typed_kind_must_be_the_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a_1.pth"
    save_untrained(path)
    with pytest.raises(UserError, match="it has --classifier linear, not unknown"):
        model_from_checkpoint(path, predicting(path, "--classifier", "unknown"))


def test_a_kind_of_a_method_file_names_the_option(tmp_path: Path) -> None:
    path = tmp_path / "a_1.pth"
    save_untrained(path)
    content = load_checkpoint(path)
    content["manifest"]["classifier"] = content["manifest"]["options"]["classifier"] = "mine"
    save_checkpoint(path, content)
    with pytest.raises(
        UserError, match=r"'mine' for --classifier: unknown, choose .*with --method_file"
    ) as told:
        model_from_checkpoint(path, predicting(path))
    assert "\n" not in str(told.value) and str(told.value).startswith(str(path))


def test_values_of_a_manifest_are_read_as_the_command_line_is(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    number = parser.add_argument("--number", type=count, default=None)
    folder = parser.add_argument("--folder", type=path_option, default=None)
    flag = parser.add_argument("--flag", action="store_true")
    path = tmp_path / "a.pth"
    assert _value(number, None, path) is None
    assert _value(number, 3, path) == 3
    assert _value(folder, "a/b", path) == Path("a/b")
    assert _value(flag, True, path) is True
    for action, value in ((number, "x"), (number, -1), (number, True), (flag, None), (flag, 1), (folder, 3)):
        with pytest.raises(UserError, match=f"its manifest has {value!r} for --{action.dest}"):
            _value(action, value, path)


def released(program: str, later: int = 0) -> dict[str, Any]:
    """Zeros of a program's shapes; ``later``: with the classifiers of so many steps of one class more."""
    state = {name: torch.zeros((), dtype=d).expand(s) for name, (s, d) in shapes(program).items()}
    if later:
        (prefix,) = {name.partition("cls.")[0] for name in state if "cls." in name}
        for step in range(1, 1 + later):
            state[f"{prefix}cls.{step}.weight"] = torch.zeros(1, 256, 1, 1)
            state[f"{prefix}cls.{step}.bias"] = torch.zeros(1)
    return checkpoint(program, state)


def completed(content: dict[str, Any], words: str, task: str = "15-5", *, trains: bool = False) -> Options:
    opts = parse_options(shlex.split(f"--task {task} --step 1 {words}"))
    return with_network_of(content, opts, Path("a.pth"), opts.task_, 1, trains=trains)


def fits(content: dict[str, Any], opts: Options) -> None:
    check_fits(content, path=Path("a.pth"), task=opts.task_, step=1, spec=NetworkSpec.of(opts))


@pytest.mark.parametrize("program", NETWORKS)
def test_a_released_checkpoint_shows_its_network(program: str) -> None:
    content = released(program)
    opts = completed(content, "--predict x --ckpt a.pth --out y")
    fits(content, opts)
    assert opts.notes[-1].startswith("options from a.pth: ")
    # A run that trains has the method's kind of classifier and fidelity.
    method = shlex.join(NETWORKS[program][0].split()[:2])
    fidelity = "--fidelity released" if "released" in NETWORKS[program][0] else ""
    fits(content, completed(content, f"{method} {fidelity} --step_ckpt a.pth", trains=True))
    assert completed(content, "", trains=True).fidelity == "paper"


def test_classifiers_of_later_steps_are_shown_by_their_number() -> None:
    for later, kind in ((1, "linear"), (5, "preallocated")):
        opts = completed(content := released("DFT", later), "--test --ckpt a.pth", "15-1")
        assert opts.classifier == kind
        fits(content, opts)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("PLOP", "--norm_act abn", "it has --norm_act iabn_sync, not abn"),
        (
            "SSUL",
            "--backbone resnet50 --head dkd",
            "--backbone resnet101, not resnet50; it has --head aspp, not dkd",
        ),
        ("SSUL", "--method DKD", "it has --head aspp, not dkd"),
        ("RCIL", "--model segformer_b2", "it has --model deeplab, not segformer_b2"),
    ],
)
def test_what_is_typed_must_be_the_released_checkpoints(program: str, words: str, message: str) -> None:
    content = released(program)
    with pytest.raises(UserError, match=message) as told:
        fits(content, completed(content, f"--test --ckpt a.pth {words}"))
    assert "\n" not in str(told.value)


def test_in_place_norms_are_those_of_the_package_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for found, words, norm in (
        (None, "", "iabn_sync_test"),
        (object(), "", "iabn_sync"),
        (object(), "--opt_level O3", "iabn_sync_test"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        assert completed(released("PLOP"), f"--method PLOP {words}", trains=True).norm_act == norm
