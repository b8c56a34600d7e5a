import json
import math

import numpy as np
import pytest
import torch

from metrics.continual import summarise

NAMES = ["background", "cat", "dog", "sheep"]
# Rows are labels. Row sums 8, 4, 3, 4; column sums 8, 4, 3, 4; IoU = diagonal / (row + column - diagonal).
CONFUSION = torch.tensor([[6, 1, 0, 1], [1, 2, 1, 0], [1, 1, 1, 0], [0, 0, 1, 3]])
IOU = [6 / 10, 2 / 6, 1 / 5, 3 / 5]


def test_hand_worked_case_at_step_1():
    step_0 = {"class_iou": {"background": 0.9, "dog": 0.1}, "miou_all": 0.5}
    results = summarise(CONFUSION, NAMES, [3, 1], earlier={0: step_0})
    assert list(results.class_iou.values()) == pytest.approx(IOU)
    assert results.miou_all == pytest.approx(sum(IOU) / 4)
    assert results.miou_old == pytest.approx(sum(IOU[:3]) / 3)
    assert results.miou_old_no_background == pytest.approx(sum(IOU[1:3]) / 2)
    assert results.miou_new == results.miou_new_no_background == pytest.approx(0.6)
    old = sum(IOU[:3]) / 3
    assert results.harmonic_mean == pytest.approx(2 * old * 0.6 / (old + 0.6))
    assert (results.miou_first, results.miou_first_no_background) == (old, results.miou_old_no_background)
    assert (results.miou_later, results.harmonic_mean_first_later) == (
        results.miou_new,
        results.harmonic_mean,
    )
    assert results.average_miou_all == pytest.approx((0.5 + sum(IOU) / 4) / 2)
    assert results.pixel_accuracy == pytest.approx(12 / 19)
    assert results.mean_accuracy == pytest.approx((6 / 8 + 2 / 4 + 1 / 3 + 3 / 4) / 4)
    assert results.forgetting == pytest.approx({"background": 0.3, "dog": -0.1})
    assert results.mean_forgetting == pytest.approx(0.1)
    assert results.class_pixels == {"background": 8, "cat": 4, "dog": 3, "sheep": 4}


def test_later_are_all_classes_after_step_0_and_new_those_of_this_step():
    earlier = {
        0: {"class_iou": {"cat": 0.4}, "miou_all": 0.5},
        1: {"class_iou": {"dog": 0.3}, "miou_all": 0.4},
    }
    results = summarise(CONFUSION, NAMES, [2, 1, 1], earlier=earlier)
    assert results.miou_first == pytest.approx((IOU[0] + IOU[1]) / 2)
    assert results.miou_first_no_background == pytest.approx(IOU[1])
    assert results.miou_later == pytest.approx((IOU[2] + IOU[3]) / 2)
    assert (results.miou_new, results.old_classes) == (pytest.approx(IOU[3]), 3)
    first, later = results.miou_first, results.miou_later
    assert results.harmonic_mean_first_later == pytest.approx(2 * first * later / (first + later))
    assert results.average_miou_all == pytest.approx((0.5 + 0.4 + sum(IOU) / 4) / 3)
    assert results.forgetting == pytest.approx({"cat": 0.4 - IOU[1], "dog": 0.3 - IOU[2]})
    del earlier[1]
    assert math.isnan(summarise(CONFUSION, NAMES, [2, 1, 1], earlier=earlier).average_miou_all)


def test_step_0_has_no_old_classes_and_the_background_is_new():
    results = summarise(CONFUSION, NAMES)
    assert math.isnan(results.miou_old)
    assert math.isnan(results.harmonic_mean)
    assert math.isnan(results.mean_forgetting)
    assert results.miou_new == results.miou_all == pytest.approx(sum(IOU) / 4)
    assert results.miou_new_no_background == pytest.approx(sum(IOU[1:]) / 3)
    assert results.forgetting == {}


def test_only_a_class_absent_from_labels_and_predictions_is_left_out():
    confusion = np.array([[4, 0, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    results = summarise(confusion, NAMES, [2, 2])
    assert results.class_iou["dog"] == 0  # predicted, never labelled
    assert math.isnan(results.class_iou["sheep"])
    assert results.miou_all == pytest.approx((1 + 0.5 + 0) / 3)
    assert results.miou_new == 0
    assert results.harmonic_mean == 0
    assert results.mean_accuracy == pytest.approx((1 + 0.5) / 2)


def test_ignored_class_is_void_and_in_no_mean():
    results = summarise(CONFUSION, NAMES, [3, 1], ignore=frozenset({0}))
    kept = CONFUSION.clone()
    kept[0] = 0
    # cat: 2/(4+3-2), dog: 1/(3+3-1), sheep: 3/(4+3-3); predictions of class 0 still miss their class.
    assert results.class_iou == pytest.approx({"cat": 2 / 5, "dog": 1 / 5, "sheep": 3 / 4})
    assert results.miou_old == results.miou_old_no_background == pytest.approx((2 / 5 + 1 / 5) / 2)
    assert results.pixel_accuracy == pytest.approx(6 / 11)
    assert "background" not in results.class_accuracy
    assert CONFUSION[0].sum() == 8, "the caller's matrix must not change"


def test_empty_evaluation_has_no_numbers():
    results = summarise(torch.zeros(4, 4, dtype=torch.long), NAMES, [2, 2])
    numbers = (results.miou_all, results.miou_old, results.miou_new, results.pixel_accuracy)
    assert all(math.isnan(number) for number in numbers)
    assert "NaN" not in json.dumps(results.to_json())


def test_json_keeps_every_digit_and_writes_null_for_nan():
    results = summarise(CONFUSION, NAMES)
    plain = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert plain["class_iou"] == results.class_iou
    assert plain["miou_old"] is None
    assert plain["miou_all"] == results.miou_all


def test_table_shows_percent_and_names():
    table = summarise(
        CONFUSION, NAMES, [3, 1], earlier={0: {"class_iou": {"cat": 0.5}, "miou_all": 0.5}}
    ).table()
    cat = next(line for line in table.splitlines() if " cat " in line)
    assert cat.split() == ["old", "cat", "33.33", "50.00", "16.67", "4"]
    sheep = next(line for line in table.splitlines() if " sheep " in line)
    assert sheep.split() == ["new", "sheep", "60.00", "75.00", "–", "4"]
    assert any("mIoU all" in line and line.split()[-1] == "43.33" for line in table.splitlines())
    assert all(f"mIoU {group} (" in table for group in ("first", "later", "old", "new"))
    assert not any(
        f"mIoU {group} (" in summarise(CONFUSION, NAMES).table() for group in ("later", "old", "new")
    )


def test_csv_row_is_the_published_one():
    results = summarise(CONFUSION, NAMES, [3, 1], ignore=frozenset({0}))
    row = results.csv_row(step=1, num_classes=6)
    iou = [str(value) for value in results.class_iou.values()]
    assert row == ["1", "X", *iou, "x", "x", str(results.miou_all)]


@pytest.mark.parametrize(
    ("confusion", "names"), [(CONFUSION, NAMES[:3]), (CONFUSION, ["background", "cat", "cat", "sheep"])]
)
def test_names_must_fit(confusion, names):
    with pytest.raises(ValueError, match="class names"):
        summarise(confusion, names)
