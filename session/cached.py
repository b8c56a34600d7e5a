"""Cache of tensors that methods compute over a step's training set, for the next start of the step."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.checks import shown
from runs.checkpoint import load_checkpoint, save_checkpoint
from runs.files import CACHED
from runs.folder import RunFolder
from utils import distributed
from utils.distributed import World
from utils.errors import UserError
from utils.randomness import rng_state, set_rng_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """``Context.cached``: loads tensors that an earlier start computed from the same inputs, else computes.

    Attributes:
        folder: of the run; it gets a file ``<name>_<step>.pth``.
        world: this process.
        step: number of the step.
        origin: everything on which the tensors may depend, in JSON types: digests of weights and samples, and
            options. Called on rank 0 only.
    """

    folder: RunFolder
    world: World
    step: int
    origin: Callable[[], dict[str, Any]]

    def __call__(
        self, name: str, inputs: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of ``compute``, on this process's device. Every process must call it.

        Raises:
            UserError: ``compute`` returned something else.
        """
        path = self.folder.path / CACHED.format(name=name, step=self.step)
        computed_from, values = "", None
        with distributed.shared_errors():
            if self.world.is_main:
                computed_from = json.dumps({"inputs": inputs, **self.origin()}, sort_keys=True, default=str)
                stored = load_checkpoint(path) if path.is_file() else {}
                if stored.get("computed_from") == computed_from:
                    values = dict(stored["values"])
        # Other processes may not see rank 0's file yet.
        values = distributed.broadcast_object(values)
        if values is not None:
            log.info("%s: loaded from %s", name, path)
            return {k: v.to(self.world.device) for k, v in values.items()}
        # What ``compute`` draws must not shift the random numbers of this start against one that loads.
        rng = rng_state(self.world.device)
        values = compute()
        if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
            what = f"compute returned {shown(values)}; return a dict of tensors by name"
            raise UserError(f"context.cached('{name}', ...): {what}")
        set_rng_state(rng, self.world.device)
        with distributed.shared_errors():
            if self.world.is_main:
                plain = {k: v.cpu() for k, v in values.items()}
                save_checkpoint(path, {"computed_from": computed_from, "values": plain})
        return values


def weights_digest(network: nn.Module) -> str:
    """sha256 of all weights and buffers of a network, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
