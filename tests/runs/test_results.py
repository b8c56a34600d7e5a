"""Results of a step on the disk: JSON, the published CSV file, the confusion matrix."""

import csv
import json

import pytest
import torch

from metrics.continual import summarise
from runs.results import read_confusion, write_confusion, write_results
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
