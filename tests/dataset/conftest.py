"""VOC's masks, read once for the tests that need their classes only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataset.image_labels import scan_image_labels


@pytest.fixture(scope="session")
def voc_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the first test process to read VOC's masks caches their classes for all."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def voc_train_labels(shared: Path, voc_cache: Path) -> list[frozenset[int]]:
    """Classes of each of the 10,582 training masks."""
    masks = shared / "voc_masks"
    lines = (masks / "splits" / "train_aug.txt").read_text().splitlines()
    paths = [masks / line.split()[1].lstrip("/") for line in lines]
    return scan_image_labels(paths, cache_dir=voc_cache, progress=False)
