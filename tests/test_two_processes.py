"""Two processes with half a batch each take the step of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from methods import Context
from methods.classification import Classification
from modules import NetworkSpec
from segmentation_module import IncrementalSegmentationModule, make_model
from tasks import get_task
from train import Trainer


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, 20, (4, 64, 64), generator=generator, dtype=torch.uint8)
    # Void is not spread evenly: a mean over labelled pixels per process would differ from the joined one.
    targets[:1, :50] = 255
    return images, targets


def network(device: torch.device) -> IncrementalSegmentationModule:
    torch.manual_seed(0)
    model = make_model(NetworkSpec(backbone="mobilenet_v2", pooling=0), [20]).to(device)
    model.fix_bn()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(
    model: IncrementalSegmentationModule, forward: nn.Module, samples: list[tuple[Tensor, Tensor]]
) -> float:
    method = Classification("ce")
    device = next(model.parameters()).device
    context = Context(task=get_task("voc", "19-1"), step=0, model=model, device=device)
    method.begin_step(context)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=0.01, momentum=0.9, nesterov=True)
    trainer = Trainer(context, {"Classification": method}, optimizer, forward=forward)
    forward.train()
    return trainer.train_group(samples)["total"].item()


def process(rank: int, folder: str, accumulate: int, device: torch.device) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    images, targets = batch()
    model = network(device)
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    exchanged: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        exchanged.append(bucket.index())
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    forward.register_comm_hook(None, count)
    parts = zip(images[rank::2].chunk(accumulate), targets[rank::2].chunk(accumulate), strict=True)
    loss = step(model, forward, list(parts))
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": loss, "gradients": gradients, "exchanged": exchanged}, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_equal_those_of_the_joined_batch(
    tmp_path: Path, accumulate: int, either_device: torch.device
) -> None:
    """On CUDA both processes share the GPU, which Gloo allows and NCCL does not."""
    spawn(process, args=(str(tmp_path), accumulate, either_device), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    model = network(either_device)
    loss = step(model, model, [batch()])
    assert abs(loss - (halves[0]["loss"] + halves[1]["loss"]) / 2) < 1e-5 * loss
    for half in halves:
        assert len(half["exchanged"]) == len(set(half["exchanged"])), "they travel once per step"
    joined = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert joined.keys() == halves[0]["gradients"].keys()
    scale = max(float(gradient.abs().max()) for gradient in joined.values())
    for name, gradient in joined.items():
        for half in halves:
            torch.testing.assert_close(half["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * scale)
