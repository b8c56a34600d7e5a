"""STAR: replay of features of old classes from their statistics (Chen et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from methods.base import Batch, Context
from methods.checks import refuse_without
from methods.foreground import ForegroundMethod, checked_pos_weight
from utils.errors import UserError
from utils.lazy import loss, no_grad, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight

NEWEST_LR_FACTOR = 10.0  # of the newest classifier from step 1 on, beside that of all classifiers


class FeatureReplay(ForegroundMethod):
    """Replay of old classes' features; features of old classes stay, those of new ones keep away (STAR)."""

    classifier = "foreground"
    needs = frozenset({"pre_logits", "logits_small"})
    released_state = frozenset({"numbers", "prototypes", "norm_mean_and_std", "noise"})

    def __init__(
        self, pos_weight: Sequence[float], ocfm: float, sad: float, *, fidelity: str = "paper"
    ) -> None:
        super().__init__(pos_weight, fidelity=fidelity)
        self.ocfm, self.sad = ocfm, sad
        self.maintaining = loss.OldClassFeaturesMaintainingLoss()
        self.previous: dict[str, torch.Tensor] = {}  # statistics of the old classes
        self.statistics: dict[str, torch.Tensor] = {}  # of all classes, after ``end_step``

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--star`` and its weights; ``--pos_weight`` is DKD's."""
        group.flag("--star", role="network", help="replay of features of old classes (STAR)")
        for name, weight, what in (
            ("--loss_ocfm", 5.0, "the distance of old classes' features from the old network's"),
            ("--loss_sad", 0.05, "the nearness of new classes to old prototypes"),
        ):
            group.value(name, loss_weight, weight, metavar="W", help=f"weight of {what} (STAR)")

    @classmethod
    def from_options(cls, opts: Any) -> FeatureReplay | None:
        """Enabled with ``--star``."""
        if not opts.star:
            return None
        return cls(checked_pos_weight(opts.pos_weight), opts.loss_ocfm, opts.loss_sad, fidelity=opts.fidelity)

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """The published head, which is DKD's."""
        refuse_without(opts, ["star"], ["loss_ocfm", "loss_sad"])
        return {"head": "dkd"} if opts.star and opts.model == "deeplab" else {}

    def from_previous_step(self, state: dict[str, Any]) -> None:
        """Statistics of the old classes."""
        self.previous = state

    def begin_step(self, context: Context) -> None:
        """From step 1 on: count the positions of old classes in the step's images, and plan the replay."""
        super().begin_step(context)
        if context.step == 0:
            return
        if not self.previous:
            raise UserError(
                f"the checkpoint of step {context.step - 1} holds no feature statistics: train that step "
                "with --star (--method STAR)"
            )
        self.previous = {name: values.to(context.device) for name, values in self.previous.items()}
        if self.fidelity == "released":  # each process its own share, which the cache could not tell apart
            counted = self._count(context)
        else:
            counted = context.cached("replay_numbers", {}, lambda: self._count(context))
        self.schedule = loss.replay_schedule(
            self.previous["numbers"],
            counted["predicted"],
            counted["labelled"],
            int(counted["batches"]),
            "overlap" if context.protocol == "overlapped" else "disjoint",
            context.classes_new,
        )
        self.counts = self.schedule["per_iteration"].long().cpu()
        sizes = self.old, context.classes_new
        self.discriminative = loss.SimilarityAwareDiscriminativeLoss(*sizes, self.fidelity)

    @no_grad
    def _count(self, context: Context) -> dict[str, torch.Tensor]:
        """Positions by the old network's class where labelled background, and by label; number of batches."""
        classes = self.old + context.classes_new
        sizes = {"predicted": self.old, "labelled": classes, "batches": 1}
        counted = {name: torch.zeros(size, device=context.device) for name, size in sizes.items()}
        for images, targets in context.batches():
            with context.autocast():
                logits, features = self.model_old(images)
            prediction = loss.old_prediction(logits[:, 1:], self.fidelity)
            prediction, labels = _reduced(prediction, targets, features["pre_logits"])
            counted["predicted"] += loss.predicted_numbers(prediction, labels, self.old, stride=1)
            counted["labelled"] += loss.predicted_numbers(labels, torch.zeros_like(labels), classes, stride=1)
            counted["batches"] += 1
        if self.fidelity == "paper":
            counted = {name: context.reduce(values) for name, values in counted.items()}
        background, _, new = counted["labelled"].split([1, self.old - 1, context.classes_new])
        return {**counted, "labelled": torch.cat([background, new])}

    def lr_factor(self, parameter: str) -> float:
        """From step 1 on the newest classifier learns ten times faster than the old ones."""
        faster = self.step > 0 and self.is_newest(parameter)
        return super().lr_factor(parameter) * (NEWEST_LR_FACTOR if faster else 1.0)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Classification of real, replayed and background positions; OCFM; SAD."""
        real = self.mbce(batch)
        if batch.outputs_old is None:
            return {"mbce": real}
        features = batch.features["pre_logits"]
        predicted = loss.old_prediction(batch.outputs_old[:, 1:], self.fidelity)
        prediction, labels = _reduced(predicted, batch.targets, features)
        background = (labels == 0) & (prediction == 0)
        extra = loss.negatives_loss(batch.features["logits_small"][:, self.old :], background)
        extra_weight = self.schedule["extra_background_ratio"] * background.sum() / background.numel()
        fake, fake_weight = self._replayed(), int(self.counts.sum()) / background.numel()
        ocfm = self.maintaining(features, batch.features_old["pre_logits"], batch.targets, predicted)
        sad = self.discriminative(features, batch.targets, self.previous["prototypes"])
        return {
            "mbce": loss.replay_mbce(real, fake, extra, fake_weight, extra_weight),
            "ocfm": self.ocfm * ocfm,
            "sad": self.sad * sad,
        }

    def _replayed(self) -> torch.Tensor | float:
        """Loss of replayed features, which are negatives of the new classes."""
        if not self.counts.any():
            return 0.0
        directions = self.previous["prototypes"], self.previous["noise"]
        norms = self.previous["norm_mean_and_std"]
        fake = loss.replay_features(*directions, norms, self.counts, fidelity=self.fidelity)
        fake = fake.to(next(self.model.cls.parameters()).dtype)
        return loss.negatives_loss(self.model.cls(fake.T[None, :, :, None])[:, self.old :])

    @no_grad
    def end_step(self, context: Context) -> None:
        """Statistics of the new classes' features by the trained network."""
        new = self.model.num_classes - self.old
        found = loss.FeatureStatistics(self.old, new, self.model.network.out_channels, self.previous or None)
        for images, targets in context.batches():
            with context.autocast():
                features = self.model(images)[1]["pre_logits"]
            found.update(features, targets)
        if self.fidelity == "paper":
            context.reduce(found.sums)
        self.statistics = found.compute(self.fidelity)
        if context.step:
            self.statistics["numbers"] = self.schedule["numbers"]

    def state_dict(self) -> dict[str, Any]:
        """Of all classes, after the step: numbers, prototypes, norm_mean_and_std, noise."""
        return self.statistics

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``state_dict`` returned it."""
        self.statistics = state


def _reduced(prediction: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
    """Prediction and labels, B×H×W, at the middle of each position of B×D×h×w features."""
    return [
        loss.downsample_labels(each, features.shape[-2:], "nearest-exact") for each in (prediction, labels)
    ]
