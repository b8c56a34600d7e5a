"""Time of every loss, forward and backward, in units of cross entropy.

    python -m benchmarks.losses [--out FILE.json] [--threads N] [--repeats N] [--device cuda] [--only TEXT]
                                [--plain]

The unit CE is the time of ``F.cross_entropy``, forward and backward, on 8×21×512×512 float32 logits with the
same device and threads. Each repeat times CE and then the case, so that other load affects both; the figure
is the median of the case's times divided by the median of CE's. ``--plain`` also times the kernel of
``utils/loss_kernels.py`` and the plain formula, and says which of the two is used on this device and whether
that is right: a kernel is used where it saves at least a fifth of the formula's time. On CUDA a kernel works
in one block: there are no caches to fill, and each block is a launch.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Row, command_line, heading, interleaved, markdown, write_report
from utils import loss as L
from utils import loss_kernels
from utils.command import run_command
from utils.option_types import positive_int

WORTH_A_KERNEL = 0.2  # share of the formula's time that a kernel must save to be used
ONE_BLOCK = 2**62


class Case(NamedTuple):
    """A benchmark: ``make(device, of)`` returns the function to time; other numbers are in CE."""

    name: str
    make: Callable[..., Callable[[], object]]
    of: Any
    released: float | None = None
    target: float | None = None


def _logits(device: torch.device, classes: int = 21, grad: bool = True) -> Tensor:
    return (torch.randn(8, classes, 512, 512, device=device) * 3).requires_grad_(grad)


def _blobs(device: torch.device, batch: int, classes: int) -> Tensor:
    """Labels of 512×512 pixels, constant in squares of 64 pixels, a tenth of them void."""
    coarse = torch.randint(0, classes, (batch, 1, 8, 8), device=device)
    coarse[torch.rand(coarse.shape, device=device) < 0.1] = L.VOID
    return F.interpolate(coarse.float(), size=(512, 512), mode="nearest").long()[:, 0]


def _forms(function: Callable[[], object], device: torch.device) -> dict[str, Callable[[], object]]:
    """The loss with its kernel and by the plain formula; nothing if it has no kernel."""
    with mock.patch.object(loss_kernels, "gain", wraps=loss_kernels.gain) as asked:
        function()
    if not asked.called:
        return {}

    def on(*devices: str) -> Callable[[], object]:
        def run() -> object:
            with loss_kernels.used_on(*devices, block=None if device.type == "cpu" else ONE_BLOCK):
                return function()

        return run

    return {"kernel": on(device.type), "formula": on()}


def _verdict(used: str, saved: float) -> str:
    """Whether the form that is used on this device is the right one."""
    better = "kernel" if saved >= WORTH_A_KERNEL else "formula"
    return f"{used}, right" if used == better else f"{used}, WRONG: use the {better} on this device"


def _backward(inputs: list[Tensor], function: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(function(), inputs)

    return run


def _classification(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    x, y = _logits(device), _blobs(device, 8, 21)
    return _backward([x], lambda: criterion(x, y))


def _distillation(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    x, t = _logits(device), _logits(device, 16, grad=False)
    return _backward([x], lambda: criterion(x, t))


def _sdr(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features after a ReLU, labels of 6 classes, prototypes."""
    features = torch.randn(8, 2048, 32, 32, device=device).relu_().requires_grad_()
    return features, _blobs(device, 8, 6), torch.rand(21, 2048, device=device)


def _contrastive(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    f, y, p = _sdr(device)
    return _backward([f], lambda: torch.stack(criterion(f, y, p)).sum())


def _matching(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    f, y, p = _sdr(device)
    outputs_old = F.interpolate(torch.randn(8, 16, 32, 32, device=device), size=(512, 512))
    return _backward([f], lambda: criterion(f, y, outputs_old, p, 16))


def _of_features(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    f, y, _ = _sdr(device)
    return _backward([f], lambda: criterion(f, y))


def _update(device: torch.device, table: L.Prototypes) -> Callable[[], object]:
    f, y, _ = _sdr(device)
    own = copy.deepcopy(table).to(device)
    return lambda: own.update(f, y)


def _attention(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    shapes = [(4, heads, side * side, 256) for heads, side in ((1, 128), (2, 64), (5, 32), (8, 16))]
    old = [torch.rand(shape, device=device).softmax(-1) for shape in shapes]
    new = [torch.rand(shape, device=device).softmax(-1).requires_grad_() for shape in shapes]
    labels = _blobs(device, 4, 21)
    return _backward(new, lambda: criterion(old, new, labels))


def _local_pod(device: torch.device, form: tuple[torch.memory_format, int]) -> Callable[[], object]:
    memory_format, crop = form
    shapes = [(256, 4), (512, 8), (1024, 16), (2048, 16), (256, 16), (21, 16)]
    sides = [(depth, -(-crop // stride)) for depth, stride in shapes]
    new = [torch.randn(4, depth, side, side, device=device) for depth, side in sides]
    old = [torch.randn_like(maps)[:, : 16 if maps.shape[1] == 21 else None] for maps in new]
    new = [maps.contiguous(memory_format=memory_format).requires_grad_() for maps in new]
    old = [maps.contiguous(memory_format=memory_format) for maps in old]
    criterion = L.LocalPODLoss(pod_factor=0.01, pod_options={"switch": {"after": {"factor": 0.0005}}})
    return _backward(new, lambda: criterion(old, new, 21, 5, 16))


def _decomposed(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    f = torch.randn(8, 256, 32, 32, device=device).requires_grad_()
    w = torch.randn(20, 256, device=device).requires_grad_()
    f_old, w_old = torch.randn_like(f), torch.randn(15, 256, device=device)
    return _backward([f, w], lambda: criterion(f, f_old, w, w_old).sum())


def _label_guided(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    x, t, y = _logits(device), _logits(device, 16, grad=False), _blobs(device, 8, 21)
    return _backward([x], lambda: criterion(x, t, y))


def _pooled_cubes(device: torch.device, criterion: torch.nn.Module) -> Callable[[], object]:
    shapes = [(256, 128), (512, 64), (1024, 32), (2048, 32), (256, 32)]
    new = [torch.randn(4, depth, side, side, device=device).requires_grad_() for depth, side in shapes]
    old = [torch.randn_like(maps) for maps in new]
    logits = torch.randn(4, 21, 32, 32, device=device).requires_grad_()
    logits_old = torch.randn(4, 16, 32, 32, device=device)
    return _backward([*new, logits], lambda: sum(criterion([*old, logits_old], [*new, logits], 21, 5, 16)))


def _pseudo_labels(device: torch.device, threshold: float) -> Callable[[], object]:
    outputs_old, labels = _logits(device, 16, grad=False), _blobs(device, 8, 21)
    thresholds = torch.full((21,), threshold, device=device)
    return lambda: L.entropy_pseudo_labels(outputs_old, labels, thresholds, nb_current_classes=21)


_SPARSITY = L.FeaturesSparsificationLoss("max_maskedforclass", "exponential", "ratio")
_RELEASED: dict[str, Any] = {"fidelity": "released"}
CASES = [
    Case("unbiased CE, 8×21×512²", _classification, L.UnbiasedCrossEntropy(old_cl=16), 4.4, 1.5),
    Case("unbiased KD, 8×21×512², 16 old", _distillation, L.UnbiasedKnowledgeDistillationLoss(), 3.8, 1.8),
    Case("SDR attraction + repulsion", _contrastive, L.FeaturesClusteringSeparationLoss(), 4.2, 0.4),
    Case("SDR matching", _matching, L.DistillationEncoderPrototypesLoss(sumafter=True), 5.9, 0.3),
    Case("SDR matching, each feature", _matching, L.DistillationEncoderPrototypesLoss(sumafter=False)),
    Case("SDR sparsity", _of_features, _SPARSITY, 10.1, 0.8),
    Case("SDR prototype update", _update, L.Prototypes(21, 2048), 1.6, 0.15),
    Case("SATS attention transfer, B = 4", _attention, L.AttentionTransferLoss(), 3.9, 0.4),
    Case("PLOP local POD, B = 4", _local_pod, (torch.contiguous_format, 512), 6.8, 1.0),
    Case("PLOP local POD, channels last", _local_pod, (torch.channels_last, 512)),
    Case("PLOP local POD, crop 513", _local_pod, (torch.channels_last, 513)),
    Case("KD, 8×21×512², 16 old", _distillation, L.KnowledgeDistillationLoss()),
    Case("BCE with ignore, 8×21×512²", _classification, L.BCEWithLogitsLossWithIgnoreIndex()),
    Case("focal, 8×21×512²", _classification, L.FocalLoss()),
    Case("entropy pseudo-labels, 8×16×512²", _pseudo_labels, 0.3),
    Case(
        "SDR attraction + repulsion, released",
        _contrastive,
        L.FeaturesClusteringSeparationLoss(**_RELEASED),
        4.2,
    ),
    Case("SDR matching, released", _matching, L.DistillationEncoderPrototypesLoss(True, **_RELEASED), 5.9),
    Case("SDR prototype update, released", _update, L.Prototypes(21, 2048, **_RELEASED), 1.6),
    Case("SATS attention transfer, released", _attention, L.AttentionTransferLoss(**_RELEASED), 3.9),
    Case("SNNL, 8192 positions", _of_features, L.SNNL(temperature=2048.0)),
    Case("DKD: BCE of new classes, 8×21×512²", _classification, L.MBCELoss(0)),
    Case("DKD: decomposed distillation", _decomposed, L.DecomposedDistillationLoss("both")),
    Case("LGKD, 8×21×512², 16 old", _label_guided, L.LabelGuidedKnowledgeDistillationLoss()),
    Case("RCIL pooled cubes, B = 4", _pooled_cubes, L.PooledCubeDistillationLoss()),
]

COLUMNS = [
    ("forward + backward", "case", ""),
    ("ms", "ms", ".2f"),
    ("CE", "ratio", ".3f"),
    ("target", "target", ""),
    ("released", "released", ""),
]
PLAIN_COLUMNS = [
    ("kernel", "kernel_ratio", ".3f"),
    ("formula", "formula_ratio", ".3f"),
    ("saved", "saved", ".0%"),
    ("used on this device", "verdict", ""),
]


def measure(
    cases: list[Case], device: torch.device, repeats: int, plain: bool = False, out: Path | None = None
) -> list[Row]:
    """Time the cases; one row per case, with milliseconds and the ratio to cross entropy.

    Args:
        cases, device, repeats: what is timed, where, how often.
        plain: also time kernel and formula of the losses that have a kernel.
        out: rewritten after each case.
    """
    logits, targets = _logits(device), _blobs(device, 8, 21)
    unit = _backward([logits], lambda: F.cross_entropy(logits, targets, ignore_index=L.VOID))
    rows: list[Row] = []
    for case in cases:
        torch.manual_seed(0)
        contenders = {"unit": unit, "case": case.make(device, case.of)}
        if plain:
            contenders |= _forms(contenders["case"], device)
        times = interleaved(contenders, device, repeats)
        seconds, ce = times["case"], times["unit"]
        row = {"case": case.name, "ms": 1000 * seconds, "ce_ms": 1000 * ce, "ratio": seconds / ce}
        rows.append({**row, "released": case.released, "target": case.target})
        if "kernel" in times:
            saved = 1.0 - times["kernel"] / times["formula"]
            used = "kernel" if loss_kernels.gain(logits) else "formula"
            rows[-1] |= {f"{form}_ratio": times[form] / ce for form in ("kernel", "formula")}
            rows[-1] |= {"saved": saved, "used": used, "verdict": _verdict(used, saved)}
        write_report(out, device, rows=rows)
        del contenders
        gc.collect()
    return rows


def main() -> None:
    """Parse the options, measure, print, and write JSON if ``--out`` is given."""
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed repeats of each case")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--plain", action="store_true", help="compare with the formulas without kernels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    cases = [case for case in CASES if options.only in case.name]
    rows = measure(cases, device, options.repeats, options.plain, options.out)
    print(heading(device))
    print(markdown([*COLUMNS, *(PLAIN_COLUMNS if options.plain else ())], rows))


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.losses", main))
