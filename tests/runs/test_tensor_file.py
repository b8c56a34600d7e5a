"""Content of a checkpoint as a safetensors file."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs.checkpoint import load_checkpoint, save_checkpoint, write_manifest
from runs.tensor_file import read_content, to_bytes
from utils.errors import UserError


def content() -> dict[str, object]:
    weight = torch.arange(6.0).reshape(2, 3)
    return {
        "model_state": OrderedDict(
            {"network.body.a.weight": weight, "cls.0.bias": weight[0]}
        ),  # shared memory
        "method_state": {
            "A": {"counts": torch.tensor(3), 7: [1, (2.5, None)], "half": weight.t().bfloat16()},
            "B": {"tensor": "no tensor", "dict": {}, "empty": torch.zeros(0, 4)},
        },
        "epoch": 4,
        "ended": True,
    }


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple))
        same = type(one) is type(other) and len(one) == len(other)
        return same and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_bytes(content()))
    assert equal(read_content(path), {**content(), "model_state": dict(content()["model_state"])})  # type: ignore[call-overload]
    assert {"network.body.a.weight", "cls.0.bias"} < load_file(path).keys()  # plain names for other programs


def test_the_checkpoints_reader_checks_its_hash(tmp_path: Path) -> None:
    path, data = tmp_path / "a.safetensors", to_bytes({**content(), "save_id": "1"})
    path.write_bytes(data)
    assert load_checkpoint(path)["epoch"] == 4
    write_manifest(path, {"save_id": "1", "epoch": 4}, len(data), "0" * 64)
    with pytest.raises(
        UserError, match=r"a\.safetensors: damaged.*its sha256 is not the one in its manifest"
    ):
        load_checkpoint(path)
    path.write_bytes(data[:-40])
    with pytest.raises(UserError, match=r"a\.safetensors: damaged, truncated or not a checkpoint"):
        load_checkpoint(path)


def test_other_files_of_tensors(tmp_path: Path) -> None:
    """A state dict of somebody else is read as such; damaged metadata are refused."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert equal(load_checkpoint(path), {"w": torch.ones(2)})
    for wrong in ("[", json.dumps({"dict": [["a", {"tensor": "none"}]]}), json.dumps({"code": "x"})):
        save_file({"w": torch.ones(2)}, path, metadata={"continual_segmentation": wrong})
        with pytest.raises(UserError, match="its metadata are damaged"):
            load_checkpoint(path)


def test_saved_checkpoints_can_be_converted(tmp_path: Path) -> None:
    """Whatever a checkpoint may hold."""
    save_checkpoint(tmp_path / "a.pth", content())
    found = load_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes(to_bytes(found))
    assert equal(
        read_content(tmp_path / "a.safetensors"), {**found, "model_state": dict(found["model_state"])}
    )
