"""Prediction of images of any size, with fusion of several scales and mirrored views."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import Precision, Predict, class_scores, to_device

MIN_SIDE = 32
"""Least side of a network's input in pixels (the largest stride)."""


class FusedPrediction:
    """Scores from several scaled and mirrored views of an image.

    Args:
        scales: factors on the image's height and width.
        flip: also predict the mirrored image at every scale.
        mode: "mean" averages the probabilities, "max" takes the maximum, "voting" counts predictions.
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
                if fused is None:
                    fused = view
                else:
                    fused = torch.maximum(fused, view) if self.mode == "max" else fused + view
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


class PaddedPrediction:
    """Scores of images of any size: images too small for a network are padded by their border pixels.

    Args:
        predict: predicts the padded images.
        scales: of its views; images are padded so that the smallest view has ``MIN_SIDE`` pixels per side.
    """

    def __init__(self, predict: Predict, scales: Sequence[float] = (1.0,)) -> None:
        self.predict = predict
        self.least = _least_side(min(scales))

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Scores B×C×H×W of normalised images B×3×H×W."""
        height, width = images.shape[-2:]
        scores = self.predict(model, pad_to(images, self.least))
        return scores[..., :height, :width]


def pad_to(images: Tensor, least: int = MIN_SIDE) -> Tensor:
    """Pad images B×3×H×W at the right and bottom with border pixels to at least ``least`` pixels per side."""
    missing = [max(0, least - side) for side in images.shape[-2:]]
    return F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else images


def _least_side(scale: float) -> int:
    """Smallest side that has ``MIN_SIDE`` pixels after scaling (``F.interpolate`` rounds down)."""
    least = math.ceil(MIN_SIDE / scale)
    return least if math.floor(least * scale) >= MIN_SIDE else least + 1


def predictor(scales: Sequence[float], flip: bool, mode: str) -> Predict:
    """The prediction function for ``--test_scales``, ``--test_flip`` and ``--fusion_mode``."""
    if not flip and list(scales) == [1.0]:
        return PaddedPrediction(class_scores)
    return PaddedPrediction(FusedPrediction(scales, flip, mode), scales)


@torch.no_grad()
def predict_classes(
    model: nn.Module, image: Tensor, *, device: torch.device, precision: Precision, predict: Predict
) -> Tensor:
    """Predict one image of any size.

    Args:
        model: in evaluation mode.
        image: 3×H×W, uint8.
        device, precision: of the model.
        predict: maps (model, images) to scores; see ``predictor``.

    Returns:
        Network indices H×W, int64, on the CPU.
    """
    with precision.network():
        scores = predict(model, to_device(image[None], device))
    return scores[0].argmax(dim=0).cpu()
