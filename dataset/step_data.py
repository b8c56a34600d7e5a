"""The images of one step of a run: training, validation and final evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset import open_dataset
from dataset.base import SegmentationDataset
from dataset.exemplars import Exemplar, Selection, class_counts, save_exemplars, stored_exemplars
from dataset.image_labels import scan_image_labels
from dataset.incremental import Entry, IncrementalDataset, eval_lookup, train_lookup
from dataset.loaders import cross_val_split
from dataset.protocols import Protocol, load_step_list, task_indices, why_empty
from dataset.transforms import eval_transform, train_transform
from tasks import Task
from utils.errors import UserError

CACHE = Path(__file__).resolve().parent.parent / "data" / "cache"
HELD_OUT_SEED = 1  # --test_on_val: the same images for every step and every run
EXTRAS = frozenset({"saliency", "exemplar"})  # tensors of the samples that only some methods read
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSpec:
    """The options that decide which images a step has and what their labels show, under their names."""

    task: Task
    dataset: str
    data_root: Path
    protocol: Protocol
    partition_seed: int
    random_seed: int
    crop_size: int
    augmentation: str
    fidelity: str
    data_masking: str
    void_label: str
    memory: int
    memory_choice: str
    memory_labels: str
    cross_val: bool
    test_on_val: bool
    val_on_trainset: bool
    eval_images: str
    unseen_label: str
    crop_val: bool
    splits_dir: Path | None
    skip_corrupt: int

    @classmethod
    def of(cls, opts: Any) -> DataSpec:
        """Those of a run."""
        names = {field.name for field in fields(cls)} - {"task"}
        return cls(task=opts.task_, **{name: getattr(opts, name) for name in names})


@dataclass
class EvaluationData:
    """What the final evaluation of a step reads.

    Attributes:
        test: images, all seen classes labelled.
        class_names: in the network's order, seen classes only.
        ignored: network indices that are no class at evaluation (ADE20K's "other").
    """

    test: IncrementalDataset
    class_names: list[str]
    ignored: frozenset[int]


@dataclass
class StepData(EvaluationData):
    """What the training of a step reads besides.

    Attributes:
        train: samples of the step, exemplars last.
        num_memory: how many of them are exemplars.
        val: images that are looked at during training.
    """

    train: IncrementalDataset
    num_memory: int
    val: IncrementalDataset


def evaluation_data(spec: DataSpec, step: int) -> EvaluationData:
    """The images of a step's final evaluation.

    They are the validation list's, or with ``--val_on_trainset`` the training list's, or with
    ``--test_on_val`` the fifth of the training list that no step trains on. ``--eval_images seen`` leaves
    out images that show no class seen so far.

    Raises:
        UserError: the data set is missing or faulty.
    """
    on_training_images = spec.val_on_trainset or spec.test_on_val
    dataset = open_dataset(spec.dataset, spec.data_root, "train" if on_training_images else "val")
    chosen = _held_out(len(dataset))[1] if spec.test_on_val else range(len(dataset))
    seen = spec.task.seen_classes(step)
    if spec.eval_images == "seen":
        image_labels = _image_labels(dataset, progress=False)
        chosen = [i for i in chosen if image_labels[i].intersection(seen)]
    return EvaluationData(
        test=_evaluation(spec, step, dataset, chosen),
        class_names=[dataset.class_names[c] for c in seen],
        ignored=frozenset(seen.index(c) for c in dataset.ignore_at_eval if c in seen),
    )


def step_data(
    spec: DataSpec,
    step: int,
    *,
    extras: frozenset[str] = frozenset(),
    exemplar_list: Path,
    chosen: list[Exemplar] | None = None,
    is_main: bool,
) -> StepData:
    """All images of a step, training ones by the published rule of the task.

    Args:
        spec: which images, and what their labels show.
        step: number of the step.
        extras: further tensors that the training samples hold, of ``EXTRAS``.
        exemplar_list: file of the exemplars of ``--memory``; used again if it was made from the same
            choices, else made.
        chosen: the exemplars of ``--memory_choice predicted``, which needs a network; None: of the others.
        is_main: this process shows progress and writes files.

    Raises:
        UserError: the data set or a list is missing or faulty.
    """
    final = evaluation_data(spec, step)
    dataset = open_dataset(spec.dataset, spec.data_root, "train")
    lists = _StepLists(spec, dataset, is_main)
    indices = lists.indices(step)
    val = final.test
    held_out: list[int] = []
    if spec.cross_val:
        indices, held_out = cross_val_split(indices, spec.random_seed)
        val = _evaluation(spec, step, dataset, held_out)
    if not indices:
        raise lists.none_left(step)
    exemplars: list[Exemplar] = []
    if spec.memory and step:
        # An earlier step may have had an image that this one validates on.
        kept_back = set(held_out)
        stored = _exemplars(spec, step, lists, exemplar_list) if chosen is None else chosen
        _log_classes(stored, lists, spec.task)
        exemplars = [exemplar for exemplar in stored if exemplar.index not in kept_back]
    entries = [Entry(i) for i in indices] + [Entry(e.index, 1 + e.step) for e in exemplars]
    train = IncrementalDataset(
        dataset,
        entries,
        _train_tables(spec, step),
        train_transform(spec.crop_size, spec.augmentation, released=spec.fidelity == "released"),
        spec.random_seed,
        saliency=_saliency_maps(dataset) if "saliency" in extras else None,
        flag_exemplars="exemplar" in extras and bool(exemplars),
        skip_corrupt=spec.skip_corrupt,
    )
    return StepData(**vars(final), train=train, num_memory=len(exemplars), val=val)


class _StepLists:
    """Training images of every step; the masks are scanned at most once."""

    def __init__(self, spec: DataSpec, dataset: SegmentationDataset, is_main: bool) -> None:
        self.spec = spec
        self.dataset = dataset
        self.is_main = is_main

    @cached_property
    def image_labels(self) -> Sequence[frozenset[int]]:
        """Class ids of every training image."""
        return _image_labels(self.dataset, progress=self.is_main)

    def indices(self, step: int) -> list[int]:
        """Places in the training list of a step's images."""
        spec = self.spec
        if spec.splits_dir is not None:
            indices = load_step_list(spec.splits_dir, step, len(self.dataset))
        else:
            indices = self._by_protocol(step)
        if spec.test_on_val:
            indices = sorted(set(indices) & set(_held_out(len(self.dataset))[0]))
        return indices

    def _by_protocol(self, step: int) -> list[int]:
        spec, labels = self.spec, self.image_labels
        return task_indices(spec.task, step, spec.protocol, labels, partition_seed=spec.partition_seed)

    def none_left(self, step: int) -> UserError:
        """The error for a step without training images."""
        spec = self.spec
        rule = spec.protocol if spec.splits_dir is None else f"--splits_dir {spec.splits_dir}"
        kept_back = [f"--{name}" for name in ("test_on_val", "cross_val") if getattr(spec, name)]
        if spec.splits_dir is not None or self._by_protocol(step):
            reason = f"{' and '.join(kept_back)} keeps all of them back; leave it out or add images"
        else:
            names = self.dataset.class_names
            reason = why_empty(spec.task, step, spec.protocol, self.image_labels, names)
        return UserError(
            f"step {step} of task {spec.task.name} ({rule}) has no training image: {reason} "
            "(--check_data shows the images of every class and step)"
        )


def _image_labels(dataset: SegmentationDataset, *, progress: bool) -> list[frozenset[int]]:
    classes = dataset.num_classes
    return scan_image_labels(dataset.masks, cache_dir=CACHE, num_classes=classes, progress=progress)


def _saliency_maps(dataset: SegmentationDataset) -> list[Path] | None:
    """The saliency maps beside the images, or None where the data set has none."""
    folder = dataset.images[0].parent.parent / "saliency_map"
    if not folder.is_dir():
        log.info("no saliency maps in %s: all background counts as salient", folder)
        return None
    maps = [folder / f"{image.stem}.png" for image in dataset.images]
    for path in maps:
        if not path.is_file():
            raise UserError(f"{path}: missing; get all maps (data/download_voc.sh) or move the folder away")
    log.info("saliency maps from %s", folder)
    return maps


def _held_out(number: int) -> tuple[list[int], list[int]]:
    """Training and evaluation fifths of ``--test_on_val``."""
    return cross_val_split(range(number), HELD_OUT_SEED)


def _evaluation(
    spec: DataSpec, step: int, dataset: SegmentationDataset, chosen: Sequence[int]
) -> IncrementalDataset:
    return IncrementalDataset(
        dataset,
        [Entry(i) for i in chosen],
        [eval_lookup(spec.task, step, unseen_label=spec.unseen_label, ignore_ids=dataset.ignore_at_eval)],
        eval_transform(spec.crop_size if spec.crop_val else None),
        spec.random_seed,
        skip_corrupt=spec.skip_corrupt,
        void_instead=True,
    )


def _train_tables(spec: DataSpec, step: int) -> list[Tensor]:
    """Look-up 0 is the step's own; 1 + s shows the classes that were known when step s stored an exemplar.

    With ``--memory_labels current`` they show the classes of this step too, with ``new`` only these.
    """
    own = [_train_table(spec, step, spec.data_masking)]
    if spec.memory_labels == "new":
        return own * (1 + step)
    current = spec.memory_labels == "current"
    return own + [_train_table(spec, step if current else s, "current+old") for s in range(step)]


def _train_table(spec: DataSpec, step: int, data_masking: str) -> Tensor:
    words = {"protocol": spec.protocol, "void_label": spec.void_label}
    return train_lookup(spec.task, step, data_masking=data_masking, **words)


def _exemplars(spec: DataSpec, step: int, lists: _StepLists, path: Path) -> list[Exemplar]:
    """Exemplars of the earlier steps: the list on disk if it was made from the same choices, or a new one."""
    candidates = [lists.indices(earlier) for earlier in range(step)]
    in_turn = spec.memory_choice == "in_turn"
    selection = Selection(
        lists.image_labels, spec.task, step, spec.memory, spec.random_seed, candidates, in_turn
    )
    origin = selection.origin()
    exemplars = stored_exemplars(path, origin)
    if exemplars is None:
        exemplars = selection.choose()
        if lists.is_main:
            save_exemplars(path, exemplars, origin)
    return exemplars


def _log_classes(exemplars: Sequence[Exemplar], lists: _StepLists, task: Task) -> None:
    counts = class_counts(exemplars, lists.image_labels, task)
    names = lists.dataset.class_names
    shown = ", ".join(f"{names[c]} {number}" for c, number in counts.items())
    log.info("%d exemplars: %s", len(exemplars), shown)


def candidate_images(spec: DataSpec, step: int, *, is_main: bool) -> IncrementalDataset:
    """A step's training images with its labels, among which the next step chooses exemplars.

    Whole images; ``--fidelity released``: the random crops of training.
    """
    dataset = open_dataset(spec.dataset, spec.data_root, "train")
    released = spec.fidelity == "released"
    crops = train_transform(spec.crop_size, spec.augmentation, released=True)
    return IncrementalDataset(
        dataset,
        [Entry(i) for i in _StepLists(spec, dataset, is_main).indices(step)],
        [_train_table(spec, step, "current")],
        crops if released else eval_transform(None),
        spec.random_seed,
        skip_corrupt=spec.skip_corrupt,
        void_instead=True,
    )
