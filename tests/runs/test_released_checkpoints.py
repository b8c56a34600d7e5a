"""Checkpoints of the released programs: every weight finds its place, and a wrong option is named."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from released_networks import NETWORKS, checkpoint, programs, shapes

from argparser import parse_options
from modules import NetworkSpec
from modules.norm import norm_layers
from runs.checkpoint import check_fits, model_state
from runs.released import network_of, our_names
from segmentation_module import IncrementalSegmentationModule, load_state, make_model
from tasks import get_task
from utils.errors import UserError


def content(program: str) -> dict[str, Any]:
    """Zeros that take no memory, of the shapes of a program's checkpoint."""
    return checkpoint(
        program, {name: torch.zeros((), dtype=d).expand(s) for name, (s, d) in shapes(program).items()}
    )


def spec_of(words: str) -> NetworkSpec:
    return NetworkSpec.of(parse_options(shlex.split(f"--task 15-5 {words}")))


def check(program: str, words: str, *, task: str = "15-5", step: int = 1) -> None:
    task_ = get_task("voc", task)
    check_fits(content(program), path=Path("a.pth"), task=task_, step=step, spec=spec_of(words))


def network(spec: NetworkSpec, classes: Sequence[int] = (16, 5)) -> IncrementalSegmentationModule:
    with torch.device("meta"):
        return make_model(spec, classes)


def test_every_program_has_a_network_here() -> None:
    assert set(NETWORKS) == set(programs())


@pytest.mark.parametrize("program", NETWORKS)
def test_every_weight_has_its_place(program: str) -> None:
    words = NETWORKS[program][0]
    check(program, words)
    model = network(spec_of(words))
    norms = {id(layer) for layer in norm_layers(model)}
    counters = {f"{name}.num_batches_tracked" for name, part in model.named_modules() if id(part) in norms}
    found = {name: tensor.shape for name, tensor in model_state(content(program)).items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert found.keys() <= wanted.keys() and wanted.keys() - found.keys() <= counters
    assert found == {name: wanted[name] for name in found}


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("PLOP", "", "it has --norm_act iabn_sync, not std"),
        ("PLOP", "--norm_act abn", "it has --norm_act iabn_sync, not abn"),
        ("PLOP", "--norm_act iabn --backbone resnet50", "it has --backbone resnet101, not resnet50"),
        ("PLOP", "--model segformer_b2", "it has --model deeplab, not segformer_b2"),
        ("PLOP", "--norm_act iabn --head aspp", "it has --head mib, not aspp"),
        ("SDR_net_pytorch", "--method SDR", "it has the network of --fidelity released, not paper"),
        ("SATS", "", "it has --model segformer_b2, not deeplab"),
        ("SATS", "--model segformer_b3", "it has --model segformer_b2, not segformer_b3"),
        ("SATS", "--model segformer_b2 --decoder segformer", "it has --decoder sats, not segformer"),
        ("SSUL", "--method SSUL", "it has --head aspp, not mib"),
        (
            "SSUL",
            "--head aspp",
            r"1 \+ 15 \+ 5 classes, step 1 has 16 \+ 5 .as many with --classifier unknown",
        ),
    ],
)
def test_a_wrong_or_missing_option_is_named(program: str, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(program, words)
    assert "\n" not in str(caught.value)


# DFT* has the classifiers of all steps from the first on.
@pytest.mark.parametrize("program", sorted(NETWORKS.keys() - {"DFT"}))
def test_another_step_or_task_is_refused(program: str) -> None:
    words = NETWORKS[program][0]
    with pytest.raises(UserError, match="classes, step 0 has"):
        check(program, words, step=0)
    with pytest.raises(UserError, match="classes, step 1 has"):
        check(program, words, task="15-1")


# The networks have shapes only: names and sizes are what is compared.
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_the_first_branches_have_biases_after_step_0_only() -> None:
    """RCIL's run.py adds them when it merges the branches."""
    name = re.compile(r"cls\.1\.|conv2\.bias|map_convs\.\d\.bias")
    whole = content("RCIL")
    whole["model_state"] = {k: tensor for k, tensor in whole["model_state"].items() if not name.search(k)}
    spec, task = spec_of(NETWORKS["RCIL"][0]), get_task("voc", "15-5")
    check_fits(whole, path=Path("a.pth"), task=task, step=0, spec=spec)
    first, later = network(spec, [16]), network(spec, [16, 5])
    assert model_state(whole).keys() == {
        k for k in first.state_dict() if not k.endswith("num_batches_tracked")
    }
    later.load_previous(model_state(whole))


@pytest.mark.parametrize("program", NETWORKS)
def test_the_documented_options_are_the_tested_ones(program: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"`{NETWORKS[program][0].replace('iabn_sync_test', 'iabn_sync')}`" in text


@pytest.mark.parametrize("program", ["PLOP", "SATS"])
def test_a_missing_or_strange_weight_is_refused(program: str) -> None:
    model = network(spec_of(NETWORKS[program][0]))
    state = model_state(content(program))
    name = next(iter(state))
    for changed in (
        {k: t for k, t in state.items() if k != name},
        {**state, "network.body.more": state[name]},
    ):
        with pytest.raises(UserError, match=r"the checkpoint (lacks|has unknown) 1 weights"):
            load_state(model, changed)


def test_swin_of_nest() -> None:
    """Its names, from which its program differs: patch merging ends a stage, and an index is saved."""
    model = make_model(NetworkSpec(backbone="timm/swin_tiny_patch4_window7_224", norm_act="abn"), [16, 5])
    state = model.state_dict()

    def theirs(name: str) -> str:
        name = name.removeprefix("network.").replace("body.model.", "body.")
        return re.sub(r"layers\.(\d)\.downsample", lambda f: f"layers.{int(f[1]) - 1}.downsample", name)

    released = {theirs(name): tensor for name, tensor in state.items()}
    assert "body.layers.2.downsample.reduction.weight" in released and "body.norm3.weight" in released
    released["body.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    found = our_names(released)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert network_of(released) == {"model": "deeplab", "norm_act": "iabn_sync", "head": "mib"}


def test_swin_b_is_shown_by_its_blocks() -> None:
    released = {
        f"body.layers.{stage}.blocks.{block}.attn.qkv.weight": torch.empty(0)
        for stage, blocks in enumerate((2, 2, 18, 2))
        for block in range(blocks)
    }
    for width, shown in ((128, "timm/swin_base_patch4_window12_384"), (96, None)):
        released["body.patch_embed.proj.weight"] = torch.empty(width, 3, 4, 4)
        assert network_of(released).get("backbone") == shown
