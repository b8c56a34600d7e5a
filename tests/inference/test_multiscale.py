"""Prediction of images of any size, in evaluation and ``--predict``."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from argparser import parse_options
from dataset.transforms import RandomCropFlip, ResizeCenterCrop, normalize
from inference.multiscale import MIN_SIDE, FusedPrediction, PaddedPrediction, predict_classes, predictor
from metrics.stream_metrics import StreamSegMetrics
from modules import NetworkSpec
from segmentation_module import IncrementalSegmentationModule, make_model
from train import Precision, class_scores, evaluate

CPU = torch.device("cpu")
CASES = [((1.0,), False), ((0.25, 1.0), True)]


@pytest.fixture(scope="module", params=["deeplab", "segformer_b0"])
def model(request: pytest.FixtureRequest) -> IncrementalSegmentationModule:
    words = ["--backbone", "mobilenet_v2", "--no_pretrained", "--model", request.param]
    torch.manual_seed(0)
    return make_model(NetworkSpec.of(parse_options(words)), [3]).eval()


@given(height=st.integers(1, 40), width=st.integers(1, 40), case=st.sampled_from(CASES))
@example(1, 1, CASES[1])
@example(1, 40, CASES[1])
@example(40, 1, CASES[1])
@settings(max_examples=25, deadline=None)
def test_evaluation_sees_what_predict_writes(
    model: IncrementalSegmentationModule, height: int, width: int, case: tuple[tuple[float, ...], bool]
) -> None:
    image = torch.randint(0, 256, (3, height, width), generator=torch.manual_seed(height), dtype=torch.uint8)
    common: dict[str, Any] = {"device": CPU, "precision": Precision("O0", CPU)}
    predict = predictor(*case, "mean")
    written = predict_classes(model, image, predict=predict, **common)
    assert written.shape == (height, width)
    # The labels are what --predict writes: the evaluation finds all of them.
    loader = [(image[None], written[None])]
    matrix = evaluate(model, loader, StreamSegMetrics(3, CPU), predict=predict, **common).confusion_matrix
    assert matrix.diagonal().sum() == matrix.sum() == height * width


@given(scale=st.floats(0.01, 4))
def test_no_view_is_smaller_than_the_networks_stride(scale: float) -> None:
    least = PaddedPrediction(class_scores, [1.0, scale]).least
    assert math.floor(least * min(scale, 1.0)) >= MIN_SIDE
    assert math.floor((least - 1) * min(scale, 1.0)) < MIN_SIDE


def test_images_that_are_large_enough_are_not_padded(model: IncrementalSegmentationModule) -> None:
    images = normalize(torch.randint(0, 256, (2, 3, 128, 131), dtype=torch.uint8))
    with torch.no_grad():
        assert torch.equal(predictor([1.0], False, "mean")(model, images), class_scores(model, images))
        fused = FusedPrediction([0.25, 1.5], True, "max")
        assert torch.equal(predictor([0.25, 1.5], True, "max")(model, images), fused(model, images))


def test_padding_repeats_the_border() -> None:
    class Knows(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
            self.seen = images
            return images, {}

    images, network = torch.rand(1, 3, 5, 40), Knows()
    scores = predictor([1.0], False, "mean")(network, images)
    assert torch.equal(scores, images)
    assert torch.equal(network.seen, F.pad(images, (0, 0, 0, 27), mode="replicate"))


def test_training_and_validation_crop_images_of_every_shape() -> None:
    small = itertools.product((1, 2, 7, 31, 32, 33, 40), repeat=2)
    for height, width in [*small, (1, 20000), (20000, 1), (2, 33), (100000, 3)]:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        for crop in (RandomCropFlip(64), ResizeCenterCrop(64)):
            cropped, mask = crop(image, image[:1])
            assert cropped.shape == (3, 64, 64) and mask.shape == (1, 64, 64)


def test_the_middle_of_a_long_image_equals_that_of_the_whole() -> None:
    row = (torch.arange(3 * 20 * 4) % 251).to(torch.uint8).reshape(3, 1, 80).repeat_interleave(4, 1)
    long = torch.cat([row[..., :1].expand(-1, -1, 40), row, row[..., -1:].expand(-1, -1, 40)], dim=-1)
    assert long.shape == (3, 4, 160)  # 40 times as long as wide
    whole, _ = ResizeCenterCrop(32)(row[..., 8:72], row[:1, :, 8:72])
    middle, _ = ResizeCenterCrop(32)(long, long[:1])
    assert torch.equal(whole, middle)
