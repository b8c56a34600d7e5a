"""The check for GPU machines: time limits, what an interrupted check keeps, its answers, and the pack."""

from __future__ import annotations

import argparse
import json
import lzma
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from benchmarks import gpu_check, gpu_pack
from benchmarks.gpu_answers import answers
from benchmarks.gpu_check import Part
from dataset import open_dataset
from utils.errors import UserError

WRITES = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); print('written')"


def writer(name: str, stage: int, file: Path, figures: object, then: str = "", limit: float = 60) -> Part:
    words = ("-c", f"{WRITES}\n{then}", str(file), json.dumps(figures))
    return Part(name, words, limit, stage, file)


def test_a_part_over_its_time_is_stopped_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM lets it save; what it started ends with it; the next stage runs."""
    saves = (
        "import signal, subprocess\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "time.sleep(600)"
    )
    cases = {"cases": {"MIB": {"ok": False, "reason": "trace\nthe last line"}}}
    made = [
        writer("real runs", 0, tmp_path / "a.json", cases, saves, limit=4),
        writer("compile", 1, tmp_path / "b.json", {"step": "MIB", "rows": [{}, {"case": "x", "ratio": 0.5}]}),
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda _: made)
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 1
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    stopped, done = report["parts"]
    assert (stopped["verdict"], stopped["last_line"], stopped["figures"]) == ("over its time", "saved", cases)
    assert (done["verdict"], done["figures"]["rows"][1]["ratio"]) == ("ok", 0.5)
    measured = {row["question"]: (row["measured"], row.get("met")) for row in report["answers"]}
    assert measured["MIB"] == ("the last line", "NO")
    assert measured["MIB, x"] == ("0.50 of the time", None)
    text = (tmp_path / "out" / "gpu_check.txt").read_text()
    assert "saved" in text and text.splitlines()[-1] in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu_check.json", "gpu_check.txt"]


def test_without_time_left_a_part_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "parts", lambda _: [writer("losses", 0, tmp_path / "x.json", {})])
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path), "--minutes", "0.4"]
    assert gpu_check.main(words) == 1
    assert not (tmp_path / "x.json").exists()


def options(tmp_path: Path, **more: object) -> argparse.Namespace:
    given = {"small": False, "pytest": "", "photos": None, "shapes": Path("s"), "weights": None, "runs": []}
    given |= {"work": tmp_path, "experiment": None, "processes": 4, "set": []}
    return argparse.Namespace(**{**given, **more})


def test_stages_follow_each_other_and_all_end_within_their_limits(tmp_path: Path) -> None:
    found = gpu_check.parts(options(tmp_path))
    assert [part.stage for part in found] == sorted(part.stage for part in found)
    assert [part.name for part in found[:3]] == ["tests", "real runs", "peak"]
    assert len({part.figures for part in found if part.figures}) == len(found) - 1


def test_the_comparison_has_the_chosen_runs_and_those_they_start_from(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    runs = {"FT": {"method": "FT"}, "MIB": {"method": "MIB", "from": "FT"}, "SDR": {"method": "SDR"}}
    file.write_text(yaml.safe_dump({"logdir": "x", "runs": runs, "common": {"epochs": 3}}))
    chosen = options(tmp_path, experiment=file, photos=Path("p"), runs=["MIB"], set=["epochs=1"])
    part = gpu_check.parts(chosen)[-1]
    assert part.words[-3:] == ("data_root=p", "no_pretrained", "epochs=1")
    content = yaml.safe_load((tmp_path / "comparison.yaml").read_text())
    assert content["runs"] == {"MIB": runs["MIB"], "FT": runs["FT"]}
    assert content["logdir"] == str(tmp_path / "comparison") and content["processes"] == 4
    with pytest.raises(UserError, match="--runs XYZ"):
        gpu_check.parts(options(tmp_path, experiment=file, photos=Path("p"), runs=["XYZ"]))


def test_answers_compare_each_figure_with_its_target() -> None:
    def step(method: str, rate: float, overhead: float) -> dict[str, object]:
        figures = {"images_per_second": rate, "overhead": overhead, "memory_mb": 5000.0}
        return {"model": "m", "method": method, **figures}

    peak = [
        {"step": "matrix", "tflops": 700.0, "share": 1.0},
        {"model": "m", "form": "as it is", "share": 0.31, "images_per_second": 200.0},
        {"model": "m", "form": "fp32, not channels-last", "share": 0.1, "images_per_second": 100.0},
    ]
    loss = {
        "case": "KD",
        "ratio": 2.0,
        "kernel_ratio": 2.0,
        "formula_ratio": 3.0,
        "verdict": "formula, WRONG",
    }
    figures = {
        "tests": {},
        "peak": {"rows": peak},
        "methods on m": {"rows": [step("FT", 300.0, 0.01), step("MIB", 250.0, 0.11)]},
        "losses": {"rows": [loss, {"case": "focal", "ratio": 1.3}]},
        "loader": {"images_per_second": 150.0, "num_workers": 16, "crop": 512},
    }
    parts = [
        {"part": name, "verdict": "ok", "last_line": "3 passed", "figures": found}
        for name, found in figures.items()
    ]
    said = {row["question"]: (row["measured"], row.get("met", "")) for row in answers(parts)}
    assert said["tests: ends in time, without a fault"] == ("ok, 3 passed", "yes")
    assert said["MIB on m: share of the bf16 peak"] == ("31.0%, 200 images/s", "yes")
    assert said["MIB on m: fp32, not channels-last"] == ("2.00 times as slow", "NO")
    assert [said[f"{method} on m: overhead"][1] for method in ("FT", "MIB")] == ["yes", "NO"]
    assert said["KD: cross entropies"] == ("2.00; kernel 2.00, formula 3.00", "formula, WRONG")
    assert said["focal: cross entropies"] == ("1.30", "")
    measured, met = said["loader against m, crop 512"]
    assert "eaten 300: the loader is the brake, the network 2.0 times" in measured and met == "NO"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Ten training and two validation photos of a kilobyte each."""
    root = tmp_path / "voc" / "PascalVOC12"
    for folder in ("splits", "JPEGImages", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    for name, numbers in (("train_aug", range(10)), ("val", range(10, 12))):
        lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in numbers]
        (root / "splits" / f"{name}.txt").write_text("".join(lines))
        for i in numbers:
            (root / "JPEGImages" / f"{i}.jpg").write_bytes(bytes([i]) * 1000)
            (root / "SegmentationClassAug" / f"{i}.png").write_bytes(b"")
    return root


def test_photos_are_left_out_evenly_until_they_fit(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_pack, "ARCHIVE", tmp_path / "photos.tar.gz")
    gpu_pack.pack_photos(voc, 7000)
    with tarfile.open(tmp_path / "photos.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    kept = open_dataset("voc", tmp_path / "there", "train").images
    assert [path.name for path in kept] == ["0.jpg", "2.jpg", "4.jpg", "6.jpg", "8.jpg"]
    assert all(path.read_bytes() == (voc / "JPEGImages" / path.name).read_bytes() for path in kept)
    assert len(open_dataset("voc", tmp_path / "there", "val")) == 2
    with pytest.raises(UserError, match="--mib"):
        gpu_pack.pack_photos(voc, 2500)
    with pytest.raises(UserError, match="--data_root"):
        gpu_pack.pack_photos(tmp_path, 10**6)


def test_only_what_is_missing_or_too_old_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in (
        "pytest-8.0-py3-none-any.whl",
        "not_there-1.0-py3-none-any.whl",
        "timm-9.9-py3-none-any.whl",
    ):
        (wheels / name).touch()
    monkeypatch.setattr(gpu_pack, "PACK", tmp_path)
    monkeypatch.setattr(gpu_pack, "ARCHIVE", tmp_path / "none.tar.gz")
    monkeypatch.setattr(gpu_pack, "PACKED_WEIGHTS", tmp_path / "weights.xz")
    monkeypatch.setattr(gpu_pack, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights.xz").write_bytes(lzma.compress(b"weights"))
    monkeypatch.setattr(
        gpu_pack, "_bounds", lambda: {"pytest": [7, 0], "timm": [99, 0], "scikit_learn": [99, 0]}
    )
    calls: list[list[str]] = []
    monkeypatch.setattr(gpu_pack.subprocess, "run", lambda words, **_: calls.append(words))
    assert gpu_pack.main(["unpack"]) == 0
    assert [Path(word).name for word in calls[0][-2:]] == [
        "not_there-1.0-py3-none-any.whl",
        "timm-9.9-py3-none-any.whl",
    ]
    assert "older version: scikit-learn" in capsys.readouterr().out
    assert (tmp_path / "weights").read_bytes() == b"weights"


def test_the_packed_wheels_are_those_of_the_requirements_and_their_needs() -> None:
    packed = dict(word.split("==") for word in gpu_pack.needed())
    assert {"timm", "safetensors", "tensorboardx", "pytest_xdist"} < packed.keys()
    assert {"protobuf", "pluggy", "execnet"} < packed.keys()  # needs of those
    assert not {"torch", "numpy", "ruff", "types_tqdm"} & packed.keys()
    assert packed["timm"] == metadata.version("timm")


def test_a_comparison_without_photos_is_refused(tmp_path: Path) -> None:
    words = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--experiment", tmp_path / "file.yaml"]
    with pytest.raises(UserError, match="--experiment: the comparison needs photos"):
        gpu_check.main([str(word) for word in words])
    assert not list(tmp_path.iterdir())
