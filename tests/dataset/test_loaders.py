import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import BOUND
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dataset import open_dataset
from dataset.incremental import Entry, IncrementalDataset, SampleKey, train_lookup
from dataset.loaders import (
    ONE_PROCESS,
    EpochSampler,
    EvalBatchSampler,
    Loader,
    MemoryMixSampler,
    MemoryOverwriteSampler,
    Workers,
    choose_samples,
    cross_val_split,
    make_eval_loader,
    make_train_loader,
)
from dataset.transforms import eval_transform, train_transform
from tasks import get_task
from utils.distributed import World
from utils.errors import DataError, Fault, UserError

ROOT = Path(__file__).resolve().parents[2]


def batches(sampler: EpochSampler) -> list[list[SampleKey]]:
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return [keys[i : i + sampler.batch_size] for i in range(0, len(keys), sampler.batch_size)]


def keys_of(batch: list[SampleKey]) -> set[tuple[int, int]]:
    return {(key.index, key.position) for key in batch}


@given(st.integers(8, 60), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_batches_do_not_depend_on_the_number_of_processes(
    samples: int, per_rank: int, ranks: int, epoch: int
) -> None:
    total = per_rank * ranks
    if samples < total:
        return
    alone = EpochSampler(samples, batch_size=total, seed=3)
    parts = [
        EpochSampler(samples, batch_size=per_rank, seed=3, rank=r, world_size=ranks) for r in range(ranks)
    ]
    for sampler in (alone, *parts):
        sampler.set_epoch(epoch)
    whole, *_ = joined = [batches(sampler) for sampler in (alone, *parts)]
    assert len(whole) == samples // total == alone.batches_per_epoch == parts[0].batches_per_epoch
    for number, batch in enumerate(whole):
        union = [key for part in joined[1:] for key in part[number]]
        assert len(union) == total and keys_of(union) == keys_of(batch)
    indices = [key.index for batch in whole for key in batch]
    assert len(set(indices)) == len(indices)


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(30, batch_size=5, seed=seed)
        sampler.set_epoch(epoch)
        return [key.index for key in sampler]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    assert sorted(order(1, 4)) == list(range(30))
    plain = EpochSampler(7, batch_size=3, shuffle=False)
    assert [key.index for key in plain] == list(range(6))


@pytest.mark.parametrize("rank", [0, 1])
def test_resume_in_the_middle_of_an_epoch(rank: int) -> None:
    whole = EpochSampler(31, batch_size=3, seed=1, rank=rank, world_size=2)
    whole.set_epoch(2)
    resumed = EpochSampler(31, batch_size=3, seed=1, rank=rank, world_size=2)
    resumed.set_epoch(2, start_batch=3)
    assert batches(resumed) == batches(whole)[3:]
    resumed.set_epoch(3)
    assert len(batches(resumed)) == resumed.batches_per_epoch == 5


def test_too_few_images() -> None:
    with pytest.raises(
        UserError, match=r"7 training images .* one batch of 4 on 2 process.*--batch_size 3 or less"
    ):
        EpochSampler(7, batch_size=4, world_size=2)
    with pytest.raises(UserError, match="use fewer processes"):
        EpochSampler(1, batch_size=4, world_size=2)
    with pytest.raises(UserError, match="no training image"):
        EpochSampler(0, batch_size=1)
    assert len(EpochSampler(8, batch_size=4, world_size=2)) == 4


@pytest.mark.parametrize(
    ("samples", "memory", "per_rank", "ranks"), [(23, 5, 4, 2), (10, 40, 6, 1), (9, 3, 3, 1)]
)
def test_exemplars_fill_half_of_each_batch(samples: int, memory: int, per_rank: int, ranks: int) -> None:
    total = per_rank * ranks
    own_half = total - total // 2
    ranks_batches = []
    for rank in range(ranks):
        sampler = MemoryMixSampler(samples, memory, batch_size=per_rank, seed=2, rank=rank, world_size=ranks)
        sampler.set_epoch(1)
        ranks_batches.append(batches(sampler))
        for batch in ranks_batches[-1]:
            own = sum(key.index < samples for key in batch)
            assert own in (per_rank // 2, per_rank - per_rank // 2)
    joined = [[key for part in parts for key in part] for parts in zip(*ranks_batches, strict=True)]
    assert len(joined) == samples // own_half
    assert all(sum(key.index < samples for key in batch) == own_half for batch in joined)
    counts = Counter(key.index for batch in joined for key in batch)
    assert max(counts) < samples + memory
    assert all(counts[i] <= 1 for i in range(samples))
    shown = [counts[samples + i] for i in range(memory)]
    assert max(shown) - min(shown) <= 1  # the memory is gone through evenly

    alone = MemoryMixSampler(samples, memory, batch_size=total, seed=2)
    alone.set_epoch(1)
    assert [keys_of(batch) for batch in batches(alone)] == [keys_of(batch) for batch in joined]


@pytest.mark.parametrize(
    ("samples", "memory", "per_rank", "ranks"), [(23, 5, 4, 2), (40, 40, 6, 1), (60, 13, 5, 1), (9, 3, 3, 1)]
)
def test_released_exemplars_take_the_place_of_half_of_each_batch(
    samples: int, memory: int, per_rank: int, ranks: int
) -> None:
    """As many batches as without exemplars; the drawing is restated from what SSUL's program does."""
    total = per_rank * ranks
    parts, plain = [], EpochSampler(samples, batch_size=total, seed=2)
    for rank in range(ranks):
        sampler = MemoryOverwriteSampler(
            samples, memory, batch_size=per_rank, seed=2, rank=rank, world_size=ranks
        )
        sampler.set_epoch(1)
        parts.append(batches(sampler))
    plain.set_epoch(1)
    joined = [[0] * total for _ in parts[0]]
    for rank, own in enumerate(parts):
        for batch, keys in zip(joined, own, strict=True):
            batch[rank::ranks] = [key.index for key in keys]
    assert len(joined) == samples // total
    places = set()
    used: Counter[int] = Counter()
    for batch, before in zip(joined, batches(plain), strict=True):
        taken = [place for place, index in enumerate(batch) if index >= samples]
        assert len(taken) == total // 2, "half, rounded down"
        kept = [(batch[i], before[i].index) for i in range(total) if i not in taken]
        assert all(found == expected for found, expected in kept), "the others stay where they were"
        places.add(tuple(taken))
        used.update(batch[place] for place in taken)
    assert len(places) > 1 or len(joined) == 1
    assert all(samples <= index < samples + memory for index in used)
    repeated = memory
    while repeated < total:  # the released list, doubled until it fills a batch
        repeated *= 2
    passes = -(-len(joined) // (repeated // total))
    assert max(used.values()) <= passes * (repeated // memory)


def test_released_exemplars_are_all_used_in_time() -> None:
    used = set()
    for epoch in range(30):
        sampler = MemoryOverwriteSampler(50, 7, batch_size=6, seed=3)
        sampler.set_epoch(epoch)
        used |= {key.index - 50 for key in sampler if key.index >= 50}
    assert used == set(range(7))


def test_exemplars_need_two_places_in_a_batch() -> None:
    for kind in (MemoryMixSampler, MemoryOverwriteSampler):
        with pytest.raises(UserError, match="--batch_size 1 leaves no place for exemplars"):
            kind(10, 5, batch_size=1)
    with pytest.raises(UserError, match=r"2 training images.*--batch_size 2 or less"):
        MemoryMixSampler(2, 5, batch_size=4, world_size=2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [0, 1, 7, 16])
def test_evaluation_takes_every_image_once(samples: int, ranks: int) -> None:
    samplers = [EvalBatchSampler(samples, 3, rank=r, world_size=ranks) for r in range(ranks)]
    parts = [list(sampler) for sampler in samplers]
    assert sorted(key.index for part in parts for batch in part for key in batch) == list(range(samples))
    assert [len(sampler) for sampler in samplers] == [len(part) for part in parts]


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_batches_are_the_same_on_any_number_of_ranks(ranks: int) -> None:
    alone = list(EvalBatchSampler(17, 4))
    together = [batch for r in range(ranks) for batch in EvalBatchSampler(17, 4, rank=r, world_size=ranks)]
    assert sorted(together, key=lambda batch: batch[0].index) == alone


def make(root: Path, *, train: bool = True) -> IncrementalDataset:
    source = open_dataset("shapes", root, "train")
    transform = train_transform(32) if train else eval_transform(32)
    entries = [Entry(i) for i in range(len(source))]
    return IncrementalDataset(
        source, entries, [train_lookup(get_task("shapes", "15-5"), 0)], transform, seed=4
    )


def epoch_of(
    dataset: IncrementalDataset, epoch: int, *, workers: int, start_batch: int = 0, **kwargs: int
) -> list[tuple[Tensor, Tensor]]:
    with Workers([dataset], num_workers=workers) as reading:
        loader = make_train_loader(dataset, workers=reading, **{"batch_size": 8, "seed": 4} | kwargs)
        loader.sampler.set_epoch(epoch, start_batch)
        return list(loader)


def training(root: Path, num_workers: int) -> Loader:
    """With the order of ``epoch_of``."""
    dataset = make(root)
    return make_train_loader(dataset, 8, Workers([dataset], num_workers=num_workers), seed=4)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in pairs)


def test_batches_do_not_depend_on_workers_or_on_a_resume(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    whole = epoch_of(dataset, 1, workers=0)
    assert len(whole) == 6
    images, targets = whole[0]
    assert images.shape == (8, 3, 32, 32) and targets.shape == (8, 32, 32)
    assert images.dtype == targets.dtype == torch.uint8
    assert same(epoch_of(dataset, 1, workers=2), whole)
    assert same(epoch_of(dataset, 1, workers=1, start_batch=4), whole[4:])
    assert not same(epoch_of(dataset, 0, workers=0), whole)


def of_two(rank: int) -> World:
    return replace(ONE_PROCESS, rank=rank, size=2)


def test_batches_do_not_depend_on_processes(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    whole = epoch_of(dataset, 1, workers=0)
    parts = [epoch_of(dataset, 1, workers=0, batch_size=4, world=of_two(r)) for r in range(2)]
    for number, (images, targets) in enumerate(whole):
        # Rank r has every second sample of the batch.
        for rank in range(2):
            assert torch.equal(parts[rank][number][0], images[rank::2])
            assert torch.equal(parts[rank][number][1], targets[rank::2])


def test_workers_live_through_epochs(shapes_root: Path) -> None:
    loader = training(shapes_root, 1)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        assert same(list(loader), epoch_of(make(shapes_root), epoch, workers=0))
    loader.sampler.set_epoch(0)
    for _ in loader:  # a loop that ends early does not disturb the next one
        break
    assert same(list(loader), epoch_of(make(shapes_root), 0, workers=0))


def processes_of(workers: Workers) -> list[Any]:
    return list(workers._iterator._workers)


def test_closed_workers_leave_no_process_and_begin_again(shapes_root: Path) -> None:
    others = set(multiprocessing.active_children())
    whole = epoch_of(make(shapes_root), 0, workers=0)
    loader = training(shapes_root, 2)
    with loader.workers as workers:
        for _ in range(2):
            assert same(list(loader), whole)
            processes = processes_of(workers)
            assert all(process.is_alive() for process in processes)
            workers.close()
            assert not any(process.is_alive() for process in processes)
        with pytest.raises(ZeroDivisionError), workers:
            for _ in loader:
                processes = processes_of(workers)
                raise ZeroDivisionError
        assert not any(process.is_alive() for process in processes)
    workers.close()
    assert set(multiprocessing.active_children()) == others


def test_workers_outlive_signals_while_they_are_wanted(shapes_root: Path) -> None:
    loader = training(shapes_root, 1)
    with loader.workers as workers:
        (worker,) = processes_of(workers)
        read = []
        for batch in loader:
            read.append(batch)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
                os.kill(worker.pid, number)
        assert same(read, epoch_of(make(shapes_root), 0, workers=0))
        workers._unwanted.value = True
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(60)
        assert worker.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_workers_end_with_a_killed_parent(shapes_root: Path) -> None:
    """Also if it held the lock of torch's event, for which they would wait."""
    receive, send = multiprocessing.Pipe()

    def parent() -> None:
        loader = training(shapes_root, 2)
        next(iter(loader))
        loader.workers._iterator._workers_done_event._cond.acquire()
        send.send([process.pid for process in processes_of(loader.workers)])
        os.kill(os.getpid(), signal.SIGKILL)

    def runs(pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    process.join(BOUND)
    assert process.exitcode == -signal.SIGKILL
    pids, end = receive.recv(), time.monotonic() + BOUND
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(runs, pids))


def test_python_ends_though_a_loader_was_not_closed(shapes_root: Path) -> None:
    code = """
import sys
sys.path[:0] = ["tests", "tests/dataset"]
from pathlib import Path
from test_loaders import training
batches = iter(training(Path(sys.argv[1]), 2))
next(batches)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(shapes_root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert (done.returncode, done.stderr) == (0, "")


class Odd(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason}\nand more")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ZeroDivisionError("division by zero"), "(ZeroDivisionError: division by zero); --num_workers 0"),
        (KeyError("cat"), "(KeyError: 'cat'); --num_workers 0"),
        (Odd(3, "the file is odd"), "Odd: the file is odd); --num_workers 0"),
        (MemoryError(), "(MemoryError); give fewer --num_workers"),
        (OSError(28, "No space left on device"), "--shm-size 8g), or give --num_workers 0"),
    ],
)
def test_an_error_in_a_worker_keeps_its_reason(shapes_root: Path, error: Exception, words: str) -> None:
    def fail(*image_and_mask: Tensor) -> None:
        raise error

    dataset = make(shapes_root)
    dataset.transform = fail
    with Workers([dataset]) as workers:
        try:
            list(make_eval_loader(dataset, 8, workers))
        except Fault as fault:
            text = str(fault)
    assert words in text and "\n" not in text
    with pytest.raises(type(error)):
        list(make_eval_loader(dataset, 8, Workers([dataset], num_workers=0)))


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "Killed): it was killed"), (signal.SIGBUS, "--shm-size 8g), or give --num_workers 0")],
)
def test_a_lost_worker_shows_only_where_a_batch_is_waited_for(
    shapes_root: Path, number: signal.Signals, words: str
) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    loader = training(shapes_root, 1)
    with loader.workers as workers:
        batches = iter(loader)
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) is before
        (worker,) = processes_of(workers)
        os.kill(worker.pid, number)
        worker.join()  # with torch's handler the error came here, or in whatever else ran now
        with pytest.raises(Fault, match=re.escape(words)):
            list(batches)


def test_workers_that_cannot_start_are_told(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(self: Workers) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(Workers, "_get_iterator", no_more)
    told = r"BlockingIOError: .*unavailable\): .* fewer --num_workers"
    loader = training(shapes_root, 1)
    with pytest.raises(Fault, match=told):
        list(loader)
    with pytest.raises(Fault, match=told):
        loader.workers.__enter__()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_workers_read_several_datasets(shapes_root: Path, num_workers: int) -> None:
    """Neither the training's order nor its random numbers depend on what is read between its epochs."""
    train, val = make(shapes_root), make(shapes_root, train=False)
    random = torch.get_rng_state()
    with Workers([train, val], num_workers=num_workers) as workers:
        processes = processes_of(workers) if num_workers else []
        loader = make_train_loader(train, 8, workers, seed=4)
        evaluated = make_eval_loader(val, 5, workers)
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            assert same(list(loader), epoch_of(train, epoch, workers=0))
            found = torch.cat([targets for _, targets in evaluated])
            assert torch.equal(found, torch.stack([val[i][1] for i in range(48)]))
        assert (processes_of(workers) if num_workers else []) == processes
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_loops_at_a_time_are_refused(shapes_root: Path, num_workers: int) -> None:
    """With worker processes the first loop would get the second one's batches."""
    loader = training(shapes_root, num_workers)
    with loader.workers, pytest.raises(UserError, match="images are read by two loops at once"):
        for _ in loader:
            assert same(list(loader), epoch_of(make(shapes_root), 0, workers=0))


def test_exemplars_in_a_loader(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    workers = Workers([dataset], num_workers=0)
    loader = make_train_loader(dataset, 4, workers, num_memory=8)
    assert isinstance(loader.sampler, MemoryMixSampler)
    assert len(list(loader)) == len(loader) == 20
    loader = make_train_loader(dataset, 4, workers, num_memory=8, memory_overwrites=True)
    assert isinstance(loader.sampler, MemoryOverwriteSampler)
    assert len(list(loader)) == len(loader) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_loader(shapes_root: Path, num_workers: int) -> None:
    dataset = make(shapes_root, train=False)
    with Workers([dataset], num_workers=num_workers) as workers:
        parts = [list(make_eval_loader(dataset, 5, workers, world=of_two(rank))) for rank in (0, 1)]
    # 48 samples in batches of 5: the last holds 3 and is the second rank's.
    assert [len(part[-1][0]) for part in parts] == [5, 3]
    batches = [targets for pair in zip(*parts, strict=True) for _, targets in pair]
    assert torch.equal(torch.cat(batches), torch.stack([dataset[i][1] for i in range(48)]))


def message(loader: Loader) -> str:
    # Not pytest.raises: what it keeps of the error would keep the workers alive.
    try:
        list(loader)
    except DataError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_file_comes_out_as_one_line(shapes_root: Path, num_workers: int) -> None:
    dataset = make(shapes_root)
    dataset.dataset.images[13] = Path("/nowhere/x.jpg")
    expected = "/nowhere/x.jpg: the image is missing; check the list file and --data_root"
    with Workers([dataset], num_workers=num_workers) as workers:
        assert message(make_train_loader(dataset, 8, workers)) == expected
        assert message(make_eval_loader(dataset, 8, workers)) == expected


def test_too_few_images_for_a_loader(shapes_root: Path) -> None:
    dataset = make(shapes_root)
    with pytest.raises(UserError, match="48 training images are too few for one batch of 49"):
        make_train_loader(dataset, 49, Workers([dataset]))


def test_cross_validation_split() -> None:
    indices = list(range(100, 152))
    train, val = cross_val_split(indices, seed=1)
    assert sorted(train + val) == indices and len(train) == 41 and not set(train) & set(val)
    assert (train, val) == cross_val_split(indices, seed=1) != cross_val_split(indices, seed=2)
    assert train == sorted(train) and val == sorted(val)


def test_sample_pictures() -> None:
    chosen = choose_samples(50, 10, seed=1)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) and chosen == choose_samples(50, 10, seed=1)
    assert choose_samples(3, 10, seed=1) == [0, 1, 2] and choose_samples(50, 0, seed=1) == []
