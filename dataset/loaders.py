"""Samplers (which samples a process reads, in which order) and data loaders.

The order depends only on the seed and the epoch. Batch b has the same samples with the same random crops for
every number of processes with the same total batch size.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from dataset.incremental import Sample, SampleKey, Substitute
from utils.distributed import World, loader_fault
from utils.errors import DataError, UserError
from utils.signals import end_with_parent, outlive_signals

ONE_PROCESS = World(0, 0, 1, torch.device("cpu"), None)  # alone on the CPU
log = logging.getLogger(__name__)


class EpochSampler(Sampler[SampleKey]):
    """Training samples of one rank: a permutation per epoch, whole batches only, equally many on every rank.

    Rank r of n takes every n-th position of the permutation, beginning at r.

    Args:
        num_samples: number of entries to draw from.
        batch_size: samples per process and batch.
        seed: seed of the run.
        rank: this process.
        world_size: number of processes.
        shuffle: False keeps the entries' order.

    Raises:
        UserError: too few samples for one batch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.num_samples, self.batch_size, self.shuffle = num_samples, batch_size, shuffle
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.total_batch = batch_size * world_size
        self.epoch, self.start_batch = 0, 0
        self.batches_per_epoch = self._count_batches()

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin it with (a run resumed in the middle of an epoch)."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.start_batch) * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._epoch_order()
        first = self.start_batch * self.total_batch + self.rank
        for position in range(first, self.batches_per_epoch * self.total_batch, self.world_size):
            yield SampleKey(order[position], self.epoch, position)

    def _count_batches(self) -> int:
        if self.num_samples < self.total_batch:
            raise _too_few(self.num_samples, self.batch_size, self.world_size, self.num_samples)
        return self.num_samples // self.total_batch

    def _epoch_order(self) -> list[int]:
        """Entries in the order of the whole epoch, over all ranks."""
        number = self.num_samples
        return self._permutation(number, stream=0) if self.shuffle else list(range(number))

    def _permutation(self, count: int, stream: int) -> list[int]:
        generator = np.random.default_rng((self.seed, self.epoch, stream))
        return generator.permutation(count).tolist()


class MemoryMixSampler(EpochSampler):
    """Half of each batch from the step's own samples, half from the exemplar memory (SSUL-M, SATS-M).

    An epoch is one pass over the step's own samples; the exemplars are repeated as often as needed, each time
    in a new order. In an odd batch the step's own samples have the larger half.

    Args:
        num_samples: number of the step's own entries, which come first in the dataset's ``entries``.
        num_memory: number of exemplar entries, which follow.
        kwargs: as for :class:`EpochSampler`.

    Raises:
        UserError: too few samples for one batch, or a total batch of 1, which has no second half.
    """

    def __init__(self, num_samples: int, num_memory: int, **kwargs: Any) -> None:
        self.num_memory = num_memory
        super().__init__(num_samples, **kwargs)

    def _count_batches(self) -> int:
        check_half(self.total_batch)
        own_half = self.total_batch - self.total_batch // 2
        if self.num_samples < own_half:
            raise _too_few(self.num_samples, self.batch_size, self.world_size, 2 * self.num_samples)
        return self.num_samples // own_half

    def _epoch_order(self) -> list[int]:
        memory_half = self.total_batch // 2
        own_half = self.total_batch - memory_half
        own = super()._epoch_order()
        passes = -(-self.batches_per_epoch * memory_half // self.num_memory)
        memory = [
            self.num_samples + i
            for p in range(passes)
            for i in self._permutation(self.num_memory, stream=p + 1)
        ]
        order: list[int] = []
        for batch in range(self.batches_per_epoch):
            order += own[batch * own_half : (batch + 1) * own_half]
            order += memory[batch * memory_half : (batch + 1) * memory_half]
        return order


class MemoryOverwriteSampler(EpochSampler):
    """Batches of the step's own samples, of which exemplars take the place of half (SSUL-M as released).

    So an epoch has as many batches as without exemplars, and every second own sample is skipped. The
    places are drawn for each batch. Exemplars are drawn in batches too, of which only those at these places
    are used; a memory smaller than a batch is repeated until it fills one.

    Raises:
        UserError: too few samples for one batch, or a total batch of 1, which has no second half.
    """

    def __init__(self, num_samples: int, num_memory: int, **kwargs: Any) -> None:
        super().__init__(num_samples, **kwargs)
        check_half(self.total_batch)
        self.memory = [num_samples + i for i in range(num_memory)]
        while len(self.memory) < self.total_batch:
            self.memory *= 2

    def _epoch_order(self) -> list[int]:
        order = np.array(super()._epoch_order())
        batches_per_pass = len(self.memory) // self.total_batch
        generator = np.random.default_rng((self.seed, self.epoch, 1))
        for batch in range(self.batches_per_epoch):
            if batch % batches_per_pass == 0:
                memory = generator.permutation(self.memory)
            places = generator.permutation(self.total_batch)[: self.total_batch // 2]
            first = batch % batches_per_pass * self.total_batch
            order[batch * self.total_batch + places] = memory[first + places]
        return order.tolist()


class EvalBatchSampler(Sampler[list[SampleKey]]):
    """Batches of every sample once over all ranks, in order: rank r of n takes the batches r, r + n, ...

    A batch holds the same samples for every number of ranks, so that a network computes the same numbers to
    the last digit. Nothing is padded: ranks may have different numbers of batches, and a loop over them must
    not call a collective per batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self._starts = range(rank * batch_size, num_samples, world_size * batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in self._starts:
            stop = min(start + self.batch_size, self.num_samples)
            yield [SampleKey(i, 0, i) for i in range(start, stop)]


class Tolerance:
    """The unreadable images of a run, of which ``--skip_corrupt`` allows some.

    Attributes:
        limit: number of images allowed.
        reasons: one line for each image met, which begins with its file.
    """

    def __init__(self, limit: int = 0, reasons: Iterable[str] = ()) -> None:
        self.limit = limit
        self.reasons = set(reasons)

    def note(self, reasons: Iterable[str]) -> None:
        """Add unreadable images. Raises DataError if there are now more than allowed."""
        for reason in sorted(set(reasons) - self.reasons):
            self.reasons.add(reason)
            if len(self.reasons) > self.limit:
                raise DataError(f"{reason}; one more than the {self.limit} of --skip_corrupt")
            log.warning("skipped (%d of at most %d): %s", len(self.reasons), self.limit, reason)


# Number of a dataset, and batches of it.
_Batches: TypeAlias = "tuple[int, Iterable[Sequence[Any]]]"


class Workers(DataLoader[Sample]):
    """Processes that read the samples of some datasets, pass after pass, and report errors in one line.

    A ``with`` block starts them when it begins, otherwise the first pass does; ``close``, which the end of
    the block calls, ends them.

    Args:
        datasets: all that they read.
        world: this process. On CUDA the batches are pinned, so that copies overlap.
        num_workers: number of processes; 0: this process reads.
        tolerance: counts the images that samples were substituted for; None: none is allowed.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset[Sample]],
        world: World = ONE_PROCESS,
        *,
        num_workers: int = 1,
        tolerance: Tolerance | None = None,
    ) -> None:
        self._unwanted = RawValue(ctypes.c_bool, False)
        self._datasets, self._pass = datasets, _Pass()
        super().__init__(
            _Joined(datasets),
            batch_sampler=self._pass,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=world.device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=functools.partial(_begin_worker, self._unwanted),
            generator=torch.Generator(),  # torch draws a number for each pass; not from the training's
        )
        self.tolerance = tolerance or Tolerance()
        # Workers that are dropped unclosed: torch ends them, in the end by the signal that they outlive.
        weakref.finalize(self, setattr, self._unwanted, "value", True)
        _all_workers.add(self)

    def __enter__(self) -> Workers:
        if self.num_workers:
            with self._faults():
                self._begin((0, ()))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and wait for them. Another pass starts new ones."""
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is None:
            return
        self._unwanted.value = True
        try:
            iterator._shutdown_workers()
        finally:
            for worker in iterator._workers:
                worker.kill()
                worker.join()
        self._unwanted.value = False

    def read(self, dataset: Dataset[Sample], batches: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Yield ``(images uint8 B×3×H×W, targets uint8 B×H×W)`` for each batch of one of the datasets.

        Args:
            dataset: one of those given at first.
            batches: for each batch the keys of its samples.

        Raises:
            DataError: a bad file.
            Fault: a worker process failed, was lost or could not be started.
            UserError: another pass began before the end of this one.
        """
        number = next(i for i, each in enumerate(self._datasets) if each is dataset)
        mine = number, batches
        for batch in self._received(mine):
            if isinstance(batch, Substitute):
                self.tolerance.note(batch.reasons)
                batch = batch.sample
            if isinstance(batch, DataError):
                # A new one: raising `batch` itself would tie it to this frame in a cycle, and workers that
                # the garbage collector finds in a cycle take five seconds each to end.
                raise DataError(*batch.args)
            yield batch
            if self._pass.current is not mine:
                raise UserError(
                    "images are read by two loops at once: a method may loop over context.batches() in "
                    "begin_step and end_step, and not within another such loop"
                )

    def _received(self, batches: _Batches) -> Iterator[Any]:
        with self._faults():
            yield from self._begin(batches)

    def _begin(self, batches: _Batches) -> Iterator[Any]:
        self._pass.current = batches
        with _no_errors_from_signals():
            return super().__iter__()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.num_workers == 0:
                raise
            raise loader_fault(error, self._fatal_signals()) from error

    def _fatal_signals(self) -> list[str]:
        """What the worker processes died of, in the system's words ("Killed", "Bus error")."""
        codes = {worker.exitcode or 0 for worker in getattr(self._iterator, "_workers", ())}
        return sorted(signal.strsignal(-code) or str(-code) for code in codes if code < 0)


class _Joined(Dataset[Sample]):
    """Samples of several datasets by (number of the dataset, key)."""

    def __init__(self, datasets: Sequence[Dataset[Sample]]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple[int, SampleKey]) -> Sample:
        number, within = key
        return self.datasets[number][within]


class _Pass(Sampler[list[tuple[int, SampleKey]]]):
    """The batches of the current pass."""

    current: _Batches = (0, ())

    def __iter__(self) -> Iterator[list[tuple[int, SampleKey]]]:
        number, batches = self.current
        for batch in batches:
            yield [(number, key) for key in batch]


@dataclass(frozen=True)
class Loader:
    """The batches of a dataset, anew in each loop, as :meth:`Workers.read` yields them.

    Attributes:
        dataset: what is read.
        workers: who reads it.
        batches: for each batch the keys of its samples.
    """

    dataset: Dataset[Sample]
    workers: Workers
    batches: BatchSampler | EvalBatchSampler

    @property
    def sampler(self) -> EpochSampler:
        """The order of the samples in training."""
        assert isinstance(self.batches, BatchSampler) and isinstance(self.batches.sampler, EpochSampler)
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return self.workers.read(self.dataset, self.batches)


def _begin_worker(unwanted: Any, worker: int) -> None:
    outlive_signals(unwanted)
    end_with_parent()


@contextlib.contextmanager
def _no_errors_from_signals() -> Iterator[None]:
    """Undo the SIGCHLD handler that torch sets with its first worker processes.

    It raises the loss of a worker wherever the main thread happens to be: inside a lock, a save, a reduction.
    Without it the loss shows where a batch is waited for, within five seconds.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = number and signal.getsignal(number)
    yield
    if number and signal.getsignal(number) is not before:
        signal.signal(number, before)


_all_workers: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register  # runs before multiprocessing's own, which waits for every worker without a limit
def _close_all() -> None:
    for workers in list(_all_workers):
        workers.close()


def make_train_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    workers: Workers,
    *,
    num_memory: int = 0,
    memory_overwrites: bool = False,
    seed: int = 0,
    world: World = ONE_PROCESS,
) -> Loader:
    """Loader of training batches, whole ones only; call ``loader.sampler.set_epoch`` before each epoch.

    Args:
        dataset: the step's samples, :class:`dataset.incremental.IncrementalDataset`.
        batch_size: samples per process.
        workers: who reads them.
        num_memory: how many of the dataset's last entries are exemplars; they fill half of each batch.
        memory_overwrites: they take the place of own samples there (:class:`MemoryOverwriteSampler`).
        seed: seed of the order.
        world: this process among the others.

    Raises:
        UserError: too few samples for one batch.
    """
    num_samples = len(dataset) - num_memory  # type: ignore[arg-type]
    kind: Callable[..., EpochSampler] = EpochSampler
    if num_memory:
        sampler_of = MemoryOverwriteSampler if memory_overwrites else MemoryMixSampler
        kind = functools.partial(sampler_of, num_memory=num_memory)
    sampler = kind(num_samples, batch_size=batch_size, seed=seed, rank=world.rank, world_size=world.size)
    batches: Any = BatchSampler(sampler, batch_size, drop_last=True)  # type: ignore[arg-type]  # keys, not int
    return Loader(dataset, workers, batches)


def make_eval_loader(
    dataset: Dataset[Sample], batch_size: int, workers: Workers, *, world: World = ONE_PROCESS
) -> Loader:
    """Loader over each sample exactly once over all processes, in order; the last batch may be smaller.

    Whole images (``--whole_val``) differ in size and need ``batch_size`` 1.
    """
    number = len(dataset)  # type: ignore[arg-type]
    batches = EvalBatchSampler(number, batch_size, rank=world.rank, world_size=world.size)
    return Loader(dataset, workers, batches)


def collate(samples: list[Any]) -> Any:
    """Stack samples to a batch; a DataError among them takes the batch's place."""
    error = next((sample for sample in samples if isinstance(sample, DataError)), None)
    if error is not None:
        return error
    reasons = tuple(r for sample in samples if isinstance(sample, Substitute) for r in sample.reasons)
    batch = default_collate([s.sample if isinstance(s, Substitute) else s for s in samples])
    return Substitute(batch, reasons) if reasons else batch


def check_half(total_batch: int) -> None:
    """Check that a batch over all processes has place for exemplars beside the step's own images.

    Raises:
        UserError: it has not.
    """
    if total_batch < 2:
        raise UserError("--batch_size 1 leaves no place for exemplars; use 2 or more, or --memory 0")


def _too_few(num_samples: int, batch_size: int, world_size: int, largest: int) -> UserError:
    """The error for a step that cannot fill one batch; ``largest`` is the total batch that it could fill."""
    if not num_samples:
        return UserError("the step has no training image; --check_data shows the images of every step")
    remedy = (
        "use fewer processes" if largest < world_size else f"use --batch_size {largest // world_size} or less"
    )
    return UserError(
        f"{num_samples} training images are too few for one batch of {batch_size} on {world_size} process(es)"
        f"; {remedy}, or a task with more images in this step"
    )


def cross_val_split(indices: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Divide training indices 80/20 at random into training and validation (``--cross_val``), each sorted."""
    shuffled = np.random.default_rng(seed).permutation(np.asarray(indices, dtype=np.int64))
    cut = int(0.8 * len(shuffled))
    return sorted(shuffled[:cut].tolist()), sorted(shuffled[cut:].tolist())


def choose_samples(num_images: int, sample_num: int, seed: int) -> list[int]:
    """Positions of the validation images that are logged (``--sample_num``): distinct, sorted, seeded."""
    return sorted(np.random.default_rng(seed).permutation(num_images)[:sample_num].tolist())
