from __future__ import annotations

from pathlib import Path

import fuzz


def test_damaged_files_give_an_error_or_the_right_content(tmp_path: Path) -> None:
    """2,000 cases: campaign.py."""
    failures, counts = fuzz.run_cases(440, 0, tmp_path / "fuzz")
    assert failures == []
    # Both happen, so that neither "always refuse" nor "never look" would pass.
    assert counts["error"] > 100
    assert counts["right"] > 20
