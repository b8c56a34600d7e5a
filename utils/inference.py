"""Prediction at several scales and mirrored, fused to one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import Precision, Predict, class_scores, to_device

MIN_SIDE = 32
"""The networks' stride: a view with fewer pixels may have no features left."""


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


def predictor(scales: Sequence[float], flip: bool, mode: str) -> Predict:
    """What predicts with ``--test_scales``, ``--test_flip`` and ``--fusion_mode``: fused where there is more
    than the image itself."""
    return FusedPrediction(scales, flip, mode) if flip or list(scales) != [1.0] else class_scores


@torch.no_grad()
def predict_classes(
    model: nn.Module, image: Tensor, *, device: torch.device, precision: Precision, predict: Predict
) -> Tensor:
    """Predict one picture of any size.

    Args:
        model: in evaluation mode.
        image: 3×H×W, uint8.
        device, precision: of the model.
        predict: maps (model, images) to scores; see ``predictor``.

    Returns:
        Network indices H×W, int64, on the CPU.
    """
    height, width = image.shape[-2:]
    smallest = MIN_SIDE / min(getattr(predict, "scales", [1.0]))
    missing = [max(0, math.ceil(smallest) - side) for side in (height, width)]
    images = to_device(image[None], device)
    if any(missing):
        images = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
    with precision.network():
        scores = predict(model, images)
    return scores[0, :, :height, :width].argmax(dim=0).cpu()
