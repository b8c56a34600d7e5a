import errno
import logging
import math
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard_events import events, values
from tensorboardX.proto.event_pb2 import SessionLog

from metrics.continual import summarise
from runs.history import Entry
from session.tensorboard import RunLogger
from utils.distributed import World
from utils.errors import UserError
from utils.logger import progress, setup_logging
from utils.visualize import confusion_image

MAIN = World(0, 0, 2, torch.device("cpu"), None)
OTHER = World(1, 1, 2, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def plain_logging():
    root = logging.getLogger()
    level = root.level
    # Another test may have left `logging` sure that it captures what pytest has put back since.
    logging.captureWarnings(False)
    yield
    setup_logging(MAIN, None)
    for handler in [h for h in root.handlers if (h.get_name() or "").startswith("run.")]:
        root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def test_rank_0_writes_to_stdout_and_appends_to_the_file(tmp_path, capsys):
    for word in ("first", "second"):
        setup_logging(MAIN, tmp_path / "run" / "train.log")
        log = logging.getLogger("dataset.voc")
        log.info("%s line", word)
        log.debug("hidden")
    captured = capsys.readouterr()
    assert [line.split(" ", 1)[1] for line in captured.out.splitlines()] == ["first line", "second line"]
    text = (tmp_path / "run" / "train.log").read_text()
    assert [line.split("INFO ")[1] for line in text.splitlines()] == [
        "dataset.voc: first line",
        "dataset.voc: second line",
    ]


def test_debug_lines_and_warnings(tmp_path, capsys):
    setup_logging(MAIN, tmp_path / "train.log", debug=True)
    logging.getLogger("train").debug("shown")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    assert "shown" in capsys.readouterr().out
    assert "careful" in (tmp_path / "train.log").read_text()


def test_other_ranks_only_warn_on_stderr(tmp_path, capsys):
    setup_logging(OTHER, tmp_path / "run" / "train.log")
    logging.getLogger("train").info("hidden")
    logging.getLogger("train").warning("seen")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rank 1 WARNING: seen" in captured.err
    assert "hidden" not in captured.err
    assert not (tmp_path / "run").exists()


def test_log_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.log: cannot be written .*--logdir"):
        setup_logging(MAIN, tmp_path / "file" / "train.log")
    with pytest.raises(UserError, match="cannot be written"):
        RunLogger(MAIN, tmp_path / "file" / "step_0")


def test_tensorboard_events(tmp_path):
    board = RunLogger(MAIN, tmp_path)
    board.scalars({"lr": 0.5, "nothing": math.nan}, 3)
    board.scalars({"loss/ce": 1.0, "loss/kd": 2.0}, 4)
    board.options({"a": "text"})
    board.image("picture", np.zeros((4, 6, 3), dtype=np.uint8), 5)
    board.close()
    board.close()
    found = list(values(tmp_path))
    scalars = {
        (step, value.tag): value.simple_value for step, value in found if value.HasField("simple_value")
    }
    assert scalars == {(3, "lr"): 0.5, (4, "loss/ce"): 1.0, (4, "loss/kd"): 2.0}
    (image,) = [value.image for _, value in found if value.HasField("image")]
    assert (image.height, image.width) == (4, 6)
    assert any(value.tag.startswith("options") for _, value in found)


def test_full_shared_memory_is_not_reported_as_a_full_disk(tmp_path, monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("session.tensorboard.SummaryWriter", no_room)
    for free, remedy in ((0, r"/dev/shm \(Docker: --shm-size"), (1 << 30, "choose another --logdir")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError, match=rf"No space left on device\); .*{remedy}"):
            RunLogger(MAIN, tmp_path)


def test_course_options_and_results_in_tensorboard(tmp_path):
    board = RunLogger(MAIN, tmp_path)
    board.progress(Entry(10, 1, 5.0, 16.0, 0.1, None, {"ce": 1.0, "kd": 2.0}))
    board.options({"method": "MIB", "lr": [0.1]})
    confusion, names = np.array([[6, 2], [0, 8]]), ["background", "cat"]
    step_0 = {"class_iou": {}, "miou_all": 0.5}
    picture = confusion_image(confusion, names)
    board.results(summarise(confusion, names, [1, 1], earlier={0: step_0}), 3, picture)
    board.close()
    found = list(values(tmp_path))
    scalars = {(step, v.tag): v.simple_value for step, v in found if v.HasField("simple_value")}
    assert scalars.keys() == {
        *((10, tag) for tag in ("loss/ce", "loss/kd", "lr", "images_per_second")),
        *((3, f"miou/{name}") for name in ("old", "new", "all", "harmonic", "first", "later")),
        *((3, f"miou/{name}") for name in ("harmonic_first_later", "average")),
        *((3, f"iou/{name}") for name in ("background", "cat")),
    }
    assert scalars[3, "iou/cat"] == pytest.approx(0.8)
    assert [(v.tag, v.image.width) for _, v in found if v.HasField("image")] == [
        ("confusion", picture.shape[1])
    ]
    texts = {v.tag: v.tensor.string_val[0].decode() for _, v in found if v.tensor.string_val}
    assert "| method | MIB |" in next(text for tag, text in texts.items() if tag.startswith("options"))
    assert "| mIoU all |" in next(text for tag, text in texts.items() if tag.startswith("results"))


def test_a_curve_that_begins_again_hides_what_stood_there(tmp_path):
    for purge_step in (0, 3):
        board = RunLogger(MAIN, tmp_path, purge_step=purge_step)
        board.scalars({"lr": 0.5}, 4)
        board.close()
    begun = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert begun == [0, 3]


@pytest.mark.parametrize(("world", "enabled"), [(OTHER, True), (MAIN, False)])
def test_tensorboard_elsewhere_or_off_does_nothing(tmp_path, world, enabled):
    board = RunLogger(world, tmp_path / "run", enabled=enabled)
    board.scalars({"lr": 0.5}, 1)
    board.results(summarise(np.eye(2), ["a", "b"]), 1, np.zeros((2, 2, 3), np.uint8))
    board.options({"a": "b"})
    board.image("a", None, 1)
    board.close()
    assert not (tmp_path / "run").exists()


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    setup_logging(MAIN, None)
    items = list(progress(range(7), total=7, desc="epoch 1", world=MAIN, interval=3))
    assert items == list(range(7))
    captured = capsys.readouterr()
    shown = [line.split(" ", 1)[1].split(" (")[0] for line in captured.out.splitlines()]
    assert shown == ["epoch 1: 3/7", "epoch 1: 6/7", "epoch 1: 7/7"]
    assert captured.out.rstrip().endswith("0:00 left)")
    assert captured.err == ""


def test_progress_draws_a_bar_on_a_terminal(capsys, monkeypatch):
    setup_logging(MAIN, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(3), total=3, desc="epoch 1", world=MAIN, interval=1)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 1" in captured.err


def test_progress_is_silent_on_other_ranks(capsys):
    setup_logging(OTHER, None)
    assert list(progress(iter("ab"), total=2, desc="x", world=OTHER, interval=1)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
