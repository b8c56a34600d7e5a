"""One process, two or three, with even and uneven shares of the images: the same digits."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from faults import SMALL_BACKBONE, TINY, completed
from forked import spawn
from torchvision.io import decode_image

from dataset.transforms import normalize
from modules import NetworkSpec
from runs.checkpoint import load_checkpoint, save_checkpoint
from segmentation_module import make_model
from utils import distributed
from utils.loss import Prototypes


def see_many_classes(state: dict[str, torch.Tensor], photos: Path) -> None:
    """Draw the classifier at random, centred: a network of one epoch sees background everywhere."""
    images = [decode_image(str(path)) for path in sorted(photos.iterdir())[:8]]
    model = make_model(NetworkSpec(backbone=SMALL_BACKBONE), [16]).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        pre_logits, _ = model.network(normalize(torch.stack(images)), frozenset())
    weight = torch.randn(16, pre_logits.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
    state["cls.0.weight"] = weight
    state["cls.0.bias"] = -weight[:, :, 0, 0] @ pre_logits.mean(dim=(0, 2, 3))


def test_evaluation(tiny_data: Path, tmp_path: Path) -> None:
    common = [*TINY, "--data_root", tiny_data, "--logdir", tmp_path, "--name", "run", "--step", "0"]
    completed([*common, "--epochs", "1"], tmp_path / "out")
    run_dir = tmp_path / "15-5-shapes_run"
    path = run_dir / "15-5-shapes_run_0.pth"
    content = load_checkpoint(path)
    see_many_classes(content["model_state"], tiny_data / "JPEGImages")
    save_checkpoint(path, content)
    found = []
    for processes in (1, 2, 3):  # 8 images in batches of 3: shares of 8; 5 and 3; 3, 3 and 2
        completed([*common, "--test", "--batch_size", "3"], tmp_path / "out", processes)
        found.append(json.loads((run_dir / "results_0.json").read_text(encoding="utf-8")))
    assert sum(iou > 0 for iou in found[0]["class_iou"].values() if iou is not None) > 1
    assert found[0] == found[1] == found[2]


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 7, 32, 9, 9, generator=generator) * 10
    labels = torch.randint(0, 6, (3, 7, 18, 18), generator=generator)
    labels[:, :2, :4] = 255
    return features, labels


def _prototypes(share: slice, reduce: bool) -> dict[str, torch.Tensor]:
    table = Prototypes(num_classes=6, feat_dim=32)
    for features, labels in zip(*_features(), strict=True):
        table.update(features[share], labels[share], reduce=distributed.all_reduce_sum if reduce else None)
    return dict(table.state_dict())


def _process(rank: int, size: int, port: int, folder: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    distributed.start("CPU")
    bounds = {2: [0, 3, 7], 3: [0, 1, 5, 7]}[size]
    torch.save(_prototypes(slice(bounds[rank], bounds[rank + 1]), reduce=True), f"{folder}/{rank}.pth")
    # An evaluation begins so: running statistics differ after training, the first process's count.
    norm = torch.nn.BatchNorm2d(2)
    norm(torch.full((2, 2, 1, 1), 10.0 * (rank + 1)))
    distributed.broadcast_buffers(norm)
    assert norm.running_mean is not None and norm.running_mean.tolist() == [1.0, 1.0]
    assert norm.num_batches_tracked == 1
    distributed.stop()


@pytest.mark.parametrize("size", [2, 3])
def test_prototypes_and_running_statistics(size: int, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    spawn(_process, args=(size, port, str(tmp_path)), nprocs=size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = _prototypes(slice(None), reduce=False)
    torch.set_num_threads(threads)
    for rank in range(size):
        shared = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(shared[name], value), name
