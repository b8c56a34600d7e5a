"""What the figures of ``benchmarks.gpu_check`` say: one line per question, with the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measure import Column, Row
from benchmarks.step import FLOAT32, PEAK_TARGET, TARGET

FLOAT32_TARGET = 3.0  # times as slow as bf16 with channels-last
ANSWER_COLUMNS: list[Column] = [
    ("question", "question", ""),
    ("measured", "measured", ""),
    ("target", "target", ""),
    ("met", "met", ""),
]


def answers(parts: Sequence[Row]) -> list[Row]:
    """One row per question.

    Args:
        parts: rows of ``benchmarks.gpu_check``, with their ``figures``.
    """
    rows: list[Row] = []
    eats: dict[str, float] = {}
    for part in parts:
        name, figures = part["part"], part.get("figures", {})
        done = {"question": f"{name}: ends in time, without a fault", "measured": part["verdict"]}
        rows.append({**done, "target": "ok", "met": _met(part["verdict"] == "ok")})
        if name == "tests":
            rows[-1]["measured"] += f", {part.get('last_line', '')}"
        for kind, answer in _ANSWERS.items():
            if name.startswith(kind):
                rows += answer(figures)
        if name.startswith("methods"):
            for row in figures.get("rows", []):
                eats[row["model"]] = max(eats.get(row["model"], 0.0), row["images_per_second"])
        if name == "loader" and "images_per_second" in figures:
            rows += _loader(figures, eats)
    return rows


def _real_runs(figures: Mapping[str, Any]) -> Iterator[Row]:
    for name, outcome in figures.get("cases", {}).items():
        said = "ok" if outcome["ok"] else outcome["reason"].strip().splitlines()[-1]
        yield {"question": name, "measured": said, "target": "ok", "met": _met(outcome["ok"])}


def _peak(figures: Mapping[str, Any]) -> Iterator[Row]:
    rates: dict[str, float] = {}
    for row in figures.get("rows", []):
        model, form = row.get("model"), row.get("form", "")
        if model is None:
            yield {"question": row["step"], "measured": f"{row['tflops']:.1f} TFLOP/s"}
        elif model not in rates:  # the first row of a network is its step as it is
            rates[model] = row["images_per_second"]
            share = row["share"]
            yield {
                "question": f"MIB on {model}: share of the bf16 peak",
                "measured": f"{share:.1%}, {row['images_per_second']:.0f} images/s",
                "target": f"{PEAK_TARGET:.0%}",
                "met": _met(share >= PEAK_TARGET),
            }
        else:
            slower = rates[model] / row["images_per_second"]
            targeted = form == FLOAT32
            yield {
                "question": f"MIB on {model}: {form}",
                "measured": f"{slower:.2f} times as slow",
                "target": f"{FLOAT32_TARGET:g} or more" if targeted else "",
                "met": _met(slower >= FLOAT32_TARGET) if targeted else "",
            }


def _methods(figures: Mapping[str, Any]) -> Iterator[Row]:
    rows = figures.get("rows", [])
    for row in rows:
        yield {
            "question": f"{row['method']} on {row['model']}: overhead",
            "measured": f"{row['overhead']:.1%}, {row['images_per_second']:.1f} images/s, "
            f"{row['memory_mb'] / 1000:.1f} GB",
            "target": f"at most {TARGET:.0%}",
            "met": _met(row["overhead"] <= TARGET),
        }


def _losses(figures: Mapping[str, Any]) -> Iterator[Row]:
    for row in figures.get("rows", []):
        asked: Row = {"question": f"{row['case']}: cross entropies", "measured": f"{row['ratio']:.2f}"}
        if "verdict" in row:
            asked["measured"] += f"; kernel {row['kernel_ratio']:.2f}, formula {row['formula_ratio']:.2f}"
            asked |= {"target": "the faster form is used", "met": row["verdict"]}
        yield asked


def _compile(figures: Mapping[str, Any]) -> Iterator[Row]:
    for row in figures.get("rows", [])[1:]:
        yield {"question": f"{figures['step']}, {row['case']}", "measured": f"{row['ratio']:.2f} of the time"}


def _loader(figures: Mapping[str, Any], eats: Mapping[str, float]) -> Iterator[Row]:
    """Against the fastest method on each network."""
    rate, processes = figures["images_per_second"], figures["num_workers"]
    for model, eaten in eats.items():
        brake = (
            f"the network is the brake, the loader {rate / eaten:.1f} times as fast"
            if rate >= eaten
            else f"the loader is the brake, the network {eaten / rate:.1f} times as fast: more cores mend it"
        )
        yield {
            "question": f"loader against {model}, crop {figures['crop']}",
            "measured": f"{rate:.0f} images/s with {processes} processes, eaten {eaten:.0f}: {brake}",
            "target": "the network",
            "met": _met(rate >= eaten),
        }


def _met(condition: bool) -> str:
    return "yes" if condition else "NO"


_ANSWERS = {
    "real runs": _real_runs,
    "peak": _peak,
    "methods": _methods,
    "losses": _losses,
    "compile": _compile,
}
