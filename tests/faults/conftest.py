from __future__ import annotations

from pathlib import Path

import pytest

from dataset.shapes import ShapesConfig, make_shapes


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 + 8 pictures of 64 pixels: 7 batches in step 0 of 15-5, 3 in step 1. Read only."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, ShapesConfig(train=32, val=8, size=64, seed=3), num_workers=1)
    return root
