from __future__ import annotations

from pathlib import Path

import pytest
from command import Launch, Outcome, launch


@pytest.fixture
def cli(shapes_root: Path, interpreter: Path) -> Launch:
    """``cli(*arguments)`` on the generated data."""

    def run(*arguments: str | Path, launcher: str | None = None, processes: int = 1) -> Outcome:
        return launch(
            *("--dataset", "shapes", "--data_root", shapes_root, *arguments),
            launcher=launcher,
            interpreter=interpreter,
            processes=processes,
        )

    return run
