"""The README's first command, with fewer epochs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_demo_ends_with_a_table_and_images(tiny_data: Path, tmp_path: Path, interpreter: Path) -> None:
    venv = tmp_path / "venv"  # that of the tests, with the stand-in as its Python
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(interpreter)
    for stamp in Path(sys.prefix).glob(".installed-*"):
        (venv / stamp.name).touch()
    done = subprocess.run(
        ["bash", "scripts/demo.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "VENV": str(venv),
            "DATA": str(tiny_data),
            "LOGDIR": str(tmp_path),
            "BATCH": "4",
            "EPOCHS_0": "1",
            "EPOCHS_1": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    end = done.stdout[done.stdout.rindex("mIoU first") :]
    assert all(f"15-5-shapes_{method} " in end for method in ("FT", "MIB", "SATS"))
    assert "[4/4] step 1 with SATS: five more classes, about " in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()
    assert f"--ckpt {tmp_path}/15-5-shapes_MIB/15-5-shapes_MIB_1.pth" in end
    pictures = [Path(line.removeprefix("image: ")) for line in end.splitlines() if line.startswith("image:")]
    assert pictures
    assert all((ROOT / path).is_file() for path in pictures)
