from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from metrics.continual import summarise
from metrics.stream_metrics import StreamSegMetrics
from utils.errors import UserError

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("stream_metrics-*.npz"))


def random_batch(classes, void=0.2, shape=(3, 17, 13), seed=0):
    generator = torch.Generator().manual_seed(seed)
    preds = torch.randint(classes, shape, generator=generator)
    targets = torch.randint(classes, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < void] = 255
    return preds, targets


def names(count):
    return [f"class {index}" for index in range(count)]


def test_golden_files_are_there():
    assert len(GOLDEN) == 2


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_released_numbers(path):
    with np.load(path, allow_pickle=False) as golden:
        data = {key: golden[key] for key in golden}
    classes = len(data["class_iou"])
    metrics = StreamSegMetrics(classes)
    metrics.update(torch.from_numpy(data["predictions"]), torch.from_numpy(data["labels"]))
    results = summarise(metrics.confusion_matrix, names(classes))
    np.testing.assert_array_equal(metrics.confusion_matrix.numpy(), data["confusion"])
    assert results.pixel_accuracy == pytest.approx(data["overall_acc"], rel=1e-6)
    assert results.mean_accuracy == pytest.approx(data["mean_acc"], rel=1e-6)
    iou, accuracy = (np.array(list(d.values())) for d in (results.class_iou, results.class_accuracy))
    labelled = np.array(list(results.class_pixels.values())) > 0
    np.testing.assert_array_equal(labelled, data["class_iou"] >= 0)
    np.testing.assert_allclose(iou[labelled], data["class_iou"][labelled], rtol=1e-6)
    np.testing.assert_allclose(accuracy[labelled], data["class_acc"][labelled], rtol=1e-6)
    # The released mean leaves out classes without labels. Ours leaves out those without labels and
    # predictions: here the last class is predicted but never labelled, and counts with IoU 0.
    assert iou[labelled].mean() == pytest.approx(data["mean_iou"], rel=1e-6)
    assert results.miou_all == pytest.approx(data["mean_iou"] * labelled.sum() / classes, rel=1e-6)


@given(classes=st.integers(2, 40), void=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_equals_sklearn(classes, void, seed):
    preds, targets = random_batch(classes, void, seed=seed)
    metrics = StreamSegMetrics(classes)
    metrics.update(preds[:1], targets[:1].to(torch.uint8))
    metrics.update(preds[1:].to(torch.uint8), targets[1:])
    kept = targets != 255
    if kept.any():
        expected = confusion_matrix(targets[kept], preds[kept], labels=range(classes))
        iou = jaccard_score(targets[kept], preds[kept], labels=range(classes), average=None, zero_division=0)
        iou[expected.sum(axis=0) + expected.sum(axis=1) == 0] = np.nan
        results = summarise(metrics.confusion_matrix, names(classes))
        np.testing.assert_allclose(list(results.class_iou.values()), iou, rtol=1e-12)
        assert results.miou_all == pytest.approx(np.nanmean(iou), rel=1e-12)
    else:
        expected = np.zeros((classes, classes))
    np.testing.assert_array_equal(metrics.confusion_matrix.numpy(), expected)


def test_counts_stay_exact_where_float32_would_not():
    metrics = StreamSegMetrics(2)
    metrics.counts[0] = 2**40
    metrics.update(torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long))
    assert metrics.confusion_matrix[0, 0].item() == 2**40 + 1


def test_255_is_void_even_with_more_than_255_classes_below_it():
    metrics = StreamSegMetrics(255)
    metrics.update(torch.full((1, 2, 2), 254), torch.tensor([[[254, 255], [255, 255]]], dtype=torch.uint8))
    assert metrics.confusion_matrix.sum() == 1
    assert metrics.confusion_matrix[254, 254] == 1


@pytest.mark.parametrize("label", [3, 254, -1])
def test_stray_labels_are_reported_not_counted(label):
    metrics = StreamSegMetrics(3)
    metrics.update(torch.zeros(1, 1, 2, dtype=torch.long), torch.tensor([[[0, label]]]))
    with pytest.raises(UserError, match=r"1 pixels .* outside 0 to 2"):
        _ = metrics.confusion_matrix


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        StreamSegMetrics(3).update(torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 1).long())


def test_reset_and_synchronise_alone():
    preds, targets = random_batch(5)
    metrics = StreamSegMetrics(5)
    metrics.update(preds, targets)
    metrics.synchronise()
    metrics.synchronise()
    first = metrics.confusion_matrix.clone()
    metrics.reset()
    assert metrics.confusion_matrix.sum() == 0
    metrics.update(preds, targets)
    torch.testing.assert_close(metrics.confusion_matrix, first)


def test_deterministic_mode_gives_the_same_counts():
    preds, targets = random_batch(21)
    counts = []
    try:
        for on in (False, True):
            torch.use_deterministic_algorithms(on)
            metrics = StreamSegMetrics(21)
            metrics.update(preds, targets)
            counts.append(metrics.confusion_matrix)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*counts)


@pytest.mark.cuda
def test_cuda_counts_without_waiting():
    preds, targets = random_batch(21)
    expected = StreamSegMetrics(21)
    expected.update(preds, targets)
    metrics = StreamSegMetrics(21, torch.device("cuda", 0))
    preds, targets = preds.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(preds, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(metrics.confusion_matrix, expected.confusion_matrix)
