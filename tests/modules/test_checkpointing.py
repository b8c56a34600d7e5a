"""Gradient checkpointing: the same training with fewer activations kept."""

import copy

import pytest
import torch

from argparser import parse_options
from modules import NetworkSpec, build_network
from modules.checkpointing import run_stage
from segmentation_module import make_model
from utils.errors import UserError

NETWORKS = [
    {"model": "deeplab", "backbone": "resnet50", "norm_act": "std"},
    {"model": "deeplab", "backbone": "mobilenet_v2", "norm_act": "std"},
    {"model": "deeplab", "backbone": "mobilenet_v2", "norm_act": "iabn_sync_test"},
    {"model": "deeplab", "backbone": "mobilenet_v2", "norm_act": "std", "two_branches": True},
    {"model": "segformer_b0", "decoder": "segformer"},
]


def trained(choice, checkpointing, images):
    """Outputs, gradients, state, bytes kept for the backward pass, and random numbers drawn afterwards."""
    torch.manual_seed(0)
    network = build_network(NetworkSpec(**choice, checkpointing=checkpointing)).train()
    needs = network.intermediates
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t)
    with hooks:
        pre_logits, found = network(images, needs)
    maps = [
        value
        for name in sorted(needs)
        for value in (found[name] if isinstance(found[name], list) else [found[name]])
    ]
    (pre_logits.square().mean() + sum(value.square().mean() for value in maps)).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return (
        [pre_logits.detach(), *maps],
        gradients,
        copy.deepcopy(network.state_dict()),
        sum(kept),
        torch.rand(3),
    )


@pytest.mark.parametrize("choice", NETWORKS, ids=lambda choice: "-".join(map(str, choice.values())))
def test_values_gradients_statistics_and_random_numbers_are_the_same(choice):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps, gradients, state, kept, drawn = trained(choice, False, images)
    maps_again, gradients_again, state_again, kept_again, drawn_again = trained(choice, True, images)
    assert all(torch.equal(a, b) for a, b in zip(maps, maps_again, strict=True))
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name
    for name, value in state.items():
        assert torch.equal(state_again[name], value), name
    assert torch.equal(drawn, drawn_again)
    assert kept_again < 0.4 * kept


def test_statistics_move_once_and_the_layers_keep_their_buffers():
    stage = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    buffers = [stage[1].running_mean, stage[1].running_var, stage[1].num_batches_tracked]
    out = run_stage(stage, stage, torch.randn(2, 3, 5, 5), recompute=True)
    after_forward = [value.clone() for value in buffers]
    out.sum().backward()
    now = [stage[1].running_mean, stage[1].running_var, stage[1].num_batches_tracked]
    assert all(a is b for a, b in zip(now, buffers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(now, after_forward, strict=True))
    assert int(stage[1].num_batches_tracked) == 1


def test_a_frozen_norm_stays_in_evaluation():
    torch.manual_seed(0)
    stage = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    plain = torch.autograd.grad(stage(x).square().sum(), stage[0].weight)[0]
    again = torch.autograd.grad(run_stage(stage, stage, x, recompute=True).square().sum(), stage[0].weight)[0]
    assert torch.equal(plain, again)


def test_the_option_reaches_every_backbone():
    for words in (["--backbone", "resnet50"], ["--backbone", "mobilenet_v2"], ["--model", "segformer_b0"]):
        for flag in ([], ["--grad_checkpointing"]):
            model = make_model(NetworkSpec.of(parse_options([*words, *flag])), [16])
            assert model.network.body.checkpointing == bool(flag)


def test_what_it_does_not_go_with(monkeypatch):
    with pytest.raises(UserError, match="--compile and --grad_checkpointing exclude each other"):
        parse_options(["--compile", "--grad_checkpointing"])
    monkeypatch.setattr("modules.norm._in_place_layers", dict)
    with pytest.raises(UserError, match="--grad_checkpointing cannot be used with --norm_act iabn"):
        # The layers themselves need a package: the refusal comes before anything trains.
        monkeypatch.setattr("modules.ResNetBackbone", lambda *_, **__: None)
        build_network(NetworkSpec(backbone="resnet50", norm_act="iabn", checkpointing=True))
