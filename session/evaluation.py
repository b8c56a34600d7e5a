"""Evaluation of a step: confusion matrix, result files, images of predictions."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from argparser import declarations
from dataset.incremental import IncrementalDataset, Substitute
from dataset.loaders import Workers, choose_samples, make_eval_loader
from dataset.step_data import EvaluationData
from inference.multiscale import predict_classes, predictor
from metrics.continual import Results, summarise
from metrics.stream_metrics import StreamSegMetrics
from runs.files import PREDICTIONS, SAMPLES, TENSORBOARD_TASK, results_csv, step_file
from runs.results import write_confusion, write_results
from session.run import Run
from session.tensorboard import RunLogger
from train import Precision, evaluate
from utils import distributed
from utils.drawing import failure_is_a_warning
from utils.labels import VOID
from utils.logger import progress
from utils.visualize import Array, confusion_image, prediction_grid, write_samples

log = logging.getLogger(__name__)


class Evaluation:
    """Evaluates networks and writes the results."""

    def __init__(self, run: Run) -> None:
        self.opts, self.world, self.folder = run.opts, run.world, run.folder
        self.stop, self.reading, self.mirror = run.stop, run.reading, run.mirror
        self.predict = predictor(run.opts.test_scales, run.opts.test_flip, run.opts.fusion_mode)

    def run(
        self,
        model: nn.Module,
        images: IncrementalDataset,
        classes: int,
        precision: Precision,
        workers: Workers | None = None,
    ) -> StreamSegMetrics:
        """Confusion matrix of images, summed over all processes.

        Args:
            model: the network.
            images: what to evaluate on.
            classes: number of classes seen so far.
            precision: number formats of the network.
            workers: read the images; None: workers of their own.

        Raises:
            Stopped: a signal was received.
        """
        opts = self.opts
        if not len(images) and self.world.is_main:
            log.warning("no image to evaluate on: the results are empty")
        batch_size = opts.batch_size if opts.crop_val else 1
        # Running statistics of norm layers differ between processes; use rank 0's, as in training.
        distributed.broadcast_buffers(model)
        with contextlib.ExitStack() as opened:
            if workers is None:
                workers = opened.enter_context(Workers([images], self.world, **self.reading))
            loader = make_eval_loader(images, batch_size, workers, world=self.world)
            batches = progress(
                loader,
                total=len(loader),
                desc="evaluation",
                world=self.world,
                interval=opts.print_interval * 10,
            )
            metrics = evaluate(
                model,
                self.stop.until_set(batches),
                StreamSegMetrics(classes, self.world.device),
                device=self.world.device,
                precision=precision,
                predict=self.predict,
            )
        self.stop.raise_if_set()
        return metrics

    def summarise(
        self,
        step: int,
        data: EvaluationData,
        metrics: StreamSegMetrics,
        earlier: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> Results:
        """Metrics computed from a confusion matrix and the results of earlier steps."""
        return summarise(
            metrics.confusion_matrix,
            data.class_names,
            self.opts.task_.classes_per_step(step),
            ignore=data.ignored,
            earlier=earlier,
        )

    def report(
        self,
        step: int,
        data: EvaluationData,
        metrics: StreamSegMetrics,
        step_writer: RunLogger | None = None,
        differing: Collection[str] = (),
    ) -> None:
        """Log the results of a step; on rank 0 also write them as JSON, CSV and curves.

        Args:
            step: its number.
            data: what was evaluated.
            metrics: the confusion matrix.
            step_writer: writer of the step's own curves, beside those of the whole task.
            differing: options whose values are not those of the training, saved with the results.
        """
        opts = self.opts
        results = self.summarise(step, data, metrics, self.folder.earlier_results(step))
        log.info("step %d, %s protocol\n%s", step, opts.protocol, results.table())
        if self.world.is_main:
            named = {option.name for option in declarations() if option.is_named_with_results} & opts.typed
            values = opts.as_json()
            # First, since the results mark the step as done.
            matrix = write_confusion(self.folder.path, step, metrics.confusion_matrix, data.class_names)
            written = write_results(
                self.folder.path,
                results,
                step=step,
                num_classes=len(opts.task_.order),
                csv_name=results_csv(opts.date, opts.dataset, opts.task, opts.name),
                evaluation={name: values[name] for name in sorted(named | {*differing})},
            )
            log.info("results: %s", ", ".join(map(str, (*written, matrix))))
            with contextlib.closing(self._task_writer()) as writer:
                writer.options(self.folder.options)
                confusion = self._picture(results, metrics)
                writer.results(results, step, confusion)
            if step_writer is not None:
                step_writer.results(results, opts.epochs, confusion)

    def _picture(self, results: Results, metrics: StreamSegMetrics) -> Array | None:
        """The confusion matrix, drawn once for all curves."""
        if not self.opts.visualize and self.mirror is None:
            return None
        names = {index: name for name, index in results.indices.items()}
        matrix = metrics.confusion_matrix
        with failure_is_a_warning("the picture of the confusion matrix"):
            return confusion_image(matrix, [names.get(i, "not evaluated") for i in range(len(matrix))])
        return None

    def _task_writer(self) -> RunLogger:
        """Writer of the whole task's curves: a point and an image per step."""
        path = self.folder.path / TENSORBOARD_TASK
        return RunLogger(self.world, path, enabled=self.opts.visualize, mirror=self.mirror)

    def images(
        self,
        step: int,
        data: EvaluationData,
        networks: tuple[nn.Module, nn.Module | None],
        precision: Precision,
        writer: RunLogger,
    ) -> None:
        """Write ``--sample_num`` images, the same in every step, with their labels and predictions.

        ``networks`` are those of this step and of the previous one.
        """
        images, targets = self._samples(data)
        if not images:
            return

        def predicted(network: nn.Module) -> list[Tensor]:
            network.eval()
            options: Any = {"device": self.world.device, "precision": precision, "predict": self.predict}
            return [predict_classes(network, image, **options) for image in images]

        # By dataset class ids, so that a class has the same colour in every class order.
        seen = self.opts.task_.seen_classes(step)
        ids = torch.full((256,), VOID)
        ids[: len(seen)] = torch.tensor(seen)

        def by_id(masks: list[Tensor]) -> list[Tensor]:
            return [ids[mask.long()] for mask in masks]

        model, previous = networks
        truth, found = by_id(targets), by_id(predicted(model))
        before = None if previous is None else by_id(predicted(previous))
        path = step_file(self.folder.path, PREDICTIONS, step)
        names = dict(zip(seen, data.class_names, strict=True))
        with failure_is_a_warning(f"the images of step {step}"):
            write_samples(self.folder.path / SAMPLES, images, truth, found, step)
            grid = prediction_grid(images, truth, found, names, old_predictions=before, path=path)
            writer.image("predictions", grid, self.opts.epochs)
            with contextlib.closing(self._task_writer()) as whole:
                whole.image("predictions", grid, step)
            log.info("images of predictions: %s", path)

    def _samples(self, data: EvaluationData) -> tuple[list[Tensor], list[Tensor]]:
        """The images to show and their labels; empty except on rank 0."""
        images: list[Tensor] = []
        targets: list[Tensor] = []
        count = min(self.opts.sample_num, len(data.test)) if self.world.is_main else 0
        for index in choose_samples(len(data.test), count, self.opts.random_seed):
            sample = data.test[index]
            image, target, *_ = sample.sample if isinstance(sample, Substitute) else sample
            images.append(image)
            targets.append(target)
        return images, targets
