"""The pictures of one step, with labels as that step's training or evaluation sees them."""

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
    """One sample of a step: a picture of the data set, and which look-up table its labels go through."""

    index: int
    lookup: int = 0


@dataclass(frozen=True)
class SampleKey:
    """What a sampler yields: the place of an entry in ``entries``, the epoch, and the place in that epoch."""

    index: int
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Substitute:
    """A sample in the place of one that cannot be read (``--skip_corrupt``), and what is wrong with that."""

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
    """Table from mask value to training target, uint8[256] (as MiB and PLOP).

    New classes get their network index, void ``255`` or ``0``, everything else ``0`` (background). An
    exemplar stored at step s goes through ``train_lookup(task, s, data_masking="current+old")``.

    Args:
        task: class order.
        step: the step that trains.
        data_masking: ``current``: new classes are visible. ``current+old``, ``all``: old ones too. ``new``:
            new ones, and all else is void (PLOP's option).
        protocol: ``sequential`` keeps old labels visible whatever ``data_masking`` says.
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

    Seen classes get their network index; classes not yet seen are ``ignore`` (255; MiB, SDR) or
    ``background`` (0; PLOP, SATS); void and ``ignore_ids`` (ADE20K's "other") are 255.
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
    """Changes with a file's content; a file that cannot be read is told when a sample needs it."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path.name!r} unreadable"
    return f"{path.name!r} {stat.st_size} {stat.st_mtime_ns}"


class IncrementalDataset(Dataset[Sample]):
    """Samples ``(image uint8 3×H×W, target uint8 H×W)`` of one step; targets are network indices and 255.

    The random draws of a sample depend on the seed and its :class:`SampleKey` alone: not on the number of
    workers or processes, nor on where a run was resumed.

    Args:
        dataset: pictures and masks on disk.
        entries: the samples; ``entries[key.index].index`` is the picture's place in ``dataset``.
        lookups: uint8[256] tables that entries refer to (exemplars have their own).
        transform: crop of image and mask.
        seed: seed of the run.
        saliency: one map per picture of ``dataset`` (PNG, above 0 where something stands out); samples then
            end with ``{"saliency": bool H×W}``, cropped as the image is.
        flag_exemplars: samples end with ``{"exemplar": bool}`` (beside the saliency), true of entries whose
            table is not the first.
        skip_corrupt: so many unreadable samples in a row are passed over for the next one that can be read.
        void_instead: pass over them for a black picture labelled void, which no evaluation counts.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        entries: Sequence[Entry],
        lookups: Sequence[Tensor],
        transform: PairTransform,
        seed: int = 0,
        saliency: Sequence[Path] | None = None,
        *,
        flag_exemplars: bool = False,
        skip_corrupt: int = 0,
        void_instead: bool = False,
    ) -> None:
        self.dataset = dataset
        self.entries = list(entries)
        self.transform = transform
        self.seed = seed
        self.saliency = saliency
        self.flag_exemplars = flag_exemplars
        self.skip_corrupt = skip_corrupt
        self.void_instead = void_instead
        self._tables = [lookup.numpy() for lookup in lookups]

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        """sha256 of all that decides the samples: files by name, size and time, label tables, crop, seed.

        Equal digests mean equal samples for equal keys.
        """
        transform = self.transform
        kind = getattr(transform, "__qualname__", type(transform).__qualname__)
        plain = (kind, vars(transform), self.seed, self.skip_corrupt, self.void_instead)
        digest = hashlib.sha256(repr(plain).encode())
        for table in self._tables:
            digest.update(table.tobytes())
        for entry in self.entries:
            paths = [self.dataset.images[entry.index], self.dataset.masks[entry.index]]
            if self.saliency is not None:
                paths.append(self.saliency[entry.index])
            digest.update(f"{entry.lookup} {' '.join(map(_file_state, paths))}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, key: SampleKey | int) -> Sample | Substitute:  # type: ignore[override]
        """One sample, or a substitute if that cannot be read; a bare number means epoch 0.

        Raises:
            DataError: a file cannot be read or has an unknown class id. A worker process returns the error
                instead, as torch would bury its line in a traceback; ``dataset.loaders.Loader`` raises it.
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
        for offset in range(self.skip_corrupt + 1):
            # Which entry stands in depends on the entries alone: a resumed run finds the same one.
            tried = SampleKey((key.index + offset) % len(self.entries), key.epoch, key.position)
            try:
                sample = self._sample(tried)
            except DataError as error:
                reasons.append(str(error))
                if not self.skip_corrupt:
                    raise
                if len(reasons) > self.skip_corrupt:
                    raise DataError(
                        f"{error}; it is one more than the {self.skip_corrupt} of --skip_corrupt"
                    ) from error
                if self.void_instead:
                    return Substitute(self._void_sample(), tuple(reasons))
            else:
                return Substitute(sample, tuple(reasons)) if reasons else sample
        raise AssertionError("the last try returns or raises")

    def _void_sample(self) -> Sample:
        mask = torch.full((1, 64, 64), VOID, dtype=torch.uint8)
        image, target = self.transform(torch.zeros(3, 64, 64, dtype=torch.uint8), mask)
        return image.contiguous(), target[0].contiguous()

    def _sample(self, key: SampleKey) -> Sample:
        entry = self.entries[key.index]
        image, mask = self.dataset.read(entry.index)
        # numpy's take needs no int64 indices, torch's would convert every pixel first.
        target = torch.from_numpy(self._tables[entry.lookup].take(mask.numpy()))
        if self.saliency is not None:
            # As a second channel the map goes through the same crop as the mask.
            target = torch.cat([target, self._saliency(entry.index, target.shape[-2:])])
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: torch.manual_seed would also restart the GPU's, and with it dropout.
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
                f"{path}: is {tuple(salient.shape[-2:])} pixels, its mask {tuple(size)}; get the right map"
            )
        return salient

    def _seed_of(self, key: SampleKey) -> int:
        state = np.random.SeedSequence((self.seed, key.epoch, key.position)).generate_state(1, np.uint64)
        return int(state[0]) >> 1  # 63 bits: torch's seeds are signed
