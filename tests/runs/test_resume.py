from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runs.resume import Progress, differences, is_trained, restarted, rng_of_rank
from utils.distributed import AllReducedFlag, as_fault, shared_errors
from utils.errors import Fault, UserError
from utils.files import FolderLock
from utils.randomness import rng_state, set_rng_state
from utils.signals import StopRequest


def checkpoint(**changes: object) -> dict[str, object]:
    content = {"epoch": 2, "batch": 5, "batches_per_epoch": 9, "best_score": 0.5, "unreadable": ["b", "a"]}
    options = {"momentum": 0.9, "logdir": "a", "num_workers": 1}
    return {**content, "manifest": {"options": options}, "facts": {"--lr": 0.1, "previous": "f00"}, **changes}


def test_progress_comes_back_from_its_state() -> None:
    progress = Progress.of(checkpoint(), 9)
    assert progress == Progress(2, 5, 0.5, {"a", "b"})
    assert Progress.of(progress.state(), 9) == progress
    assert Progress.of({"epoch": 2}, 9) == Progress(2, 9)  # of a release: at the end of its epoch


@pytest.mark.parametrize(
    ("changes", "epochs", "expected"),
    [
        *(({}, 3, False), ({"batch": 9}, 3, True), ({"batch": 9}, 4, False), ({"batch": None}, 3, True)),
        ({"batch": 9, "best": None}, 3, False),  # --keep best has not chosen
        ({"batch": 9, "ended": False}, 3, False),  # before end_step
        ({"batch": 9, "ended": True}, 3, True),
    ],
)
def test_is_trained(changes: dict[str, object], epochs: int, expected: bool) -> None:
    assert is_trained(checkpoint(**changes), epochs) is expected


def test_differences_name_what_matters() -> None:
    options = {"momentum": 0.5, "logdir": "b", "num_workers": 4, "new_option": 1}
    facts = {"--lr": 0.2, "previous": None, "new fact": 3}
    assert differences(checkpoint(), options, facts) == ["--momentum 0.9, now 0.5", "--lr 0.1, now 0.2"]
    assert differences(checkpoint(), {"momentum": 0.9}, {"--lr": 0.1, "previous": "f00"}) == []
    shown = checkpoint(manifest={"options": {"val_interval": 1, "keep": "best"}})
    assert differences(shown, {"val_interval": 2, "keep": "best"}, {}) == ["--val_interval 1, now 2"]
    assert differences(shown, {"val_interval": 2, "keep": "last"}, {}) == ["--keep best, now last"]
    assert differences({"epoch": 3}, options, facts) == []  # a released checkpoint says nothing


def test_a_flag_that_switches_off_is_named_as_it_is_typed() -> None:
    saved = {"manifest": {"options": {"keep": "best", "crop_val": True}}}
    assert differences(saved, {"keep": "best", "crop_val": False}, {}) == ["--whole_val False, now True"]
    assert differences(saved, {"keep": "last", "crop_val": False}, {}) == ["--keep best, now last"]


def test_restarted_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert restarted()


def test_random_numbers_resume() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    torch.rand(3)
    state = rng_state(cpu)
    expected = torch.rand(5)
    torch.manual_seed(2)
    set_rng_state(state, cpu)
    assert torch.equal(torch.rand(5), expected)
    assert rng_of_rank({"rng_state": [state]}, 0) is state
    assert rng_of_rank({"rng_state": [state]}, 1) is None
    with pytest.raises(UserError, match="--fresh"):
        set_rng_state({"cpu": torch.zeros(3, dtype=torch.uint8)}, cpu)


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    reader, writer = os.pipe()
    child = os.fork()  # record locks are one process's own: only another process meets them
    if child == 0:
        try:
            FolderLock(tmp_path / "run")
            os.write(writer, b"no error")
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 1000).decode()
    assert f"another run uses this folder (process {os.getpid()} on" in text
    del lock
    FolderLock(tmp_path / "run")


def test_a_signal_leaves_a_note_and_a_second_ctrl_c_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = StopRequest().listen()
        assert not stop
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a background job's"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop and stop.signal == "SIGUSR1"
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop = StopRequest().listen()
        clock = iter([100.0, 100.1, 100.9, 103.0])
        monkeypatch.setattr("utils.signals.time", SimpleNamespace(monotonic=lambda: next(clock)))
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        thread = threading.Thread(target=StopRequest().listen)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_alone_flags_and_errors_are_ones_own() -> None:
    flag = AllReducedFlag()
    assert [flag.reduce(value) for value in (0, 2, 1)] == [0, 2, 1]
    with pytest.raises(UserError, match="mine"), shared_errors():
        raise UserError("mine")


def test_faults_of_other_processes_are_recognised() -> None:
    closed = "[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1"
    for text in (closed, "Application timeout caused pair closure"):  # the second in a later operation
        lost = as_fault(RuntimeError(text))
        assert lost is not None and "--timeout" in str(lost)
    own = Fault("a loss is not finite")
    assert as_fault(own) is own
    assert as_fault(RuntimeError("shapes differ")) is None


def test_full_memory_is_one_line_with_a_remedy():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    for error in (caught.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")):
        fault = str(as_fault(error))
        assert fault.startswith("out of memory (") and "--batch_size" in fault
        assert "\n" not in fault


def test_nccl_names_its_reason():
    text = "NCCL error in: x.cpp:1, unhandled system error\nLast error:\n  Duplicate GPU detected : rank 1"
    assert "; Duplicate GPU detected : rank 1" in str(as_fault(torch.distributed.DistBackendError(text)))
