"""One run: data, networks, methods and files of each step, put together around the ``Trainer``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from argparser import Options
from dataset.incremental import IncrementalDataset
from dataset.loaders import EpochSampler, Loader, choose_samples, make_eval_loader, make_train_loader
from dataset.step_data import EvaluationData, StepData, evaluation_data, step_data
from methods import Context, Method, build_methods
from metrics.continual import Results, summarise, write_results
from metrics.stream_metrics import StreamSegMetrics
from modules.pretrained import LoadReport, load_default_pretrained, load_pretrained
from segmentation_module import IncrementalSegmentationModule, freeze, load_state, make_model
from train import Precision, Trainer, evaluate, to_device
from utils import distributed
from utils.checkpoint import (
    check_fits,
    checkpoint_path,
    load_checkpoint,
    make_manifest,
    model_state,
    save_checkpoint,
)
from utils.distributed import World
from utils.errors import UserError
from utils.inference import FusedPrediction
from utils.logger import RunLogger, progress, setup_logging
from utils.scheduler import make_scheduler
from utils.visualize import prediction_grid

log = logging.getLogger(__name__)


class Session:
    """The steps of one run on this process.

    Args:
        opts: checked options.
        world: this process among the others.
    """

    def __init__(self, opts: Options, world: World) -> None:
        self.opts = opts
        self.world = world
        self.device = world.device
        run_name = f"{opts.task}-{opts.dataset}_{opts.name}"
        self.run_dir = opts.logdir / run_name
        setup_logging(world, self.run_dir, debug=opts.debug)
        log.info("%s", opts.summary())
        for note in opts.notes:
            log.info(note)

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def checkpoint(self, step: int) -> Path:
        """Checkpoint of a step under its published name."""
        opts = self.opts
        path = checkpoint_path(opts.logdir, opts.task, opts.dataset, opts.name, step)
        return path if opts.checkpoint is None else opts.checkpoint / path.name

    def _load(self, path: Path, step: int) -> dict[str, Any]:
        """A checkpoint that fits this run's network and task at a step."""
        content = load_checkpoint(path)
        opts = self.opts
        check_fits(
            content,
            path=path,
            task=opts.task,
            dataset=opts.dataset,
            class_order=[list(ids) for ids in opts.task_.steps],
            step=step,
            model=opts.model,
            backbone=opts.backbone,
            norm_act=opts.norm_act,
            decoder=opts.decoder,
        )
        return content

    # ── testing ──────────────────────────────────────────────────────────────────────────────────

    def test(self, step: int) -> None:
        """Evaluate a step's checkpoint on the final images."""
        path = self.opts.ckpt or self.checkpoint(step)
        content = self._load(path, step)
        model = make_model(self.opts, self.opts.task_.classes_per_step(step))
        load_state(model, model_state(content))
        precision = Precision(self.opts.opt_level, self.device)
        model = precision.cast(model.to(self.device))
        data = evaluation_data(self.opts, step)
        log.info("testing %s on %d images", path, len(data.test))
        self._report(step, data, self._evaluate(model, data.test, len(data.class_names), precision))

    def _evaluate(
        self, model: nn.Module, images: IncrementalDataset, classes: int, precision: Precision
    ) -> StreamSegMetrics:
        opts = self.opts
        loader = make_eval_loader(
            images,
            opts.batch_size if opts.crop_val else 1,
            num_workers=opts.num_workers,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.device,
        )
        fused = len(opts.test_scales) > 1 or opts.test_scales != [1.0] or opts.test_flip
        predict = FusedPrediction(opts.test_scales, opts.test_flip, opts.fusion_mode) if fused else None
        batches = progress(
            loader, total=len(loader), desc="evaluation", world=self.world, interval=opts.print_interval * 10
        )
        return evaluate(
            model,
            batches,
            StreamSegMetrics(classes, self.device),
            device=self.device,
            precision=precision,
            predict=predict,
        )

    def _report(self, step: int, data: EvaluationData, metrics: StreamSegMetrics) -> Results:
        """Results of a step in the log and, from rank 0, as JSON and CSV in the run's folder."""
        task = self.opts.task_
        results = summarise(
            metrics.confusion_matrix,
            data.class_names,
            old_classes=len(task.old_classes(step)) if step else 0,
            ignore=data.ignored,
            learnt_iou=self._learnt_iou(step),
        )
        log.info("step %d, %s protocol\n%s", step, self.opts.protocol, results.table())
        if self.world.is_main:
            prefix = f"{self.opts.date}_" if self.opts.date else ""
            name = f"{prefix}{self.opts.dataset}_{self.opts.task}_{self.opts.name}.csv"
            written = write_results(
                self.run_dir, results, step=step, num_classes=len(task.order), csv_name=name
            )
            log.info("results: %s", ", ".join(str(path) for path in written))
        return results

    def _learnt_iou(self, step: int) -> dict[str, float]:
        """IoU of each class after the step that learnt it, from the results of the earlier steps."""
        learnt: dict[str, float] = {}
        for earlier in range(step):
            path = self.run_dir / f"results_{earlier}.json"
            if path.is_file():
                for name, iou in json.loads(path.read_text(encoding="utf-8"))["class_iou"].items():
                    if iou is not None:
                        learnt.setdefault(name, iou)
        return learnt

    # ── training ─────────────────────────────────────────────────────────────────────────────────

    def train(self, step: int, lr: float) -> None:
        """Train a step from its start or from where its checkpoint stands, then evaluate it."""
        opts, world = self.opts, self.world
        path = self.checkpoint(step)
        resumed = self._resumable(path, step)
        torch.manual_seed(opts.random_seed + step)
        data = step_data(
            opts, step, exemplar_list=self.run_dir / f"exemplars_{step}.json", is_main=world.is_main
        )
        sampler, loader = self._train_loader(data)
        log.info(
            "step %d of task %s: %d training images, %d for the final evaluation, %d classes, total batch %d",
            step,
            opts.task,
            len(data.train) - data.num_memory,
            len(data.test),
            len(data.class_names),
            opts.batch_size * world.size,
        )
        precision = Precision(opts.opt_level, self.device)
        context = self._networks(step, precision)
        context.batches = lambda: self._training_pass(sampler, loader)
        if resumed is not None:
            load_state(context.model, model_state(resumed))
        methods = self._methods(context, resumed)
        forward = self._wrap(context.model)
        optimizer = self._optimizer(context.model, methods, lr)
        iterations = opts.epochs * sampler.batches_per_epoch
        scheduler = make_scheduler(
            optimizer,
            opts.lr_policy,
            max_iters=iterations,
            lr_power=opts.lr_power,
            lr_decay_step=opts.lr_decay_step,
            lr_decay_factor=opts.lr_decay_factor,
            warmup_iters=round(opts.warmup * iterations),
        )
        trainer = Trainer(context, methods, optimizer, scheduler, forward=forward, precision=precision)
        first_epoch, best = 0, 0.0
        if resumed is not None:
            first_epoch, best = resumed["epoch"] + 1, resumed["best_score"]
            optimizer.load_state_dict(resumed["optimizer_state"])
            scheduler.load_state_dict(resumed["scheduler_state"])
            precision.scaler.load_state_dict(resumed["scaler_state"])
            log.info("step %d goes on at epoch %d of %d", step, first_epoch + 1, opts.epochs)
        board = RunLogger(world, self.run_dir / f"step_{step}", enabled=opts.visualize)
        try:
            for epoch in range(first_epoch, opts.epochs):
                sampler.set_epoch(epoch)
                # Dropout and drop path of epoch e are the same in a resumed run.
                torch.manual_seed(opts.random_seed + 1000 * (epoch + 1) + world.rank)
                self._train_epoch(trainer, loader, sampler, epoch, step, board)
                last = epoch + 1 == opts.epochs
                if not last and (epoch + 1) % opts.val_interval == 0:
                    score = self._validate(trainer, data, step, epoch, board)
                    best = max(best, score)
                if last or (epoch + 1) % opts.ckpt_interval == 0:
                    self._save(path, trainer, step, epoch, best)
            metrics = self._evaluate(context.model, data.test, len(data.class_names), precision)
            results = self._report(step, data, metrics)
            board.scalar("miou/all", results.miou_all, opts.epochs)
            self._pictures(context.model, data, step, precision, board)
        finally:
            board.close()

    def _resumable(self, path: Path, step: int) -> dict[str, Any] | None:
        """The checkpoint to continue this step from: ``--ckpt``, or an unfinished one of this run."""
        opts = self.opts
        if opts.ckpt is not None:
            content = self._load(opts.ckpt, step)
        elif path.is_file() and not opts.fresh:
            content = self._load(path, step)
            if content["epoch"] + 1 >= opts.epochs:
                log.info("%s is complete; step %d starts over", path, step)
                return None
        else:
            return None
        if "optimizer_state" not in content:
            raise UserError(
                f"{opts.ckpt or path} holds no optimiser state to continue from; give it to --step_ckpt"
            )
        return content

    def _train_loader(self, data: StepData) -> tuple[EpochSampler, Loader]:
        opts, world = self.opts, self.world
        loader = make_train_loader(
            data.train,
            opts.batch_size,
            num_memory=data.num_memory,
            seed=opts.random_seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=opts.num_workers,
            device=self.device,
        )
        sampler = loader.sampler
        assert isinstance(sampler, EpochSampler)
        return sampler, loader

    def _training_pass(self, sampler: EpochSampler, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """This step's training batches once, as epoch 0 draws them."""
        sampler.set_epoch(0)
        for images, targets, *_ in loader:
            yield to_device(images, self.device), targets.to(self.device).long()

    def _networks(self, step: int, precision: Precision) -> Context:
        """Student and teacher of a step; the student starts from the previous step or from ImageNet."""
        opts, task = self.opts, self.opts.task_
        model = make_model(opts, task.classes_per_step(step))
        model_old = None
        if step == 0:
            if not opts.no_pretrained:
                log.info(self._pretrained(model).summary())
            self.previous: dict[str, Any] = {}
            self.previous_path: Path | None = None
        else:
            self.previous_path = opts.step_ckpt if opts.step_ckpt and step == opts.steps[0] else None
            self.previous_path = self.previous_path or self.checkpoint(step - 1)
            self.previous = self._load(self.previous_path, step - 1)
            state = model_state(self.previous)
            model_old = make_model(opts, task.classes_per_step(step - 1))
            load_state(model_old, state)
            freeze(model_old).eval()
            model.load_previous(state)
            log.info("previous step: %s", self.previous_path)
            if opts.init_balanced and not opts.unknown:
                model.init_new_classifier()
        if opts.fix_bn:
            model.fix_bn()
        if opts.freeze:
            for parameter in model.network.body.parameters():
                parameter.requires_grad_(False)
        self._check_feat_dim(model)
        model = self._place(model, precision)
        if model_old is not None:
            model_old = self._place(model_old, precision)
        return Context(
            task=task,
            step=step,
            model=model,
            model_old=model_old,
            device=self.device,
            protocol=opts.protocol,
            fidelity=opts.fidelity,
            reduce=distributed.all_reduce_sum,
            recall=self._recall(step),
            autocast=precision.network,
        )

    def _place(
        self, model: IncrementalSegmentationModule, precision: Precision
    ) -> IncrementalSegmentationModule:
        return precision.cast(model.to(self.device).to(memory_format=torch.channels_last))

    def _pretrained(self, model: IncrementalSegmentationModule) -> LoadReport:
        """Load ImageNet weights: the user's file, or what the published code starts from."""
        opts = self.opts
        if opts.pretrained_path is not None:
            return load_pretrained(model.network, path=opts.pretrained_path)
        # One process downloads, the others then find the file.
        if not self.world.is_main:
            distributed.barrier()
        report = load_default_pretrained(
            model.network,
            model=opts.model,
            backbone=opts.backbone,
            norm_act=opts.norm_act,
        )
        if self.world.is_main:
            distributed.barrier()
        return report

    def _check_feat_dim(self, model: IncrementalSegmentationModule) -> None:
        channels = int(model.network.body_channels)
        if "feat_dim" in self.opts.typed and channels != self.opts.feat_dim:
            raise UserError(
                f"--feat_dim {self.opts.feat_dim:g}: this network's body has {channels} channels; drop it"
            )

    def _methods(self, context: Context, resumed: dict[str, Any] | None) -> dict[str, Method]:
        """The methods, with the previous step's state, or an interrupted run's, and their networks' needs."""
        methods = build_methods(self.opts, context.step)
        state = (resumed or self.previous).get("method_state", {})
        for name, method in methods.items():
            if name in state:
                method.load_state_dict(state[name])
        needs = frozenset().union(*(method.needs for method in methods.values()))
        teacher = frozenset().union(*(m.needs for m in methods.values() if m.needs_teacher))
        context.model.intermediates = needs  # type: ignore[assignment]
        if context.model_old is not None:
            context.model_old.intermediates = teacher  # type: ignore[assignment]
            if not any(method.uses_teacher for method in methods.values()):
                context.model_old = None  # fine-tuning needs no teacher: save its forward pass
        for method in methods.values():
            method.begin_step(context)
        log.info("methods: %s", ", ".join(methods))
        return methods

    def _recall(self, step: int) -> Callable[..., dict[str, Tensor]]:
        """Keep what a method computed over the whole training set in the run's folder (Context.recall)."""

        def recall(
            name: str, inputs: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
        ) -> dict[str, Tensor]:
            opts = self.opts
            key = {
                **inputs,
                "checkpoint": str(self.previous_path),
                "weights": _fingerprint(model_state(self.previous)) if self.previous else None,
                "data": [opts.dataset, str(opts.data_root), opts.task, opts.protocol, step],
                "batch": [opts.batch_size, self.world.size, opts.crop_size, opts.random_seed],
            }
            path = self.run_dir / f"{name}_{step}.pth"
            if path.is_file():
                stored = load_checkpoint(path)
                if stored.get("computed_from") == json.dumps(key, sort_keys=True):
                    log.info("%s: taken from %s", name, path)
                    return {k: v.to(self.device) for k, v in stored["values"].items()}
            values = compute()
            if self.world.is_main:
                plain = {k: v.cpu() for k, v in values.items()}
                save_checkpoint(path, {"computed_from": json.dumps(key, sort_keys=True), "values": plain})
            return values

        return recall

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward trains: synchronised over processes where there are several."""
        if self.world.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def _optimizer(self, model: nn.Module, methods: dict[str, Method], lr: float) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum; one group of parameters per learning rate."""
        opts = self.opts
        newest = f"cls.{len(model.cls) - 1}."  # type: ignore[arg-type]
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            factor = math.prod(method.lr_factor(name) for method in methods.values())
            if opts.lr_old is not None and name.startswith("cls.") and not name.startswith(newest):
                factor *= opts.lr_old
            groups.setdefault(factor, []).append(parameter)
        if not groups:
            raise UserError("no weight is left to train: drop --freeze or --fix_bn")
        return torch.optim.SGD(
            [{"params": parameters, "lr": lr * factor} for factor, parameters in groups.items()],
            lr=lr,
            momentum=opts.momentum,
            weight_decay=opts.weight_decay,
            nesterov=opts.momentum > 0,
        )

    def _train_epoch(
        self,
        trainer: Trainer,
        loader: Loader,
        sampler: EpochSampler,
        epoch: int,
        step: int,
        board: RunLogger,
    ) -> None:
        opts = self.opts
        began = time.perf_counter()
        done = epoch * sampler.batches_per_epoch

        def report(position: int, terms: dict[str, float]) -> None:
            board.scalars({f"loss/{name}": value for name, value in terms.items()}, done + position)
            board.scalar("lr", trainer.optimizer.param_groups[0]["lr"], done + position)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            log.debug("step %d epoch %d batch %d: %s", step, epoch + 1, position, shown)

        batches = progress(
            loader,
            total=sampler.batches_per_epoch,
            desc=f"step {step} epoch {epoch + 1}/{opts.epochs}",
            world=self.world,
            interval=opts.print_interval,
        )
        means = trainer.train_epoch(batches, epoch, interval=opts.print_interval, report=report)
        seconds = time.perf_counter() - began
        images = sampler.batches_per_epoch * opts.batch_size * self.world.size
        board.scalar("images_per_second", images / seconds, epoch + 1)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        log.info(
            "step %d epoch %d/%d: %s (%.1f images/s)", step, epoch + 1, opts.epochs, shown, images / seconds
        )

    def _validate(self, trainer: Trainer, data: StepData, step: int, epoch: int, board: RunLogger) -> float:
        metrics = self._evaluate(trainer.context.model, data.val, len(data.class_names), trainer.precision)
        results = summarise(
            metrics.confusion_matrix,
            data.class_names,
            old_classes=len(self.opts.task_.old_classes(step)) if step else 0,
            ignore=data.ignored,
        )
        board.scalar("miou/all", results.miou_all, epoch + 1)
        log.info("step %d epoch %d: validation mIoU %.2f %%", step, epoch + 1, 100 * results.miou_all)
        return results.miou_all

    def _save(self, path: Path, trainer: Trainer, step: int, epoch: int, best: float) -> None:
        """Write the checkpoint from rank 0; every process waits until it is whole."""
        methods = {name: method.state_dict() for name, method in trainer.methods.items()}
        if self.world.is_main:
            assert trainer.scheduler is not None
            opts = self.opts
            content = {
                "epoch": epoch,
                "best_score": best,
                "model_state": trainer.context.model.state_dict(),
                "optimizer_state": trainer.optimizer.state_dict(),
                "scheduler_state": trainer.scheduler.state_dict(),
                "scaler_state": trainer.precision.scaler.state_dict(),
                "method_state": methods,
                "manifest": make_manifest(
                    task=opts.task,
                    dataset=opts.dataset,
                    steps=[list(ids) for ids in opts.task_.steps],
                    step=step,
                    model=opts.model,
                    backbone=opts.backbone,
                    decoder=opts.decoder,
                    norm_act=opts.norm_act,
                    options=opts.as_dict(),
                ),
            }
            save_checkpoint(path, content)
        distributed.barrier()

    def _pictures(
        self, model: nn.Module, data: StepData, step: int, precision: Precision, board: RunLogger
    ) -> None:
        """``--sample_num`` images of the evaluation, the same in every step, beside truth and prediction."""
        count = min(self.opts.sample_num, len(data.test))
        if not count or not self.world.is_main:
            return
        model.eval()
        images, targets, predictions = [], [], []
        for index in choose_samples(len(data.test), count, self.opts.random_seed):
            image, target, *_ = data.test[index]
            with torch.no_grad(), precision.network():
                logits, _ = model(to_device(image[None], self.device))
                scores = model.scores(logits)  # type: ignore[operator]
            images.append(image)
            targets.append(target)
            predictions.append(scores.argmax(1)[0].cpu())
        path = self.run_dir / f"predictions_{step}.png"
        picture = prediction_grid(images, targets, predictions, data.class_names, path=path)
        board.image("predictions", picture, self.opts.epochs)
        log.info("pictures: %s", path)


def _fingerprint(state: dict[str, Tensor]) -> list[float]:
    """A few sums that change when any weight of a network does."""
    tensors = [tensor.double() for tensor in state.values()]
    return [float(sum(t.sum() for t in tensors)), float(sum(t.square().sum() for t in tensors))]
