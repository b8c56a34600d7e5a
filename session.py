"""One run: data, networks, methods and files of each step, put together around the ``Trainer``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from argparser import Options
from dataset.incremental import IncrementalDataset, Substitute
from dataset.loaders import (
    EpochSampler,
    Loader,
    Tolerance,
    choose_samples,
    make_eval_loader,
    make_train_loader,
)
from dataset.splits import list_digest
from dataset.step_data import EvaluationData, StepData, evaluation_data, step_data
from methods import Context, Method, build_methods
from metrics.continual import Results, summarise, write_results
from metrics.stream_metrics import StreamSegMetrics
from modules.pretrained import LoadReport, load_default_pretrained, load_pretrained
from segmentation_module import IncrementalSegmentationModule, freeze, load_state, make_model
from train import NonFiniteLoss, Precision, Trainer, evaluate, to_device
from utils import distributed
from utils.checkpoint import (
    check_fits,
    checkpoint_path,
    load_checkpoint,
    make_manifest,
    model_state,
    save_checkpoint,
    save_id,
    saved_options,
)
from utils.distributed import World
from utils.errors import UserError
from utils.files import FolderLock
from utils.inference import FusedPrediction
from utils.logger import RunLogger, progress, setup_logging
from utils.randomness import make_deterministic, rng_state, set_rng_state
from utils.resume import Progress, differences, is_trained, job_id, restarted, rng_of_rank
from utils.scheduler import make_scheduler
from utils.signals import Stopped, StopRequest
from utils.visualize import prediction_grid

log = logging.getLogger(__name__)

_GO_ON, _SAVE, _END = 0, 1, 2  # ballots after a batch; the highest wins


@dataclass
class StepRun:
    """A step in training.

    Attributes:
        step: its number.
        path: its checkpoint.
        data, sampler, loader: its images, and the order of those that train.
        trainer: with networks, methods and optimiser.
        scheduler: of the learning rate.
        board: TensorBoard.
        progress: how far it is.
        manifest, facts: what its checkpoint says about itself.
        saved: epoch and batch at which the checkpoint on the disk stands.
    """

    step: int
    path: Path
    data: StepData
    sampler: EpochSampler
    loader: Loader
    trainer: Trainer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    board: RunLogger
    progress: Progress
    manifest: dict[str, Any]
    facts: dict[str, Any]
    saved: tuple[int, int] | None = None

    @property
    def model(self) -> Any:
        """The student, not wrapped."""
        return self.trainer.context.model

    @property
    def precision(self) -> Precision:
        """How it computes."""
        return self.trainer.precision


class Session:
    """The steps of one run on this process.

    Args:
        opts: checked options.
        world: this process among the others.

    Raises:
        UserError: the run's folder cannot be written or belongs to another run.
    """

    def __init__(self, opts: Options, world: World) -> None:
        self.opts = opts
        self.world = world
        self.device = world.device
        run_name = f"{opts.task}-{opts.dataset}_{opts.name}"
        self.run_dir = opts.logdir / run_name
        self.stop = StopRequest().listen()
        self.vote = distributed.Vote()
        self.tolerance = Tolerance(opts.skip_corrupt)
        self._last_save = time.monotonic()
        self._options = json.loads(json.dumps(opts.as_dict(), default=str))
        if opts.deterministic:
            make_deterministic()
        with distributed.shared_errors():
            self._lock = FolderLock(self.run_dir, "choose another --logdir") if world.is_main else None
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
            tolerance=self.tolerance,
        )
        fused = len(opts.test_scales) > 1 or opts.test_scales != [1.0] or opts.test_flip
        predict = FusedPrediction(opts.test_scales, opts.test_flip, opts.fusion_mode) if fused else None
        batches = progress(
            loader, total=len(loader), desc="evaluation", world=self.world, interval=opts.print_interval * 10
        )
        # Running statistics of norm layers differ between processes; the first one's count, as in training.
        distributed.broadcast_buffers(model)
        metrics = evaluate(
            model,
            self._until_told(batches),
            StreamSegMetrics(classes, self.device),
            device=self.device,
            precision=precision,
            predict=predict,
        )
        self._end_if_told()
        return metrics

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
        """Train a step from its start or from where its checkpoint stands, then evaluate it.

        Raises:
            Stopped: a signal came; the step is saved and goes on when the command is given again.
        """
        self._end_if_told()
        facts = self._facts(step, lr)
        with distributed.shared_errors():
            resumed = self._begun(step, facts)
        self._check_same_file(resumed, step)
        if resumed is not None and self._is_done(resumed, step):
            log.info("step %d is done (%s); --fresh starts it over", step, self.checkpoint(step))
            return
        run = self._prepare(step, lr, resumed, facts)
        try:
            self._run_epochs(run, resumed)
            metrics = self._evaluate(run.model, run.data.test, len(run.data.class_names), run.precision)
            self._pictures(run)
            with distributed.shared_errors():
                results = self._report(step, run.data, metrics)
            run.board.scalar("miou/all", results.miou_all, self.opts.epochs)
        finally:
            run.board.close()
        if self.tolerance.reasons:
            listed = "; ".join(sorted(self.tolerance.reasons))
            log.warning("%d unreadable images were passed over: %s", len(self.tolerance.reasons), listed)

    def _facts(self, step: int, lr: float) -> dict[str, Any]:
        """What beside the options must be the same for a step to go on, by the words for a message."""
        previous = None if step == 0 else save_id(self._previous_path(step))
        return {
            "--lr": lr,
            "total batch": self.opts.batch_size * self.world.size,
            "number of processes": self.world.size,
            "previous step's checkpoint": previous,
        }

    def _begun(self, step: int, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The checkpoint that a step goes on from: this run's own, or ``--ckpt``, or none.

        Raises:
            UserError: it is of a run with other options, or cannot be continued.
        """
        opts, path = self.opts, self.checkpoint(step)
        content = None
        # A job that was requeued with --fresh goes on with what it has done itself.
        if path.is_file() and (opts.resume == "auto" or restarted()):
            content = self._load(path, step)
            own_start = saved_options(content).get("ckpt") == self._options["ckpt"]
            own_job = content.get("job") == job_id() != ""
            if not (own_job if opts.resume == "fresh" else own_start):
                content = None
        if content is not None:
            self._check_same_run(path, content, facts)
        elif opts.ckpt is not None:
            path, content = opts.ckpt, self._load(opts.ckpt, step)
            if differing := differences(content, self._options, facts):
                log.warning("%s was trained otherwise: %s", path, "; ".join(differing))
        if content is not None and "optimizer_state" not in content and not is_trained(content, opts.epochs):
            raise UserError(f"{path} holds no optimiser state to continue from; give it to --step_ckpt")
        return content

    def _check_same_run(self, path: Path, content: dict[str, Any], facts: dict[str, Any]) -> None:
        if differing := differences(content, self._options, facts):
            raise UserError(
                f"{path} was trained otherwise: {'; '.join(differing)}; give the same options to go on, "
                "--fresh to start the step over, or another --name"
            )

    def _check_same_file(self, content: dict[str, Any] | None, step: int) -> None:
        seen = distributed.gather_objects(None if content is None else content.get("save_id", ""))
        if len(set(seen)) > 1:
            raise UserError(
                f"{self.checkpoint(step)}: not the same file for every process; --logdir must be a folder "
                "that all machines share"
            )

    def _is_done(self, content: dict[str, Any], step: int) -> bool:
        """Whether a step is trained and evaluated: its results are written last."""
        trained = is_trained(content, self.opts.epochs)
        own = self.opts.ckpt is None or saved_options(content).get("ckpt") == self._options["ckpt"]
        return trained and own and self._results(step).is_file()

    def _results(self, step: int) -> Path:
        return self.run_dir / f"results_{step}.json"

    def _prepare(
        self, step: int, lr: float, resumed: dict[str, Any] | None, facts: dict[str, Any]
    ) -> StepRun:
        """Data, networks, methods and optimiser of a step, as at its start or as a checkpoint has them."""
        opts, world = self.opts, self.world
        torch.manual_seed(opts.random_seed + step)
        with distributed.shared_errors():
            data = step_data(
                opts, step, exemplar_list=self.run_dir / f"exemplars_{step}.json", is_main=world.is_main
            )
            facts["list of training images"] = list_digest([entry.index for entry in data.train.entries])
            if resumed is not None and opts.ckpt is None:
                self._check_same_run(self.checkpoint(step), resumed, facts)
            if world.is_main:
                # From now on results tell that the step is done.
                self._results(step).unlink(missing_ok=True)
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
        methods = self._methods(context)
        if resumed is not None:
            self._restore_step(context.model, methods, resumed)
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
        progress = Progress()
        if resumed is not None:
            progress = Progress.of(resumed, sampler.batches_per_epoch)
            self.tolerance.reasons |= progress.unreadable
        if resumed is not None and "optimizer_state" in resumed:
            optimizer.load_state_dict(resumed["optimizer_state"])
            scheduler.load_state_dict(resumed["scheduler_state"])
            precision.scaler.load_state_dict(resumed["scaler_state"])
        return StepRun(
            step=step,
            path=self.checkpoint(step),
            data=data,
            sampler=sampler,
            loader=loader,
            trainer=Trainer(context, methods, optimizer, scheduler, forward=forward, precision=precision),
            scheduler=scheduler,
            board=RunLogger(world, self.run_dir / f"step_{step}", enabled=opts.visualize),
            progress=progress,
            manifest=self._manifest(step),
            facts=facts,
        )

    def _restore_step(self, model: nn.Module, methods: dict[str, Method], resumed: dict[str, Any]) -> None:
        """Weights and the methods' states of an interrupted run; after ``begin_step``, which sets its own."""
        load_state(model, model_state(resumed))
        local = resumed.get("method_state_of_rank") or []
        states = resumed.get("method_state", {})
        states = states | (local[self.world.rank] if self.world.rank < len(local) else {})
        for name, method in methods.items():
            if name in states:
                method.resume(states[name])

    def _run_epochs(self, run: StepRun, resumed: dict[str, Any] | None) -> None:
        """Train what is left of the epochs; validate and save between them."""
        opts, progress, batches = self.opts, run.progress, run.sampler.batches_per_epoch
        rng = None
        if resumed is not None:
            run.saved = progress.epoch, progress.batch
            log.info(
                "step %d goes on at epoch %d of %d, after batch %d of %d",
                run.step,
                progress.epoch + 1,
                opts.epochs,
                progress.batch,
                batches,
            )
            if 0 < progress.batch < batches:
                rng = rng_of_rank(resumed, self.world.rank)
        self._last_save = time.monotonic()
        for epoch in range(progress.epoch, opts.epochs):
            if epoch > progress.epoch:
                progress.epoch, progress.batch = epoch, 0
            last = epoch + 1 == opts.epochs
            if progress.batch < batches:
                self._train_epoch(run, rng)
                rng = None
                if last or (epoch + 1) % opts.ckpt_interval == 0:
                    self._save(run)
            if not last and (epoch + 1) % opts.val_interval == 0:
                try:
                    progress.best = max(progress.best, self._validate(run))
                except Stopped:
                    if run.saved != (epoch, progress.batch):
                        self._save(run)
                    raise

    def _end_if_told(self) -> None:
        """End every process if one was told to stop."""
        if distributed.any_rank(bool(self.stop)):
            raise Stopped(f"{self.stop.signal or 'a signal to another process'}: stopped")

    def _until_told(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, up to the one after which this process was told to stop."""
        for batch in batches:
            yield batch
            if self.stop:
                return

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
            tolerance=self.tolerance,
        )
        sampler = loader.sampler
        assert isinstance(sampler, EpochSampler)
        return sampler, loader

    def _training_pass(self, sampler: EpochSampler, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """This step's training batches once, as epoch 0 draws them."""
        sampler.set_epoch(0)
        for images, targets, *_ in loader:
            yield to_device(images, self.device), targets.to(self.device).long()

    def _previous_path(self, step: int) -> Path:
        """Checkpoint of the step before."""
        opts = self.opts
        return opts.step_ckpt if opts.step_ckpt and step == opts.steps[0] else self.checkpoint(step - 1)

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
            self.previous_path = self._previous_path(step)
            if not self.previous_path.is_file():
                raise UserError(
                    f"{self.previous_path}: no checkpoint of step {step - 1}; train --step {step - 1} first, "
                    "or name another with --step_ckpt"
                )
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

    def _methods(self, context: Context) -> dict[str, Method]:
        """The methods, with the previous step's state and their networks' needs."""
        methods = build_methods(self.opts, context.step)
        state = self.previous.get("method_state", {})
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
            computed_from = json.dumps(key, sort_keys=True)
            values = None
            with distributed.shared_errors():
                if self.world.is_main and path.is_file():
                    stored = load_checkpoint(path)
                    values = stored["values"] if stored.get("computed_from") == computed_from else None
            # All take what the first process found: another may not see its file yet.
            values = distributed.broadcast_object(values)
            if values is not None:
                log.info("%s: taken from %s", name, path)
                return {k: v.to(self.device) for k, v in values.items()}
            values = compute()
            with distributed.shared_errors():
                if self.world.is_main:
                    plain = {k: v.cpu() for k, v in values.items()}
                    save_checkpoint(path, {"computed_from": computed_from, "values": plain})
            return values

        return recall

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward trains: synchronised over processes where there are several."""
        if self.world.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=ids,
            gradient_as_bucket_view=True,
            # Looking for unused weights keeps the gradients' buckets as they are at the start. Else they are
            # put together anew after the first batch, also the first of a resumed run, and with three
            # processes or more the order in which gradients are summed depends on them.
            find_unused_parameters=self.opts.deterministic,
        )

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

    def _train_epoch(self, run: StepRun, rng: dict[str, Tensor] | None) -> None:
        """Train the rest of the epoch under way.

        Args:
            run: the step.
            rng: state of the random generators in the middle of the epoch.
        """
        opts, sampler, progress_, trainer = self.opts, run.sampler, run.progress, run.trainer
        epoch, first = progress_.epoch, progress_.batch
        began = time.perf_counter()
        done = epoch * sampler.batches_per_epoch

        def report(position: int, terms: dict[str, float]) -> None:
            run.board.scalars({f"loss/{name}": value for name, value in terms.items()}, done + position)
            run.board.scalar("lr", trainer.optimizer.param_groups[0]["lr"], done + position)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            log.debug("step %d epoch %d batch %d: %s", run.step, epoch + 1, position, shown)

        sampler.set_epoch(epoch, first)
        batches = progress(
            self._seeded(run.loader, epoch, rng),
            total=sampler.batches_per_epoch - first,
            desc=f"step {run.step} epoch {epoch + 1}/{opts.epochs}",
            world=self.world,
            interval=opts.print_interval,
        )
        means = trainer.train_epoch(
            batches,
            epoch,
            interval=opts.print_interval,
            report=report,
            first_batch=first,
            after_batch=lambda position: self._after_batch(run, position),
        )
        seconds = time.perf_counter() - began
        images = (sampler.batches_per_epoch - first) * opts.batch_size * self.world.size
        run.board.scalar("images_per_second", images / seconds, epoch + 1)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        log.info(
            "step %d epoch %d/%d: %s (%.1f images/s)",
            run.step,
            epoch + 1,
            opts.epochs,
            shown,
            images / seconds,
        )

    def _seeded(self, loader: Loader, epoch: int, rng: dict[str, Tensor] | None) -> Iterator[Any]:
        """The loader's batches; dropout and drop path draw what they draw in an unbroken run."""
        for position, batch in enumerate(loader):
            # Not earlier: a loader that starts draws a number too.
            if position == 0 and rng is not None:
                set_rng_state(rng, self.device)
            elif position == 0:
                torch.manual_seed(self.opts.random_seed + 1000 * (epoch + 1) + self.world.rank)
            yield batch

    def _after_batch(self, run: StepRun, position: int) -> None:
        """Save where ``--ckpt_minutes`` are over, save and end where a signal came; all processes alike."""
        run.progress.batch = position
        ballot = _END if self.stop else _SAVE if self._save_is_due() else _GO_ON
        decision = self.vote.cast(ballot)
        if decision == _GO_ON:
            return
        self._save(run)
        if decision == _END:
            epoch = run.progress.epoch + 1
            raise Stopped(
                f"{self.stop.signal or 'a signal to another process'}: saved step {run.step} after batch "
                f"{position} of epoch {epoch}; the same command goes on from there"
            )

    def _save_is_due(self) -> bool:
        """Whether the first process's clock says so; once per interval."""
        interval = 60 * self.opts.ckpt_minutes
        if not (self.world.is_main and interval) or time.monotonic() - self._last_save < interval:
            return False
        self._last_save = time.monotonic()
        return True

    def _validate(self, run: StepRun) -> float:
        data, epoch = run.data, run.progress.epoch
        metrics = self._evaluate(run.model, data.val, len(data.class_names), run.precision)
        results = summarise(
            metrics.confusion_matrix,
            data.class_names,
            old_classes=len(self.opts.task_.old_classes(run.step)) if run.step else 0,
            ignore=data.ignored,
        )
        run.board.scalar("miou/all", results.miou_all, epoch + 1)
        log.info("step %d epoch %d: validation mIoU %.2f %%", run.step, epoch + 1, 100 * results.miou_all)
        return results.miou_all

    def _manifest(self, step: int) -> dict[str, Any]:
        opts = self.opts
        return make_manifest(
            task=opts.task,
            dataset=opts.dataset,
            steps=[list(ids) for ids in opts.task_.steps],
            step=step,
            model=opts.model,
            backbone=opts.backbone,
            decoder=opts.decoder,
            norm_act=opts.norm_act,
            options=self._options,
        )

    def _save(self, run: StepRun) -> None:
        """Write the checkpoint from rank 0; every process waits until it is whole, or fails with it."""
        trainer = run.trainer
        _check_finite(run.model)
        if self.opts.skip_corrupt:
            for reasons in distributed.gather_objects(self.tolerance.reasons):
                self.tolerance.note(reasons)
            run.progress.unreadable = set(self.tolerance.reasons)
        methods = {name: method.state_dict() for name, method in trainer.methods.items()}
        local = {n: methods[n] for n, m in trainer.methods.items() if m.differs_between_processes}
        of_rank = distributed.gather_objects(local) if local else []
        rng = distributed.gather_objects(rng_state(self.device))
        with distributed.shared_errors():
            if self.world.is_main:
                content = {
                    **run.progress.state(),
                    "batches_per_epoch": run.sampler.batches_per_epoch,
                    "model_state": run.model.state_dict(),
                    "optimizer_state": trainer.optimizer.state_dict(),
                    "scheduler_state": run.scheduler.state_dict(),
                    "scaler_state": trainer.precision.scaler.state_dict(),
                    "method_state": methods,
                    "method_state_of_rank": of_rank,
                    "rng_state": rng,
                    "facts": run.facts,
                    "job": job_id(),
                    "manifest": run.manifest,
                }
                save_checkpoint(run.path, content)
        run.saved = run.progress.epoch, run.progress.batch
        self._last_save = time.monotonic()

    def _pictures(self, run: StepRun) -> None:
        """``--sample_num`` images of the evaluation, the same in every step, beside truth and prediction."""
        data, model = run.data, run.model
        count = min(self.opts.sample_num, len(data.test))
        if not count or not self.world.is_main:
            return
        model.eval()
        images, targets, predictions = [], [], []
        for index in choose_samples(len(data.test), count, self.opts.random_seed):
            sample = data.test[index]
            image, target, *_ = sample.sample if isinstance(sample, Substitute) else sample
            with torch.no_grad(), run.precision.network():
                logits, _ = model(to_device(image[None], self.device))
                scores = model.scores(logits)
            images.append(image)
            targets.append(target)
            predictions.append(scores.argmax(1)[0].cpu())
        path = self.run_dir / f"predictions_{run.step}.png"
        picture = prediction_grid(images, targets, predictions, data.class_names, path=path)
        run.board.image("predictions", picture, self.opts.epochs)
        log.info("pictures: %s", path)


def _check_finite(model: nn.Module) -> None:
    """Raise rather than put weights on the disk that no run can go on with."""
    finite = [p.detach().isfinite().all() for p in model.parameters()]
    if not bool(torch.stack(finite).all()):
        raise NonFiniteLoss(
            "the weights are not finite any more and are not saved; a lower --lr or --opt_level O0 may help"
        )


def _fingerprint(state: dict[str, Tensor]) -> list[float]:
    """A few sums that change when any weight of a network does."""
    tensors = [tensor.double() for tensor in state.values()]
    return [float(sum(t.sum() for t in tensors)), float(sum(t.square().sum() for t in tensors))]
