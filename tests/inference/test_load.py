"""Loading a trained network from its checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from small_checkpoint import DEEPLAB, save_untrained

from argparser import Options, parse_options
from inference.load import _value, model_from_checkpoint
from methods.classifiers import ForegroundClassifier, UnknownClassifier
from runs.checkpoint import load_checkpoint, save_checkpoint
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
