"""Progress of a step, and comparison of a checkpoint with a run."""

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
    """Progress of a step.

    Attributes:
        epoch: current epoch, from 0.
        batch: number of its batches done.
        best: best validation mIoU so far.
        unreadable: images skipped by ``--skip_corrupt``.
    """

    epoch: int = 0
    batch: int = 0
    best: float = 0.0
    unreadable: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, content: Mapping[str, Any], batches_per_epoch: int) -> Progress:
        """From a checkpoint; one without a number of batches is at the end of its epoch."""
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
    """Whether a checkpoint holds a step's result: it is at the end of the last epoch.

    Until ``--keep best`` has chosen an epoch, the checkpoint holds ``best`` besides the latest weights.
    ``ended`` is False if it was saved before the methods' ``end_step``; checkpoints of versions without that
    hook have no such key.
    """
    at_end = int(content["epoch"]) + 1 >= epochs and not is_within_epoch(content)
    return at_end and "best" not in content and bool(content.get("ended", True))


def is_within_epoch(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved between two batches of an epoch."""
    return content.get("batch", None) not in (None, content.get("batches_per_epoch"))


def has_same_batches(
    content: Mapping[str, Any],
    options: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    batches_per_epoch: int,
) -> bool:
    """Whether the epoch of a checkpoint has the same images in the same order as this run's."""
    saved, known = saved_options(content), content.get("facts", {})
    decide = ("total batch", "list of training images", "names of the training images")
    return (
        content.get("batches_per_epoch") == batches_per_epoch
        and saved.get("random_seed") == options["random_seed"]
        and all(known.get(name) == fingerprint[name] for name in decide)
    )


def deciding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change the trained weights, except those compared by fingerprint.

    With ``--keep best`` options of the validation are included.
    """
    keep_best = options.get("keep") == "best"
    return {name: value for name, value in options.items() if declared(name).must_agree_on_resume(keep_best)}


def differences(
    content: Mapping[str, Any], options: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> list[str]:
    """Differences between a checkpoint and this run, as texts, e.g. ``--momentum 0.9, now 0.5``.

    Args:
        content: of the checkpoint.
        options: this run's, in JSON types; those known to only one of the two are skipped.
        fingerprint: this run's, by names for the message.
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
    """Job id of the scheduler or launcher; empty without one."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""


def restarted() -> bool:
    """Whether the scheduler or launcher restarted this job (requeued, ``--max-restarts``)."""
    counts = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def rng_of_rank(content: Mapping[str, Any], rank: int) -> dict[str, Tensor] | None:
    """State of a rank's random generators in a checkpoint; None if it has none for this rank."""
    states = content.get("rng_state") or []
    return states[rank] if rank < len(states) else None
