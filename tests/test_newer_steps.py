"""One batch through the whole method, from options to gradients, against the released programs' trainers.

The golden files hold what a network would compute: the features before the classifiers and the stages' maps
are leaves here, as they were there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import assert_close, cases, load
from torch import Tensor, nn

from argparser import parse_options
from methods import Context, build_methods
from modules.network import Network
from segmentation_module import IncrementalSegmentationModule
from session.optimizer import make_optimizer
from tasks import Task
from train import Trainer

RATE = 1e-3
WORDS = {
    "ewf_step_mib": ["--method", "MIB+EWF", "--task", "15-1"],
    "ewf_step_plop": ["--method", "PLOP+EWF", "--task", "15-1"],
    "lgkd_step_voc": ["--method", "LGKD", "--task", "15-5"],
    "lgkd_step_ade": ["--method", "LGKD", "--dataset", "ade", "--task", "100-50"],
}


class Held(Network):
    """Returns its parameters, whatever the images: features before the classifiers, and four stages' maps."""

    intermediates = frozenset({"pre_logits", "attentions"})

    def __init__(self, features: Tensor, maps: list[Tensor]) -> None:
        super().__init__()
        self.out_channels = features.shape[1]
        self.features = nn.Parameter(features)
        self.maps = nn.ParameterList(maps)

    def forward(self, images: Tensor, needs: frozenset[str] = frozenset()) -> tuple[Tensor, Any]:
        found = {"pre_logits": self.features, "attentions": [*self.maps, self.features]}
        return self.features, {name: found[name] for name in needs}


def network(z: dict[str, Tensor], suffix: str, classes: list[int]) -> IncrementalSegmentationModule:
    held = Held(z[f"features{suffix}"], [z[f"map{suffix}_{i}"] for i in range(4)])
    model = IncrementalSegmentationModule(held, classes)
    with torch.no_grad():
        for i, part in enumerate(model.cls.parts):
            part.weight.copy_(z[f"weight{suffix}_{i}"][:, :, None, None])  # type: ignore[operator, union-attr]
            part.bias.copy_(z[f"bias{suffix}_{i}"])  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("name", [name for kind in WORDS for name in cases(f"{kind}-*")])
def test_a_batch(name: str, either_device: torch.device) -> None:
    z, meta = load(name, either_device)
    old, new = meta["old_classes"], meta["new_classes"]
    opts = parse_options([*WORDS[name.rpartition("-")[0]], "--overlap", "--fidelity", "released"])
    published = {key: value for key, value in meta["options"].items() if value is not None}
    for key in ("weight_fusion", "lgkd", "loss_kd"):  # --ewf; --lgkd has no weight of its own
        published.pop(key, None)
    assert {key: getattr(opts, key) for key in published} == published
    assert opts.ewf == bool(meta["options"]["weight_fusion"])
    assert opts.lgkd == bool(meta["options"]["lgkd"])
    assert opts.lgkd or opts.loss_kd == meta["options"]["loss_kd"]

    task = Task("few", "voc", (tuple(range(old)), tuple(range(old, old + new))))
    model, teacher = (
        network(z, suffix, classes).to(either_device)
        for suffix, classes in (("", [old, new]), ("_old", [old]))
    )
    teacher.requires_grad_(False).eval()
    methods = build_methods(opts, 1)
    for net in (model, teacher):
        net.intermediates = frozenset().union(*(method.needs for method in methods.values()))
    if opts.fix_pre_cls:
        model.fix_older_classifiers()
    images, labels = torch.zeros(2, 3, *z["labels"].shape[-2:], device=either_device), z["labels"]
    context = Context(task, 1, model, teacher, device=either_device, fidelity="released")
    context.batches = lambda epoch=0: [(images, labels.long())]
    for method in methods.values():
        method.begin_step(context)
    if "PseudoLabels" in methods:  # of more images than this batch
        methods["PseudoLabels"].thresholds = z["thresholds"]  # type: ignore[attr-defined]

    optimizer = make_optimizer(opts, model, methods, RATE)
    terms = Trainer(context, methods, optimizer).train_step(images, labels)
    assert_close(terms["total"], z["loss"])
    if "part_pod" in z:
        assert_close(terms["pod"], z["part_pod"])
    if "part_distillation" in z:
        term = terms["lgkd"] if "lgkd" in terms else terms["unkd"] / meta["options"]["loss_kd"]
        assert_close(term, z["part_distillation"])
    held = model.network
    assert isinstance(held, Held)
    assert_close(held.features.grad, z["grad_features"])
    for i, maps in enumerate(held.maps):
        assert_close(torch.zeros_like(maps) if maps.grad is None else maps.grad, z[f"grad_map_{i}"])
    for i, part in enumerate(model.cls.parts):
        for key in ("weight", "bias"):
            gradient = getattr(part, key).grad
            if f"cls.{i}.{key}" in meta["trainable"]:
                assert_close(gradient.view_as(z[f"{key}_{i}"]), z[f"grad_{key}_{i}"])
            else:
                assert gradient is None
                assert torch.equal(getattr(part, key).view_as(z[f"{key}_{i}"]), z[f"{key}_{i}"])
