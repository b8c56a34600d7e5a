"""Objects shared by all steps of a run on one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from argparser import Options
from dataset.loaders import Tolerance
from runs.folder import RunFolder
from session.wandb_mirror import WandbMirror
from train import Precision
from utils.distributed import World
from utils.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """A run on this process.

    Attributes:
        opts: checked options.
        world: this process.
        folder: files of the run.
        stop: whether this process received a signal.
        tolerance: unreadable images so far, over all steps.
        mirror: the run of wandb on rank 0 with ``--wandb``, else None.
    """

    opts: Options
    world: World
    folder: RunFolder
    stop: StopRequest
    tolerance: Tolerance
    mirror: WandbMirror | None = None

    def precision(self) -> Precision:
        """Number formats of the networks, with a loss scaling of their own."""
        return Precision.of(self.opts, self.world.device, self.world.bfloat16)

    @property
    def reading(self) -> dict[str, Any]:
        """How loaders read: ``num_workers`` and ``tolerance``."""
        return {"num_workers": self.opts.num_workers, "tolerance": self.tolerance}
