"""Where a step of a run stands, and whether a checkpoint is of the same run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from argparser import declared
from runs.checkpoint import saved_options


@dataclass
class Progress:
    """How far a step is.

    Attributes:
        epoch: the epoch under way, from 0.
        batch: its batches that are done.
        best: best validation score so far.
        unreadable: images that ``--skip_corrupt`` skipped.
    """

    epoch: int = 0
    batch: int = 0
    best: float = 0.0
    unreadable: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, content: Mapping[str, Any], batches_per_epoch: int) -> Progress:
        """That of a checkpoint; one without a number of batches stands at the end of its epoch."""
        return cls(
            epoch=int(content["epoch"]),
            batch=int(content.get("batch", batches_per_epoch)),
            best=float(content.get("best_score", 0.0)),
            unreadable=set(content.get("unreadable", [])),
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "best_score": self.best,
            "unreadable": sorted(self.unreadable),
        }


def is_trained(content: Mapping[str, Any], epochs: int) -> bool:
    """Whether a checkpoint holds a step's result: it stands at the end of the last epoch.

    As long as ``--keep best`` has not chosen, the checkpoint holds ``best`` beside the latest weights. One
    that was saved after the last batch, but before the methods' ``end_step``, says so with ``ended``; those
    without it are of versions that had no such hook.
    """
    at_end = int(content["epoch"]) + 1 >= epochs and not is_within_epoch(content)
    return at_end and "best" not in content and bool(content.get("ended", True))


def is_within_epoch(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint stands between two batches of an epoch."""
    return content.get("batch", None) not in (None, content.get("batches_per_epoch"))


def has_same_batches(
    content: Mapping[str, Any],
    options: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    batches_per_epoch: int,
) -> bool:
    """Whether the epoch of a checkpoint has the same images in the same order as this run's.

    Args:
        content: of the checkpoint.
        options: this run's, in JSON types.
        fingerprint: this run's.
        batches_per_epoch: this run's.
    """
    saved, known = saved_options(content), content.get("facts", {})
    decide = ("total batch", "list of training images", "names of the training images")
    return (
        content.get("batches_per_epoch") == batches_per_epoch
        and saved.get("random_seed") == options["random_seed"]
        and all(known.get(name) == fingerprint[name] for name in decide)
    )


def deciding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change what is learnt, but for those that are compared by what they stand for.

    With ``--keep best`` those of the validation are among them.
    """
    keep_best = options.get("keep") == "best"
    return {name: value for name, value in options.items() if declared(name).must_agree_on_resume(keep_best)}


def differences(
    content: Mapping[str, Any], options: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> list[str]:
    """What a checkpoint was trained with that this run has otherwise, e.g. ``--momentum 0.9, now 0.5``.

    Args:
        content: of the checkpoint.
        options: this run's, in JSON types; those that only one of the two knows are skipped.
        fingerprint: this run's, by the words that the message shall use.
    """
    saved = saved_options(content)
    found = []
    for name in sorted(saved.keys() & deciding_options(options).keys()):
        if saved[name] != options[name]:
            option = declared(name)
            was, now = option.as_typed(saved[name]), option.as_typed(options[name])
            found.append(f"{option.flag} {was}, now {now}")
    known = content.get("facts", {})
    return found + [
        f"{name} {_short(known[name])}, now {_short(value)}"
        for name, value in fingerprint.items()
        if name in known and known[name] != value and None not in (known[name], value)
    ]


def _short(value: Any) -> str:
    return value[:8] if isinstance(value, str) else str(value)


def job_id() -> str:
    """Name of the job of the scheduler or launcher that this process belongs to; empty without one."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""


def restarted() -> bool:
    """Whether the scheduler or launcher started this job before (requeued, ``--max-restarts``)."""
    counts = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def rng_of_rank(content: Mapping[str, Any], rank: int) -> dict[str, Tensor] | None:
    """State of a rank's random generators in a checkpoint; None where there is none for it."""
    states = content.get("rng_state") or []
    return states[rank] if rank < len(states) else None
