"""VOC's masks, read once for the tests that need their classes only."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset.image_labels import scan_image_labels


@pytest.fixture(scope="session")
def voc_train_labels(shared: Path) -> list[frozenset[int]]:
    """Classes of each of the 10,582 training masks."""
    masks = shared / "voc_masks"
    lines = (masks / "splits" / "train_aug.txt").read_text().splitlines()
    return scan_image_labels([masks / line.split()[1].lstrip("/") for line in lines], progress=False)
