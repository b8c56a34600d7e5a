"""Pseudo-labels: the teacher labels the background pixels of this step's masks (PLOP, SATS)."""

from __future__ import annotations

import argparse
from typing import Any

from methods.base import Batch, Context, Method
from methods.checks import refuse_other_channels
from methods.presets import FAMILY_PLOP
from utils.lazy import loss, no_grad, torch
from utils.option_roles import OptionGroup
from utils.option_types import Number, share, whole

ENTROPY_BINS = 100
PROBABILITY_BINS = 20


def _kind(word: str) -> str:
    """``entropy``, ``median``, ``naive``, ``confidence`` or ``threshold_0.8``."""
    name, _, value = word.partition("_")
    if name == "threshold":
        try:
            if 0 <= float(value) <= 1:
                return word
        except ValueError:
            pass
    elif word in ("entropy", "median", "naive", "confidence"):
        return word
    raise argparse.ArgumentTypeError(
        f"'{word}' is unknown: use entropy, median, naive, confidence or threshold_P with a probability P"
    )


class PseudoLabels(Method):
    """Old and background pixels get the teacher's label if it is certain, else void (PLOP, section 3.3)."""

    needs_teacher = True

    def __init__(self, opts: Any) -> None:
        self.kind: str = opts.pseudo
        self.threshold: float = opts.threshold
        # PLOP's and SATS's released trainers add it after the threshold was used: no effect.
        self.step_threshold: float = (opts.fidelity == "paper" and opts.step_threshold) or 0.0
        self.bins: int | None = opts.pseudo_nb_bins
        self.adaptive: bool = opts.classif_adaptive_factor
        self.min_factor: float = opts.classif_adaptive_min_factor
        self.fidelity: str = opts.fidelity
        self.thresholds = torch.empty(0)
        self.weighted: bool = not opts.pseudo_unweighted
        self.infinite: float | None = opts.pseudo_infinite

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--pseudo``, ``--pseudo_*``, ``--threshold``, ``--step_threshold``, ``--classif_*``."""
        group.value(
            "--pseudo", _kind, None, help="entropy (PLOP, SATS), median, naive, confidence, or threshold_P"
        )
        group.value(
            "--threshold",
            share,
            0.9,
            help="entropy: minimum of the median; median: its maximum; SSUL: minimum of the sigmoid",
        )
        group.value(
            "--step_threshold", Number(float, -1, 1), None, help="added to the threshold at every step"
        )
        group.value(
            "--pseudo_nb_bins", whole(1, 10_000), None, help="number of bins of the histogram for the median"
        )
        group.flag(
            "--classif_adaptive_factor",
            help="scale each image's classification loss by the fraction of accepted pixels",
        )
        group.value("--classif_adaptive_min_factor", share, 0.0, help="minimum of that factor")
        group.flag(
            "--pseudo_unweighted",
            help="do not scale the loss by the factor or the confidence (SATS's released code)",
        )
        group.value(
            "--pseudo_infinite",
            Number(float, 0, 1e9),
            None,
            metavar="T",
            help="threshold of a class whose median is infinite (SATS's released code: 0.005)",
        )

    @classmethod
    def from_options(cls, opts: Any) -> PseudoLabels | None:
        """Enabled with ``--pseudo``.

        Raises:
            UserError: the classifier has other channels.
        """
        if opts.pseudo is None:
            return None
        refuse_other_channels(opts, "pseudo")
        return cls(opts)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Void and unseen labels of PLOP's program, if typed rather than set by a preset."""
        return FAMILY_PLOP if "pseudo" in opts.typed else {}

    def begin_step(self, context: Context) -> None:
        """Compute each class's median entropy or probability of the teacher over the step's images."""
        self.classes = context.classes_old + context.classes_new
        if self.kind not in ("entropy", "median"):
            return
        inputs = {
            "kind": self.kind,
            "threshold": self.threshold,
            "step_threshold": self.step_threshold,
            "bins": self.bins,
            "fidelity": self.fidelity,
        }
        found = context.cached("pseudo_label_thresholds", inputs, lambda: self._medians(context))
        self.thresholds = found["thresholds"]

    @no_grad
    def _medians(self, context: Context) -> dict[str, torch.Tensor]:
        assert context.model_old is not None
        mode = "entropy" if self.kind == "entropy" else "probability"
        bins = self.bins or (ENTROPY_BINS if mode == "entropy" else PROBABILITY_BINS)
        histogram = torch.zeros(self.classes, bins, dtype=torch.long, device=context.device)
        for images, targets in context.batches():
            with context.autocast():
                outputs_old, _ = context.model_old(images)
            histogram += loss.pseudo_label_histogram(
                outputs_old,
                targets,
                nb_current_classes=self.classes,
                nb_bins=bins,
                mode=mode,
                fidelity=self.fidelity,
            )
        thresholds = loss.class_median_thresholds(
            context.reduce(histogram),
            self.threshold + context.step * self.step_threshold,
            mode=mode,
            fidelity=self.fidelity,
            infinite_threshold=self.infinite,
        )
        return {"thresholds": thresholds, "histogram": histogram}

    def relabel(self, batch: Batch) -> None:
        """Replace the targets; set the weights of the classification loss."""
        assert batch.outputs_old is not None
        outputs, labels, old = batch.outputs_old, batch.targets, batch.classes_old
        if self.kind == "entropy":
            batch.targets, factor = loss.entropy_pseudo_labels(
                outputs,
                labels,
                self.thresholds,
                nb_current_classes=self.classes,
                classes_old=old,
                min_factor=self.min_factor,
                fidelity=self.fidelity,
            )
            if self.adaptive and self.weighted:
                batch.image_weights = factor
        elif self.kind == "confidence":
            batch.targets, weights = loss.confidence_pseudo_labels(outputs, labels, classes_old=old)
            if self.weighted:
                batch.pixel_weights = weights
        else:
            least: torch.Tensor | float = self.thresholds
            if self.kind != "median":
                least = float(self.kind.partition("_")[2] or 0.0)
            batch.targets = loss.probability_pseudo_labels(outputs, labels, least, classes_old=old)
