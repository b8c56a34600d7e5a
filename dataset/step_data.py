"""The images of one step of a run: training, validation and final evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset import open_dataset
from dataset.base import SegmentationDataset
from dataset.incremental import Entry, IncrementalDataset, eval_lookup, train_lookup
from dataset.loaders import cross_val_split
from dataset.splits import load_step_list, scan_presence, task_indices
from dataset.transforms import eval_transform, train_transform

CACHE = Path(__file__).resolve().parent.parent / "data" / "cache"
HELD_OUT_SEED = 1  # --test_on_val: the same images for every step and every run
log = logging.getLogger(__name__)


@dataclass
class StepData:
    """What one step reads.

    Attributes:
        train: samples of the step, exemplars last.
        num_memory: how many of them are exemplars.
        val: images that are looked at during training, all seen classes labelled.
        test: images of the final evaluation.
        class_names: in the network's order, seen classes only.
        ignored: network indices that are no class at evaluation (ADE20K's "other").
    """

    train: IncrementalDataset
    num_memory: int
    val: IncrementalDataset
    test: IncrementalDataset
    class_names: list[str]
    ignored: frozenset[int]


def step_data(opts: Any, step: int, *, progress: bool) -> StepData:
    """Open the data set and choose the images of a step by the published rule of its task.

    Args:
        opts: the options of the run.
        step: number of the step.
        progress: show the scan of the masks.

    Raises:
        UserError: the data set or a list is missing or faulty.
    """
    task = opts.task_
    train_set = open_dataset(opts.dataset, opts.data_root, "train")
    val_set = open_dataset(opts.dataset, opts.data_root, "val")
    indices = _train_indices(opts, step, train_set, progress)
    held_out: list[int] = []
    if opts.test_on_val:
        kept, held_out = cross_val_split(range(len(train_set)), HELD_OUT_SEED)
        indices = sorted(set(indices) & set(kept))
    val_indices: list[int] | None = None
    if opts.cross_val:
        indices, val_indices = cross_val_split(indices, opts.random_seed)

    lookup = eval_lookup(task, step, unseen_label=opts.unseen_label, ignore_ids=val_set.ignore_at_eval)
    transform = eval_transform(opts.crop_size if opts.crop_val else None)

    def evaluation(dataset: SegmentationDataset, chosen: Sequence[int] | None) -> IncrementalDataset:
        entries = [Entry(i) for i in (range(len(dataset)) if chosen is None else chosen)]
        return IncrementalDataset(dataset, entries, [lookup], transform, opts.random_seed)

    if opts.test_on_val:
        test = evaluation(train_set, held_out)
    elif opts.val_on_trainset:
        test = evaluation(train_set, None)
    else:
        test = evaluation(val_set, None)
    entries, lookups = [Entry(i) for i in indices], [_train_table(opts, step)]
    train = IncrementalDataset(train_set, entries, lookups, train_transform(opts.crop_size), opts.random_seed)
    seen = task.seen_classes(step)
    return StepData(
        train=train,
        num_memory=0,
        val=evaluation(train_set, val_indices) if opts.cross_val else test,
        test=test,
        class_names=[train_set.class_names[c] for c in seen],
        ignored=frozenset(seen.index(c) for c in val_set.ignore_at_eval if c in seen),
    )


def _train_indices(opts: Any, step: int, train_set: SegmentationDataset, progress: bool) -> list[int]:
    if opts.splits_dir is not None:
        return load_step_list(opts.splits_dir, step, len(train_set))
    presence = scan_presence(train_set.masks, cache_dir=CACHE, progress=progress)
    return task_indices(opts.dataset, opts.task_, step, opts.protocol, presence)


def _train_table(opts: Any, step: int) -> Tensor:
    return train_lookup(
        opts.task_,
        step,
        data_masking=opts.data_masking,
        protocol=opts.protocol,
        void_label=opts.void_label,
    )
