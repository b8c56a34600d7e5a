"""Results of a step on the disk: JSON, the published CSV file, the confusion matrix."""

import csv
import json
import math

import pytest
import torch

from metrics.continual import summarise
from runs.results import read_confusion, read_step_results, write_confusion, write_results
from utils.errors import UserError

NAMES = ["background", "cat", "dog", "sheep"]
CONFUSION = torch.tensor([[6, 1, 0, 1], [1, 2, 1, 0], [1, 1, 1, 0], [0, 0, 1, 3]])


def test_written_files(tmp_path):
    first = summarise(CONFUSION[:3, :3], NAMES[:3])
    second = summarise(CONFUSION, NAMES, [3, 1])
    common = {"num_classes": 4, "csv_name": "2026-01-01_voc_15-5_FT.csv"}
    write_results(tmp_path / "run", second, step=1, **common)
    json_path, csv_path = write_results(tmp_path / "run", second, step=0, **common)
    assert json_path.name == "results_0.json"
    write_results(tmp_path / "run", first, step=0, **common)  # runs again: replaces
    rows = list(csv.reader(csv_path.read_text().splitlines()))
    assert rows == [first.csv_row(0, 4), second.csv_row(1, 4)]
    assert json.loads(json_path.read_text())["class_iou"] == first.class_iou
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "2026-01-01_voc_15-5_FT.csv",
        "results_0.json",
        "results_1.json",
    ]


def test_results_are_read_as_written(tmp_path):
    for step, counts in enumerate((CONFUSION, torch.zeros_like(CONFUSION))):  # the second: undefined
        results = summarise(counts, NAMES, [3, 1], earlier={0: {"class_iou": {"cat": 0.0}, "miou_all": 0.5}})
        write_results(tmp_path, results, step=step, num_classes=4, csv_name="iou.csv", evaluation={"a": 1})
        found = read_step_results(tmp_path, step)
        assert found == {"step": step, **results.to_json(), "evaluation": {"a": 1}}
    assert found["miou_all"] is None and read_step_results(tmp_path, 2) is None
    early = {name: found[name] for name in ("step", "class_iou", "indices", "miou_old", "miou_new")}
    (tmp_path / "results_1.json").write_text(json.dumps(early))
    assert read_step_results(tmp_path, 1) == early


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 7}, "its step is 7, not 1"),
        ({"class_iou": [1, 2]}, "class_iou is [1, 2], not a number per class"),
        ({"class_iou": {"cat": "x"}}, 'class_iou of cat is "x", not a number of at least 0 and at most 1'),
        ({"class_iou": {"cat": 0.5}}, "class_iou and indices name different classes"),
        ({"class_iou": None}, "class_iou is null"),
        ({"indices": ["a"]}, 'indices is ["a"], not a number per class'),
        ({"indices": {"cat": 0.5}}, "indices of cat is 0.5, not a whole number"),
        ({"old_classes": "5"}, 'old_classes is "5", not a whole number'),
        ({"miou_all": "high"}, 'miou_all is "high", not a number'),
        ({"miou_all": -3}, "miou_all is -3, not a number"),
        ({"miou_new": math.nan}, "miou_new is NaN, not a number"),
        ({"pixel_accuracy": True}, "pixel_accuracy is true, not a number"),
        ({"mean_forgetting": -1.5}, "mean_forgetting is -1.5, not a number of at least -1 and at most 1"),
        ({"evaluation": "x"}, "evaluation is not options and values"),
    ],
)
def test_edited_results_are_refused(tmp_path, change, said):
    results = summarise(CONFUSION, NAMES, [3, 1])
    (path, _) = write_results(tmp_path, results, step=1, num_classes=4, csv_name="iou.csv")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        read_step_results(tmp_path, 1)
    assert str(caught.value).startswith(f"{path}: is not a results file ({said}")
    assert str(caught.value).endswith("); remove it, or test the step again")


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "Expecting value"), ("[]", "no names and values"), ('{"step": 1}', "it has no class_iou")],
)
def test_other_files_are_no_results(tmp_path, text, said):
    (tmp_path / "results_1.json").write_text(text)
    with pytest.raises(UserError, match=rf"results_1\.json: is not a results file \(.*{said}"):
        read_step_results(tmp_path, 1)


@pytest.mark.parametrize("content", [b"class,iou\n", b"\xff\xfe", b"\n\n"])
def test_foreign_csv_file_is_not_overwritten(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"results\.csv.*move it away"):
        write_results(tmp_path, summarise(CONFUSION, NAMES), step=0, num_classes=4, csv_name=path.name)
    assert path.read_bytes() == content


def test_confusion_matrix_is_written_beside_and_read(tmp_path):
    confusion, names = torch.tensor([[6, 2], [0, 8]]), ["background", "cat, or dog"]
    written = write_confusion(tmp_path, 0, confusion, names)
    assert written == tmp_path / "confusion_0.csv"
    counts, read = read_confusion(written)
    assert counts.tolist() == confusion.tolist() and read == names
    for broken in ("", "x,a,b\na,1,2\n", "x,a\na,z\n"):
        written.write_text(broken)
        with pytest.raises(UserError, match=r"confusion_0\.csv: "):
            read_confusion(written)
    with pytest.raises(ValueError, match="1 class names"):
        write_confusion(tmp_path, 0, confusion, ["a"])
