"""The images of one step, with that step's labels for training or evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dataset.base import SegmentationDataset
from dataset.decoding import read_mask
from dataset.transforms import PairTransform
from utils.errors import DataError
from utils.labels import VOID

if TYPE_CHECKING:
    from tasks import Task

BACKGROUND = 0
Sample = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Entry:
    """One sample of a step: an image of the data set, and the look-up table of its labels."""

    index: int
    lookup: int = 0


@dataclass(frozen=True)
class SampleKey:
    """What a sampler yields: the index of an entry, the epoch, and the position in that epoch."""

    index: int
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Substitute:
    """A replacement of an unreadable sample (``--skip_corrupt``), or a batch with such, and the reasons."""

    sample: Sample
    reasons: tuple[str, ...]


def train_lookup(
    task: Task,
    step: int,
    *,
    data_masking: str = "current",
    protocol: str = "disjoint",
    void_label: str = "ignore",
) -> Tensor:
    """Table from mask value to training target, uint8[256] (as in MiB and PLOP).

    New classes get their network index, void 255 or 0, everything else 0 (background). The table of an
    exemplar stored at step s is ``train_lookup(task, s, data_masking="current+old")``.

    Args:
        task: class order.
        step: the step that trains.
        data_masking: ``current``: new classes are labelled. ``current+old``, ``all``: old classes too.
            ``new``: new classes, and everything else is void (PLOP's option).
        protocol: ``sequential`` labels old classes with any ``data_masking``.
        void_label: ``ignore`` (255) or ``background`` (0).
    """
    if protocol == "sequential" or data_masking in ("current+old", "all"):
        visible: Iterable[int] = task.seen_classes(step)
    elif data_masking in ("current", "new"):
        visible = task.new_classes(step)
    else:
        raise ValueError(f"unknown data_masking {data_masking!r}")
    hidden = VOID if data_masking == "new" and protocol != "sequential" else BACKGROUND
    return _table(task, visible, hidden, void=_label(void_label))


def eval_lookup(
    task: Task, step: int, *, unseen_label: str = "ignore", ignore_ids: frozenset[int] = frozenset()
) -> Tensor:
    """Table from mask value to evaluation target after a step, uint8[256].

    Seen classes get their network index; unseen classes are ``ignore`` (255; MiB, SDR) or ``background`` (0;
    PLOP, SATS); void and ``ignore_ids`` (ADE20K's "other") are 255.
    """
    table = _table(task, task.seen_classes(step), _label(unseen_label), void=VOID)
    table[list(ignore_ids)] = VOID
    return table


def _label(name: str) -> int:
    return {"ignore": VOID, "background": BACKGROUND}[name]


def _table(task: Task, visible: Iterable[int], hidden: int, *, void: int) -> Tensor:
    table = torch.full((256,), hidden, dtype=torch.uint8)
    network_index = {class_id: position for position, class_id in enumerate(task.order)}
    for class_id in visible:
        table[class_id] = network_index[class_id]
    table[VOID] = void
    return table


def _file_state(path: Path) -> str:
    """Name, size and modification time; an unreadable file is reported when a sample needs it."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path.name!r} unreadable"
    return f"{path.name!r} {stat.st_size} {stat.st_mtime_ns}"


@dataclass(eq=False, repr=False)
class IncrementalDataset(Dataset[Sample]):
    """Samples ``(image uint8 3×H×W, target uint8 H×W)`` of one step; targets are network indices and 255.

    The random augmentation of a sample depends only on the seed and its :class:`SampleKey`, not on the number
    of workers or processes or on resuming.

    Attributes:
        dataset: images and masks on disk.
        entries: the samples; ``entries[key.index].index`` is the image's index in ``dataset``.
        lookups: uint8[256] tables to which entries refer.
        transform: crop of image and mask.
        seed: seed of the run.
        saliency: one map per image of ``dataset`` (PNG, above 0 where salient); samples then end with
            ``{"saliency": bool H×W}``, cropped like the image.
        flag_exemplars: samples end with ``{"exemplar": bool}`` (beside the saliency), true for entries whose
            table is not the first.
        skip_corrupt: number of consecutive unreadable samples that are replaced by the next readable one.
        void_instead: replace them by a black image labelled void, which evaluation ignores.
    """

    dataset: SegmentationDataset
    entries: Sequence[Entry]
    lookups: Sequence[Tensor]
    transform: PairTransform
    seed: int = 0
    saliency: Sequence[Path] | None = None
    flag_exemplars: bool = False
    skip_corrupt: int = 0
    void_instead: bool = False

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        """sha256 of what determines the samples: names, sizes, times of files, label tables, crop, seed."""
        transform = self.transform
        kind = getattr(transform, "__qualname__", type(transform).__qualname__)
        plain = (kind, vars(transform), self.seed, self.skip_corrupt, self.void_instead)
        digest = hashlib.sha256(repr(plain).encode())
        for table in self.lookups:
            digest.update(table.numpy().tobytes())
        for entry in self.entries:
            paths = [self.dataset.images[entry.index], self.dataset.masks[entry.index]]
            if self.saliency is not None:
                paths.append(self.saliency[entry.index])
            digest.update(f"{entry.lookup} {' '.join(map(_file_state, paths))}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, key: SampleKey | int) -> Sample | Substitute:  # type: ignore[override]
        """One sample, or a substitute if it cannot be read; a plain integer means epoch 0.

        Raises:
            DataError: a file cannot be read or has an unknown class id. A worker process returns the error
                instead, without torch's traceback; ``dataset.loaders.Loader`` raises it.
        """
        if not isinstance(key, SampleKey):
            key = SampleKey(int(key))
        try:
            return self._readable(key)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error  # type: ignore[return-value]

    def _readable(self, key: SampleKey) -> Sample | Substitute:
        reasons: list[str] = []
        while True:
            # The substitute depends on the entries only: it is the same in a resumed run.
            place = (key.index + len(reasons)) % len(self.entries)
            try:
                sample = self._sample(SampleKey(place, key.epoch, key.position))
            except DataError as error:
                if not self.skip_corrupt:
                    raise
                if len(reasons) == self.skip_corrupt:
                    raise DataError(
                        f"{error}; it is one more than the {self.skip_corrupt} of --skip_corrupt"
                    ) from error
                reasons.append(str(error))
                if self.void_instead:
                    return Substitute(self._void_sample(), tuple(reasons))
            else:
                return Substitute(sample, tuple(reasons)) if reasons else sample

    def _void_sample(self) -> Sample:
        mask = torch.full((1, 64, 64), VOID, dtype=torch.uint8)
        image, target = self.transform(torch.zeros(3, 64, 64, dtype=torch.uint8), mask)
        return image.contiguous(), target[0].contiguous()

    def _sample(self, key: SampleKey) -> Sample:
        entry = self.entries[key.index]
        image, mask = self.dataset.read(entry.index)
        # numpy's take, because torch's needs int64 indices.
        target = torch.from_numpy(self.lookups[entry.lookup].numpy().take(mask.numpy()))
        if self.saliency is not None:
            # As a second channel it is cropped like the mask.
            target = torch.cat([target, self._saliency(entry.index, target.shape[-2:])])
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: torch.manual_seed would also seed the GPU's, which dropout uses.
            torch.default_generator.manual_seed(self._seed_of(key))
            image, target = self.transform(image.as_subclass(Tensor), target)
        extras: dict[str, Tensor] = {}
        if self.saliency is not None:
            extras["saliency"] = target[1] > 0
        if self.flag_exemplars:
            extras["exemplar"] = torch.tensor(entry.lookup > 0)
        pair = image.contiguous(), target[0].contiguous()
        return (*pair, extras) if extras else pair

    def _saliency(self, index: int, size: torch.Size) -> Tensor:
        assert self.saliency is not None
        path = self.saliency[index]
        salient = read_mask(path)
        if salient.shape[-2:] != size:
            raise DataError(
                f"{path}: has size {tuple(salient.shape[-2:])}, its mask {tuple(size)}; replace the map"
            )
        return salient

    def _seed_of(self, key: SampleKey) -> int:
        state = np.random.SeedSequence((self.seed, key.epoch, key.position)).generate_state(1, np.uint64)
        return int(state[0]) >> 1  # 63 bits, as torch's seeds are signed
