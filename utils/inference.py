"""Prediction at several scales and mirrored, fused to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import class_scores


class FusedPrediction:
    """Scores from several scaled and mirrored views of an image.

    Args:
        scales: factors on the image's height and width.
        flip: also predict the mirrored image at every scale.
        mode: "mean" averages the probabilities, "max" takes the largest, "voting" counts arg-maxes.
    """

    def __init__(self, scales: Sequence[float], flip: bool, mode: str) -> None:
        self.scales = scales
        self.flip = flip
        self.mode = mode

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Fused scores B×C×H×W of normalised images B×3×H×W."""
        fused: Tensor | None = None
        for scale in self.scales:
            for mirrored in (False, True) if self.flip else (False,):
                view = self._view(model, images, scale, mirrored)
                fused = view if fused is None else self._fuse(fused, view)
        assert fused is not None
        return fused

    def _view(self, model: nn.Module, images: Tensor, scale: float, mirrored: bool) -> Tensor:
        size = images.shape[-2:]
        scaled = (
            images
            if scale == 1
            else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        )
        scores = class_scores(model, scaled.flip(-1) if mirrored else scaled).float()
        if mirrored:
            scores = scores.flip(-1)
        if scores.shape[-2:] != size:
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        probabilities = scores.softmax(dim=1)
        if self.mode != "voting":
            return probabilities
        return F.one_hot(probabilities.argmax(dim=1), scores.shape[1]).movedim(-1, 1).float()

    def _fuse(self, fused: Tensor, view: Tensor) -> Tensor:
        return torch.maximum(fused, view) if self.mode == "max" else fused + view
