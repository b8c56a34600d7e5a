from __future__ import annotations

from pathlib import Path

import pytest
from command import Launch, Outcome, launch


@pytest.fixture
def cli(tiny_data: Path, interpreter: Path) -> Launch:
    """``cli(*arguments)`` on the generated data."""

    def run(*arguments: str | Path, launcher: str | None = None, processes: int = 1) -> Outcome:
        return launch(
            *("--dataset", "shapes", "--data_root", tiny_data, *arguments),
            launcher=launcher,
            interpreter=interpreter,
            processes=processes,
        )

    return run
