"""VOC's masks, read once for the tests that need their classes only."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset.image_labels import scan_image_labels

MASKS = Path(__file__).resolve().parents[3] / "shared" / "voc_masks"


@pytest.fixture(scope="session")
def voc_train_labels() -> list[frozenset[int]]:
    """Classes of each of the 10,582 training masks."""
    if not MASKS.is_dir():
        pytest.skip("the VOC masks in shared/voc_masks are not there")
    lines = (MASKS / "splits" / "train_aug.txt").read_text().splitlines()
    return scan_image_labels([MASKS / line.split()[1].lstrip("/") for line in lines], progress=False)
