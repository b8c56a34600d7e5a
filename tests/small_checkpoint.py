"""Checkpoints of small networks with random weights, written by the function that training uses."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import nn

from argparser import Options, parse_options
from modules import NetworkSpec
from modules.norm import norm_layers
from runs.checkpoint import make_manifest, save_checkpoint
from segmentation_module import IncrementalSegmentationModule, make_model

DEEPLAB = "--dataset shapes --task 10-5-5 --class_order_seed 3 --step 1 --backbone mobilenet_v2 --pooling 4"
SEGFORMER = "--dataset shapes --task 10-5-5 --class_order_seed 3 --step 1 --model segformer_b0"


def save_untrained(
    path: Path, command: str = DEEPLAB, *, manifest: bool = True, **changes: Any
) -> tuple[IncrementalSegmentationModule, Options]:
    """Write a checkpoint of the command's step; ``changes`` replace entries of its manifest."""
    opts = parse_options(shlex.split(command))
    step, task = opts.steps[0], opts.task_
    torch.manual_seed(0)
    spec = NetworkSpec.of(opts)
    model = make_model(spec, task.classes_per_step(step))
    _spread(model)
    facts = make_manifest(task=task, step=step, spec=spec, options=opts.as_dict())
    content: dict[str, Any] = {"epoch": 0, "model_state": model.state_dict()}
    save_checkpoint(path, {**content, "manifest": {**facts, **changes}} if manifest else content)
    return model, opts


@torch.no_grad()
def _spread(model: IncrementalSegmentationModule) -> None:
    """Let several classes win somewhere: as they are drawn, all features are much alike."""
    for layer in norm_layers(model):
        layer.momentum = 1.0
    for head in model.cls.parts:
        if isinstance(head, nn.Conv2d):
            nn.init.normal_(head.weight)
    model.train()
    model(torch.randn(4, 3, 96, 96).cumsum(3) / 10)
    model.eval()
