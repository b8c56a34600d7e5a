"""Time of the parts of a training step.

    python -m benchmarks.profile --method SDR [--model M] [--trace F.json] [--picture F.png] [--out F.json]

The parts: forward passes of teacher and student, every hook of every method, backward passes of the losses
and of the network, optimiser, and the rest (copies, normalisation, sums). On a GPU the device is synchronised
between parts, so that the step is slower than in ``benchmarks.step``. ``--trace`` also writes a trace of one
step for chrome://tracing or Perfetto, and prints the slowest operators.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Row, command_line, heading, synchronise
from benchmarks.workbench import ALL_METHODS, MODELS, Bench, add_options, bench, options, prepare, show, sizes
from utils.command import run_command
from utils.files import atomic_write
from utils.option_types import path_option

HOOKS = ("observe", "relabel", "losses", "penalty")
COLUMNS = [("part", "part", ""), ("ms", "ms", ".2f"), ("share", "share", ".1%")]
NETWORK = ("teacher", "student", "backward of the network", "optimiser")


class Parts:
    """Measures the parts of a step.

    Args:
        made: the step; hooks are permanently added to its networks, methods and optimiser.

    Attributes:
        times: seconds of each part, one value per step.
    """

    def __init__(self, made: Bench) -> None:
        self.made = made
        self.device = made.context.device
        self.times: dict[str, list[float]] = defaultdict(list)
        self._step: dict[str, float] = defaultdict(float)
        self._began: dict[str, float] = {}
        self._watch_network("teacher", made.context.model_old)
        self._watch_network("student", made.context.model)
        optimizer = made.trainer.optimizer
        optimizer.register_step_pre_hook(lambda *_: self._start("optimiser"))
        optimizer.register_step_post_hook(lambda *_: self._stop("optimiser"))
        for name, method in made.trainer.methods.items():
            for hook in HOOKS:
                setattr(method, hook, self._watched(f"{name}: {hook}", getattr(method, hook)))
        backward = made.trainer._backward
        setattr(made.trainer, "_backward", self._until_done(backward))  # noqa: B010  # on the instance

    def run(self) -> None:
        """Run one step and append its parts to ``times``."""
        self._step.clear()
        began = self._now()
        self.made.run()
        whole = self._now() - began
        self._step["rest"] = whole - sum(self._step.values())
        self._step["whole step"] = whole
        for name, value in self._step.items():
            self.times[name].append(value)

    def rows(self) -> list[Row]:
        """Median milliseconds and share of the step of each part, longest first."""
        medians = {name: statistics.median(values) for name, values in self.times.items()}
        whole = medians.pop("whole step")
        ordered = sorted(medians.items(), key=lambda item: -item[1])
        return [
            {"part": name, "ms": 1000 * value, "share": value / whole}
            for name, value in ordered
            if value > 1e-4 * whole  # empty hooks
        ]

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def _start(self, name: str) -> None:
        self._began[name] = self._now()

    def _stop(self, name: str) -> None:
        self._step[name] += self._now() - self._began[name]

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self._start(name)
            found = function(*args)
            self._stop(name)
            if name.endswith(": losses"):  # after the last method, the backward pass follows
                self._start("backward of the losses")
            return found

        return run

    def _watch_network(self, name: str, network: nn.Module | None) -> None:
        if network is None:
            return

        def after(_: nn.Module, __: Any, found: tuple[Tensor, Any]) -> None:
            self._stop(name)
            if found[0].requires_grad:
                # The gradient of the logits is ready: the backward pass of the losses is done.
                found[0].register_hook(self._begin_network)

        network.register_forward_pre_hook(lambda *_: self._start(name))
        network.register_forward_hook(after)

    def _begin_network(self, _: Tensor) -> None:
        self._stop("backward of the losses")
        self._start("backward of the network")

    def _until_done(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            found = backward(*args, **named)
            self._stop("backward of the network")
            return found

        return run


def draw(path: Path, title: str, rows: list[Row]) -> None:
    """Draw horizontal bars of the shares as PNG, network and method in different colours.

    Raises:
        UserError: the file cannot be written.
    """
    from utils.drawing import new_figure, render  # imports matplotlib, which only this needs

    shown = [row for row in rows if row["share"] >= 0.001][::-1]
    figure = new_figure(7, 0.6 + 0.3 * len(shown), dpi=90)
    axes = figure.add_subplot()
    colours = ["#777777" if row["part"] in (*NETWORK, "rest") else "#c44e52" for row in shown]
    bars = axes.barh([row["part"] for row in shown], [100 * row["share"] for row in shown], color=colours)
    axes.bar_label(bars, labels=[f"{row['share']:.1%} ({row['ms']:.0f} ms)" for row in shown], padding=3)
    axes.set_xlim(0, 125 * max(row["share"] for row in shown))
    axes.set_xlabel("share of the step, %")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        render(figure).save(file, "png")


def trace(made: Bench, path: Path, *, operators: int = 20) -> str:
    """Write a trace of one step; returns a table of its slowest operators."""
    activities = [ProfilerActivity.CPU]
    cuda = made.context.device.type == "cuda"
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        made.run()
        synchronise(made.context.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=operators, max_name_column_width=50))


def main(argv: list[str] | None = None) -> list[Row]:
    """Parse the options, measure, print, and write the requested files; returns the rows."""
    parser = command_line(__doc__)
    parser.add_argument("--method", choices=ALL_METHODS, default="SDR")
    parser.add_argument("--model", choices=MODELS, default="deeplab-resnet101")
    parser.add_argument("--trace", type=path_option, help="write a trace of one step")
    parser.add_argument("--picture", type=path_option, help="draw the shares as PNG")
    add_options(parser)
    args = parser.parse_args(argv)
    device = prepare(args)
    made = bench(options(args.method, args.model, **sizes(args)), device)
    made.run()  # warms up
    if args.trace is not None:
        print(trace(made, args.trace))
    parts = Parts(made)
    for _ in range(args.repeats):
        parts.run()
    rows = parts.rows()
    title = show(args, device, COLUMNS, rows)
    if args.picture is not None:
        draw(args.picture, f"{title}\n{heading(device)}", rows)
    return rows


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.profile", main))
