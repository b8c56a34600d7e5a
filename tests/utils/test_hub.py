"""``hf:`` against a local server: real processes, a real cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, REPOSITORY, environment, hub

ROOT = Path(__file__).resolve().parents[2]
FETCH = """
import sys
from pathlib import Path
from utils.errors import UserError
from utils.hub import local_file
try:
    print(local_file(Path(sys.argv[1])))
except UserError as error:
    sys.exit(f"error: {error}")
"""
FILE = "step_0.safetensors"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    names = (FILE, "step_0.json", "results_0.json", "other.json")
    for name in names:
        (folder / name).write_text(f"content of {name}")
    return folder


def fetch(name: str, cache: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FETCH, name]
    env = environment(cache, **more)
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)


def refused(name: str, cache: Path, **more: str) -> str:
    done = fetch(name, cache, **more)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_downloads_once_with_what_lies_beside(revision: str, published: Path, tmp_path: Path) -> None:
    name = f"hf:{REPOSITORY}/{FILE}{revision}"
    with hub(published) as there:
        first = fetch(name, tmp_path / "cache", **there)
    assert first.returncode == 0, first.stderr
    path = Path(first.stdout.strip())
    assert path.read_text() == f"content of {FILE}"
    assert {file.name for file in path.parent.iterdir()} == {FILE, "step_0.json", "results_0.json"}
    # The server is gone. huggingface_hub tries five times unless it is told so, or a commit is named.
    gone = there if COMMIT in revision else {"HF_HUB_OFFLINE": "1"}
    assert fetch(name, tmp_path / "cache", **gone).stdout == first.stdout


def test_refusals(published: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with hub(published) as there:
        for name, what in {
            f"hf:{REPOSITORY}/{FILE}@v9": f"{REPOSITORY}: has no revision v9",
            f"hf:{REPOSITORY}/none.safetensors": f"{REPOSITORY}: has no file none.safetensors",
            f"hf:someone/else/{FILE}": "someone/else: no such repository",
            f"hf:{REPOSITORY}": "give hf:OWNER/REPO/FILE",
            f"hf:{REPOSITORY}/{FILE}@": "give hf:OWNER/REPO/FILE",
        }.items():
            assert what in refused(name, cache, **there)
    line = refused(f"hf:{REPOSITORY}/{FILE}", cache, HF_HUB_OFFLINE="1")
    assert "cannot be downloaded (no network?) and is not in the cache" in line


def test_damaged_on_the_way(published: Path, tmp_path: Path) -> None:
    with hub(published, damaged=FILE) as there:
        assert "wrong checksum" in refused(f"hf:{REPOSITORY}/{FILE}", tmp_path / "cache", **there)


def test_other_paths_are_left_alone(tmp_path: Path) -> None:
    done = fetch(str(tmp_path / "hf.pth"), tmp_path)
    assert done.stdout.strip() == str(tmp_path / "hf.pth")
