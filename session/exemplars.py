"""Choice of exemplars by classes that the previous network predicts (``--memory_choice predicted``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from dataset.exemplars import Exemplar, choose_listed, load_exemplars, save_exemplars
from dataset.incremental import IncrementalDataset
from dataset.loaders import make_eval_loader
from dataset.step_data import DataSpec, candidate_images
from inference.load import load_model
from inference.multiscale import PaddedPrediction
from runs.files import EXEMPLARS, step_file
from segmentation_module import IncrementalSegmentationModule
from session.cached import weights_digest
from session.run import Run
from train import Precision, to_device
from utils import distributed
from utils.errors import UserError
from utils.labels import VOID

log = logging.getLogger(__name__)


def predicted_exemplars(run: Run, step: int) -> list[Exemplar] | None:
    """The exemplars of a step, from its list on disk or chosen anew; None: another choice, or none.

    Candidates are the exemplars of the step before, by the classes that they were chosen by, and that step's
    training images, by the classes of their labels and, from step 2 on, those that its network is certain
    of where the label is background. Rank 0 chooses. Every process must call it.

    Raises:
        UserError: the exemplars or the network of the step before are missing.
    """
    opts = run.opts
    if not opts.memory or step == 0 or opts.memory_choice != "predicted":
        return None
    exemplars: list[Exemplar] | None = None
    with distributed.shared_errors():
        if run.world.is_main:
            exemplars = _exemplars(run, step)
    return list(distributed.broadcast_object(exemplars))


def _exemplars(run: Run, step: int) -> list[Exemplar]:
    opts, folder = run.opts, run.folder
    kept = _kept(run, step) if step > 1 else []
    network = _network(run, step) if step > 1 else None
    images = candidate_images(DataSpec.of(opts), step - 1, is_main=True)
    path = step_file(folder.path, EXEMPLARS, step)
    origin = {
        "rule": "predicted",
        "step": step,
        "memory": opts.memory,
        "seed": opts.random_seed,
        "candidates": images.digest(),
        "exemplars of the step before": [[each.index, each.step, list(each.classes)] for each in kept],
        "network": None if network is None else weights_digest(network),
        "fidelity": opts.fidelity,
    }
    if path.is_file():
        try:
            exemplars = load_exemplars(path, origin)
            log.info("exemplars: loaded from %s", path)
            return exemplars
        except UserError as error:
            log.info("%s; it is made again", error)
    log.info("exemplars: listing the classes of %d images", len(images))
    classes = _listed(run, images, network)
    listed = {entry.index: found for entry, found in zip(images.entries, classes, strict=True)}
    exemplars = choose_listed(kept, listed, step, opts.memory, opts.random_seed)
    save_exemplars(path, exemplars, origin)
    return exemplars


def _kept(run: Run, step: int) -> list[Exemplar]:
    """Exemplars of the step before, beside the checkpoint from which this step starts, or in this run."""
    paths = [
        step_file(folder, EXEMPLARS, step - 1)
        for folder in (run.folder.previous(step).parent, run.folder.path)
    ]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise UserError(
            f"{paths[0]}: no exemplars of step {step - 1}, among which --memory_choice predicted chooses; "
            f"train step {step - 1} with it, or use --memory_choice in_turn"
        )
    return load_exemplars(found, {"rule": "predicted"})


def _network(run: Run, step: int) -> IncrementalSegmentationModule:
    """The previous step's network."""
    opts, folder, device = run.opts, run.folder, run.world.device
    content = folder.load_previous(step)
    model = load_model(folder.spec, content, folder.previous(step), opts.task_, step - 1)
    precision = Precision.of(opts.opt_level, opts.norm_act, device, run.world.bfloat16)
    return precision.place(model).eval()


@torch.inference_mode()
def _listed(
    run: Run, images: IncrementalDataset, network: IncrementalSegmentationModule | None
) -> Iterator[set[int]]:
    """Classes of each image, by its labels and the network."""
    opts, device = run.opts, run.world.device
    precision = Precision.of(opts.opt_level, opts.norm_act, device, run.world.bfloat16)
    logits_of = PaddedPrediction(lambda model, padded: model(padded)[0])
    loader = make_eval_loader(
        images,
        opts.batch_size if opts.fidelity == "released" else 1,
        num_workers=opts.num_workers,
        tolerance=run.tolerance,
    )
    with loader:
        for pictures, targets in loader:
            labels: Tensor = targets.to(device).long()
            if network is not None:
                with precision.network():
                    logits = logits_of(network, to_device(pictures, device))
                labels = network.cls.confident_labels(labels, logits)
            yield from (set(image.unique().tolist()) - {0, VOID} for image in labels)
