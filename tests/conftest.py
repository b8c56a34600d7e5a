"""Fixtures that several test files share.

pytest-xdist's controller imports this file before its workers start; torch would hold all of them up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from utils.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

# How long an example takes says something about the machine only.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

keep_freed_memory()  # as every command does; otherwise each step's tensors are new pages
os.fsync = os.fstat  # as in forked.py

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


# Folders and files of tests that build networks in their own process, for which any random weights do.
BUILDING = {
    *("benchmarks", "cli", "methods", "modules", "runs", "session"),
    *("test_segmentation_module", "test_train"),
}
BLOCK = 65_537

# Folders whose tests take longest, which begin first, so that no worker ends long after the others.
LONGEST = ("faults", "cli", "scripts", "docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(autouse=True)
def float32_convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA networks compute convolutions in TF32, with 10 bits; the expected values have 23."""
    import torch

    if request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def quickly_drawn_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let large random weights repeat a block: to draw them in full takes half a minute of processor time.

    The block has a prime length, so that no two filters are equal.
    """
    import torch

    def in_blocks(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if tensor.numel() <= BLOCK:
                return draw(tensor, *args, **kwargs)
            block = draw(tensor.new_empty(BLOCK), *args, **kwargs)
            repeated = block.repeat(-(-tensor.numel() // BLOCK))[: tensor.numel()]
            with torch.no_grad():
                return tensor.copy_(repeated.view(tensor.shape))

        return drawn

    if BUILDING & {request.path.parent.name, request.path.stem}:
        for name in ("normal_", "uniform_"):
            monkeypatch.setattr(torch.Tensor, name, in_blocks(getattr(torch.Tensor, name)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def either_device(request: pytest.FixtureRequest) -> torch.device:
    import torch

    return torch.device(request.param)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated data set: 48 + 16 pictures of 64 pixels; give it as --data_root. Read only."""
    return _shapes(tmp_path_factory, 48, 16)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 + 8 pictures of 64 pixels: 7 batches in step 0 of 15-5, 3 in step 1. Read only."""
    return _shapes(tmp_path_factory, 32, 8)


def _shapes(tmp_path_factory: pytest.TempPathFactory, train: int, val: int) -> Path:
    from dataset.shapes import ShapesConfig, make_shapes

    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, ShapesConfig(train=train, val=val, size=64, seed=3), num_workers=1)
    return root


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stand-in of ``sys.executable`` that has imported everything, for programs that start Python."""
    import forked

    with forked.interpreter(tmp_path_factory.mktemp("bin")) as file:
        yield file


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pictures, masks and golden values beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the test material in {SHARED}")
    return SHARED
