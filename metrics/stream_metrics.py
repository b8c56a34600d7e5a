"""Confusion matrix of an evaluation, exact on any device and any number of processes."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.distributed import all_reduce_sum
from utils.errors import UserError
from utils.labels import VOID


class StreamSegMetrics:
    """Counts pixels by label and prediction, batch by batch.

    Void has its own bin, and one scatter counts all pixels in int64: a boolean mask that removes void pixels
    would synchronise with the GPU in every batch.

    Args:
        num_classes: C, number of the network's classes. Labels are 0..C-1, or 255 for void.
        device: of the predictions, where pixels are counted.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # C² cells, then void, then labels that are neither a class nor void.
        self.counts = torch.zeros(num_classes**2 + 2, dtype=torch.long, device=device)
        self._is_summed = False

    def reset(self) -> None:
        """Count from zero again."""
        self.counts.zero_()
        self._is_summed = False

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Count a batch, without synchronising with the GPU.

        Args:
            preds: B×H×W, integers 0..C-1.
            targets: B×H×W, integers 0..C-1 or 255, any integer type.
        """
        if preds.shape != targets.shape:
            raise ValueError(
                f"predictions {tuple(preds.shape)} and labels {tuple(targets.shape)} differ in shape"
            )
        classes = self.num_classes
        labels = targets.long()
        void = classes**2
        cell = torch.where(labels == VOID, void, labels * classes + preds)
        stray = (labels != VOID) & ((labels < 0) | (labels >= classes))
        cell = cell.masked_fill(stray, void + 1).flatten()
        self.counts.scatter_add_(
            0, cell, torch.ones((), dtype=torch.long, device=cell.device).expand_as(cell)
        )

    def synchronise(self) -> None:
        """Sum the counts over all processes; every process must call it. Further calls do nothing."""
        if not self._is_summed:
            all_reduce_sum(self.counts)
            self._is_summed = True

    @property
    def confusion_matrix(self) -> Tensor:
        """C×C, int64, on the CPU; rows are labels, columns predictions.

        Raises:
            UserError: there were labels that are neither a class nor void.
        """
        counts = self.counts.cpu()
        stray = int(counts[-1])
        if stray:
            raise UserError(
                f"{stray} pixels of the evaluation masks have a class id outside 0 to {self.num_classes - 1} "
                f"that is not void ({VOID}); check the masks and the task"
            )
        return counts[:-2].view(self.num_classes, self.num_classes)
