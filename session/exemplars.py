"""Choice of exemplars by classes that the previous network predicts (``--memory_choice predicted``)."""

from __future__ import annotations

import hashlib
import logging

import torch
from torch import Tensor

from dataset.exemplars import Exemplar, choose_listed, load_exemplars, save_exemplars, stored_exemplars
from dataset.incremental import IncrementalDataset
from dataset.loaders import EvalBatchSampler, Workers, make_eval_loader
from dataset.step_data import DataSpec, candidate_images
from inference.load import load_model
from inference.multiscale import PaddedPrediction
from runs.files import EXEMPLARS, step_file
from segmentation_module import IncrementalSegmentationModule
from session.cached import weights_digest
from session.run import Run
from train import to_device
from utils import distributed
from utils.errors import UserError
from utils.labels import VOID

log = logging.getLogger(__name__)


def predicted_exemplars(run: Run, step: int) -> list[Exemplar] | None:
    """The exemplars of a step, from its list on disk or chosen anew; None: another choice, or none.

    Candidates are the exemplars of the step before, by the classes that they were chosen by, and that step's
    training images, by the classes of their labels and, from step 2 on, those that its network is certain
    of where the label is background. Every process lists a part of the images; rank 0 chooses.

    Raises:
        UserError: the exemplars or the network of the step before are missing.
        Stopped: a signal was received.
    """
    opts, is_main = run.opts, run.world.is_main
    if not opts.memory or step == 0 or opts.memory_choice != "predicted":
        return None
    with distributed.shared_errors():
        network = _network(run, step) if step > 1 else None
        images = candidate_images(DataSpec.of(opts), step - 1, is_main=is_main)
        names = [path.name for path in images.dataset.images]
        kept = _kept(run, step, names) if step > 1 else []
        origin = {
            **_identity(names),
            "step": step,
            "memory": opts.memory,
            "seed": opts.random_seed,
            "candidates": images.digest(),
            "exemplars of the step before": [[each.index, each.step, list(each.classes)] for each in kept],
            "network": None if network is None else weights_digest(network),
            "fidelity": opts.fidelity,
        }
        path = step_file(run.folder.path, EXEMPLARS, step)
        exemplars = stored_exemplars(path, origin) if is_main else None
    if (loaded := distributed.broadcast_object(exemplars)) is not None:
        return list(loaded)
    log.info("exemplars: listing the classes of %d images", len(images))
    with distributed.shared_errors():
        mine = _listed(run, images, network)
    run.stop.raise_if_set()
    parts = distributed.gather_objects(mine)
    with distributed.shared_errors():
        if is_main:
            listed = {index: classes for part in parts for index, classes in part.items()}
            exemplars = choose_listed(kept, listed, step, opts.memory, opts.random_seed)
            save_exemplars(path, exemplars, origin)
    return list(distributed.broadcast_object(exemplars))


def _identity(names: list[str]) -> dict[str, str]:
    """What lists of exemplars of successive steps have in common: the rule and the images."""
    return {"rule": "predicted", "images": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def _kept(run: Run, step: int, names: list[str]) -> list[Exemplar]:
    """Exemplars of the step before, beside the checkpoint from which this step starts.

    That may be in the folder of ``--checkpoint``; then they are in the run's own.
    """
    previous = run.folder.previous(step)
    own = previous == run.folder.checkpoint(step - 1)
    path = step_file(run.folder.path if own else previous.parent, EXEMPLARS, step - 1)
    if not path.is_file():
        raise UserError(
            f"{path}: no exemplars of step {step - 1}, among which --memory_choice predicted chooses; "
            f"train step {step - 1} with it, or use --memory_choice in_turn"
        )
    return load_exemplars(path, _identity(names))


def _network(run: Run, step: int) -> IncrementalSegmentationModule:
    """The previous step's network."""
    folder, content = run.folder, run.folder.load_previous(step)
    model = load_model(folder.spec, content, folder.previous(step), run.opts.task_, step - 1)
    return run.precision().place(model).eval()


@torch.inference_mode()
def _listed(
    run: Run, images: IncrementalDataset, network: IncrementalSegmentationModule | None
) -> dict[int, set[int]]:
    """Classes of this process's part of the images, by their labels and the network."""
    opts, device = run.opts, run.world.device
    precision = run.precision()
    logits_of = PaddedPrediction(lambda model, padded: model(padded)[0])
    batch_size = opts.batch_size if opts.fidelity == "released" else 1
    found: dict[int, set[int]] = {}
    with Workers([images], run.world, **run.reading) as workers:
        loader = make_eval_loader(images, batch_size, workers, world=run.world)
        assert isinstance(loader.batches, EvalBatchSampler)
        numbers = (key.index for batch in loader.batches for key in batch)
        for pictures, targets in run.stop.until_set(loader):
            labels: Tensor = targets.to(device).long()
            if network is not None:
                with precision.network():
                    logits = logits_of(network, to_device(pictures, device))
                labels = network.cls.confident_labels(labels, logits)
            for image in labels:
                found[images.entries[next(numbers)].index] = set(image.unique().tolist()) - {0, VOID}
    return found
