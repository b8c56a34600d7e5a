"""The benchmarks of whole steps run, at small sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from forked import spawn

from benchmarks import data, losses, profile, scaling, step
from benchmarks.measure import interleaved, markdown, peak_bytes
from benchmarks.workbench import ALL_METHODS, bench, methods_of, options
from methods.presets import preset
from utils import loss_kernels

CPU = torch.device("cpu")
TOY = ["--batch", "2", "--crop", "32", "--repeats", "1", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_step_compares_each_method_with_its_network(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    rows = step.main(["--models", "segformer_b0", "--methods", "FT", "SDR", *TOY, "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["rows"] == rows and report["threads"] == 1 and report["crop"] == 32
    for row, reference in zip(rows, ("network_ms", "network_teacher_ms"), strict=True):
        assert row["overhead"] == pytest.approx(row["method_ms"] / row[reference] - 1)
        assert row["images_per_second"] == pytest.approx(2000 / row["method_ms"])
        assert 0 < row["network_memory_mb"] <= 1.5 * row["memory_mb"]


def test_step_measures_the_share_of_the_matrix_peak() -> None:
    matrix, own, plain = step.main(["--peak", "--models", "segformer_b0", *TOY])
    assert matrix["share"] == 1.0
    for row in (own, plain):
        assert row["share"] == pytest.approx(row["tflops"] / matrix["tflops"])
        assert row["images_per_second"] > 0


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_bench_trains_every_method_as_its_options_say(method: str) -> None:
    model = (
        "segformer_b0"
        if method in methods_of("segformer_b0") and method != "SATS"
        else "deeplab-mobilenet_v2"
    )
    pools = "pod" in preset(method, dataset="voc", task="15-5")  # PLOP's grids need maps of 4 × 4
    made = bench(options(method, model, batch=2, crop=128 if pools else 32), CPU)
    needs = made.student.intermediates
    before = [p.detach().clone() for p in made.student.parameters() if p.requires_grad]
    made.bare(teacher=True)()
    assert made.student.intermediates == needs
    terms = made.run()
    assert all(torch.isfinite(term) for term in terms.values())
    after = [p for p in made.student.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if method in ("EWC", "RW", "PI"):
        assert "reg" in terms


def test_losses_say_which_form_is_right_on_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        losses, "_logits", lambda device, classes=21: torch.randn(1, classes, 8, 8).requires_grad_()
    )
    monkeypatch.setattr(losses, "_blobs", lambda device, batch, classes: torch.zeros(1, 8, 8).long())
    seconds = iter([{"unit": 1.0, "case": 2.0, "kernel": 2.0, "formula": time} for time in (4.0, 2.1)])

    def timed(contenders: dict[str, Callable[[], object]], *_: object) -> dict[str, float]:
        for form in ("kernel", "formula") if "kernel" in contenders else ():
            with mock.patch.object(loss_kernels, "unbiased_cross_entropy", wraps=kernel) as called:
                contenders[form]()
            assert called.called is (form == "kernel")
        return next(seconds) if "kernel" in contenders else {"unit": 1.0, "case": 3.0}

    kernel = loss_kernels.unbiased_cross_entropy
    monkeypatch.setattr(losses, "interleaved", timed)
    named = {case.name: case for case in losses.CASES}
    chosen = [
        named[name] for name in ("unbiased CE, 8×21×512²", "focal, 8×21×512²", "unbiased CE, 8×21×512²")
    ]
    rows = losses.measure(chosen, CPU, 1, plain=True, out=tmp_path / "losses.json")
    assert [row.get("verdict") for row in rows] == [
        "kernel, right",
        None,
        "kernel, WRONG: use the formula on this device",
    ]
    assert json.loads((tmp_path / "losses.json").read_text())["rows"] == rows


def test_profile_divides_the_step_and_draws_it(tmp_path: Path) -> None:
    picture, trace, out = (tmp_path / name for name in ("parts.png", "trace.json", "parts.json"))
    files = ["--picture", str(picture), "--trace", str(trace), "--out", str(out)]
    rows = profile.main(["--method", "MIB", "--model", "segformer_b0", *TOY, *files])
    names = [row["part"] for row in rows]
    assert {*profile.NETWORK, "backward of the losses", "OutputDistillation: losses"} <= set(names)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0, abs=0.01)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000
    assert any(
        event.get("name") == "aten::convolution" for event in json.loads(trace.read_text())["traceEvents"]
    )
    assert json.loads(out.read_text())["rows"] == rows


def test_data_times_a_sample_and_the_loader(tmp_path: Path) -> None:
    out = tmp_path / "data.json"
    words = ["--crop", "64", "--samples", "4", "--repeats", "1", "--batch", "2", "--out", str(out)]
    report = data.main([*words, "--num_workers", "1", "--seconds", "0.5"])
    assert report["images_per_second"] > 0 and report["num_workers"] == 1
    assert report["ms"]["whole sample"] > 0
    assert json.loads(out.read_text())["images_per_second"] == report["images_per_second"]
    assert "images_per_second" not in data.main(words)


def test_photos_are_enlarged_with_their_masks(tmp_path: Path) -> None:
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    small = data.generated(tmp_path / "small", 2)
    large = data.enlarged(tmp_path / "large", small, 5, 750)
    assert len(large) == 2
    (image, mask), (_, expected) = large.read(0), small.read(0)
    assert image.shape[-2:] == mask.shape[-2:] == (750, 1000)
    assert torch.equal(mask[..., ::2, ::2].as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_scaling_compares_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)  # takes a minute
    plain, translated = scaling.main(["--compile", *TOY, "--model", "segformer_b0"])
    assert [plain["case"], translated["case"]] == ["as it is", "compiled"]
    assert translated["ratio"] == pytest.approx(translated["ms"] / plain["ms"])
    assert len(compiled) == 1  # in one of the two; FT has no teacher


def test_scaling_compares_classes_steps_crops_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling.mp, "spawn", spawn)  # without imports
    out = tmp_path / "scaling.json"
    rows = scaling.main(["--method", "FT", *TOY, "--model", "segformer_b0", "--out", str(out)])
    cases = [row["case"] for row in rows]
    assert cases[:4] == [name for name, _, _ in scaling.CLASSES]
    assert cases[4:] == ["crop 32²", "crop 48²", "crop 64²", "1 process", "2 processes"]
    assert rows[0]["ratio"] == rows[4]["ratio"] == rows[7]["efficiency"] == 1.0
    assert rows[8]["images_per_second"] == pytest.approx(2 * 2 * 1000 / rows[8]["ms"])
    assert json.loads(out.read_text())["rows"] == rows


def test_classes_and_steps_are_those_of_the_names() -> None:
    for name, words, number in scaling.CLASSES:
        opts = options("FT", "segformer_b0", batch=2, crop=32, words=words)
        counts = opts.task_.classes_per_step(number)
        assert name == f"{sum(counts)} classes, {len(counts)} step{'s' if len(counts) > 1 else ''}"


def test_interleaved_runs_in_turn_and_excludes_the_warm_up() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 2)
    assert calls == ["a", "b"] * 3 and times.keys() == {"a", "b"}


def test_peak_bytes_is_the_most_held_at_one_time() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(1000, 250).sum()

    assert 1_000_000 <= peak_bytes(call, CPU) < 1_100_000


def test_markdown_leaves_cells_without_a_figure_empty() -> None:
    text = markdown([("case", "name", ""), ("ms", "ms", ".1f")], [{"name": "a", "ms": 1.25}, {"name": "b"}])
    assert text.splitlines() == ["| case | ms |", "|---|---|", "| a | 1.2 |", "| b |  |"]
