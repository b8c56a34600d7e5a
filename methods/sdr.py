"""SDR: prototypes, attraction and repulsion, sparsity (Michieli and Zanuttigh 2021)."""

from __future__ import annotations

from typing import Any

from methods.base import Batch, Context, Method
from utils.errors import UserError
from utils.lazy import loss, torch
from utils.option_roles import OptionGroup
from utils.option_types import loss_weight


class PrototypeLearning(Method):
    """Class prototypes over all batches; attraction, repulsion and matching of features (SDR)."""

    needs = frozenset({"body"})
    released_state = frozenset({"prototypes", "count_features"})

    def __init__(self, opts: Any) -> None:
        self.attraction = opts.loss_fc
        self.repulsion = opts.lfc_sep_clust
        self.matching = opts.loss_de_prototypes
        self.released = opts.fidelity == "released"
        # The released code does not reduce over processes.
        self.differs_between_processes = self.released
        self.contrast_loss = loss.FeaturesClusteringSeparationLoss(
            lfc_L2normalized=opts.lfc_L2normalized,
            lfc_nobgr=opts.lfc_nobgr,
            lfc_sep_clust=opts.lfc_sep_clust,
            lfc_sep_clust_ison_proto=opts.lfc_sep_clust_ison_proto,
            lfc_orth_sep=opts.lfc_orth_sep,
            lfc_orth_maxonly=opts.lfc_orth_maxonly,
            fidelity=opts.fidelity,
        )
        self.matching_loss = loss.DistillationEncoderPrototypesLoss(
            sumafter=opts.loss_de_prototypes_sumafter, fidelity=opts.fidelity
        )
        self.prototypes: loss.Prototypes | None = None
        self.state: dict[str, Any] | None = None

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_de_prototypes``, ``--loss_fc``, ``--lfc_*``."""
        weights = {
            "--loss_de_prototypes": "weight of prototype matching",
            "--loss_fc": "weight of the attraction to prototypes",
            "--lfc_sep_clust": "weight of the repulsion of classes",
        }
        for name, text in weights.items():
            group.value(name, loss_weight, 0.0, metavar="W", help=text)
        flags = {
            "--loss_de_prototypes_sumafter": "matching: mean over classes",
            "--lfc_L2normalized": "normalise features and prototypes",
            "--lfc_nobgr": "no background in attraction and repulsion",
            "--lfc_orth_sep": "repulsion by orthogonality",
            "--lfc_orth_maxonly": "with --lfc_orth_sep: only the closest pair",
            "--lfc_sep_clust_ison_proto": "repulsion from prototypes instead of class means",
        }
        for flag, text in flags.items():
            group.flag(flag, help=text)

    @classmethod
    def from_options(cls, opts: Any) -> PrototypeLearning | None:
        """Enabled if one of its three weights is above 0.

        Raises:
            UserError: ``--lfc_orth_maxonly`` without ``--lfc_orth_sep``.
        """
        if opts.lfc_orth_maxonly and not opts.lfc_orth_sep:
            raise UserError("--lfc_orth_maxonly needs --lfc_orth_sep; give both, or drop it")
        on = opts.loss_de_prototypes > 0 or opts.loss_fc > 0 or opts.lfc_sep_clust > 0
        return cls(opts) if on else None

    @property
    def uses_teacher(self) -> bool:
        """Matching uses the teacher's argmax."""
        return self.matching > 0

    def begin_step(self, context: Context) -> None:
        """Load the previous prototypes; whether the background has one depends on the protocol."""
        self.classes = context.classes_old + context.classes_new
        self.device = context.device
        self.prototypes = None
        self.load_state_dict(self.state or {})
        self.sequential = context.protocol == "sequential"
        # The released loss returns nothing at step 0.
        self.contrast = context.step > 0 or not self.released
        # Without old labels the background contains classes of other steps.
        self.skip_background = context.protocol in ("overlapped", "partitioned") or (
            context.protocol == "disjoint" and context.step > 0
        )
        self.reduce = None if self.released else context.reduce

    def _table(self, channels: int, device: torch.device) -> loss.Prototypes:
        table = loss.Prototypes(
            num_classes=self.classes,
            feat_dim=channels,
            fidelity="released" if self.released else "paper",
        )
        return table.to(device)

    def observe(self, batch: Batch) -> None:
        """Update the running means of the features."""
        features = batch.features["body"].detach()
        if self.prototypes is None:
            # Built at the first batch, which has the number of channels.
            self.prototypes = self._table(features.shape[1], features.device)
        self.prototypes.update(
            features,
            batch.targets,
            skip_background=self.skip_background,
            reduce=self.reduce,
        )

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted attraction, repulsion and, from step 1 on, matching."""
        assert self.prototypes is not None
        features, labels = batch.features["body"], batch.targets
        prototypes = self.prototypes.prototypes
        terms: dict[str, torch.Tensor] = {}
        if self.contrast and (self.attraction > 0 or self.repulsion > 0):
            attraction, repulsion = self.contrast_loss(
                features=features, labels=labels, prototypes=prototypes
            )
            if self.attraction > 0:
                terms["attraction"] = self.attraction * attraction
            if self.repulsion > 0:
                terms["repulsion"] = self.repulsion * repulsion
        if self.matching > 0 and batch.outputs_old is not None:
            terms["matching"] = self.matching * self.matching_loss(
                features=features,
                labels=labels,
                # Sequential labels contain the old classes.
                outputs_old=None if self.sequential else batch.outputs_old,
                prototypes=prototypes,
                classes_old=batch.classes_old,
            )
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Prototypes and counts."""
        return {} if self.prototypes is None else self.prototypes.state_dict()

    def from_previous_step(self, state: dict[str, Any]) -> None:
        """Kept for ``begin_step``."""
        self.state = state or None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Prototypes of an interrupted run, or of the previous step with fewer classes."""
        if state:
            self.prototypes = self._table(state["prototypes"].shape[1], self.device)
            self.prototypes.load_state_dict(state)


class FeatureSparsity(Method):
    """Few active channels per position: Σ shrink(f) / Σ f (SDR, eq. 6)."""

    needs = frozenset({"body"})

    def __init__(self, weight: float, criterion: loss.FeaturesSparsificationLoss) -> None:
        self.weight = weight
        self.criterion = criterion

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_featspars``, ``--lfs_*``."""
        group.value(
            "--loss_featspars", loss_weight, 0.0, metavar="W", help="weight of the sparsity of features"
        )
        group.choice(
            "--lfs_normalization",
            ("L1", "L2", "max_foreachfeature", "max_maskedforclass", "max_overall", "softmax"),
            "max_foreachfeature",
            help="sparsity: normalisation of the features",
        )
        group.choice(
            "--lfs_shrinkingfn",
            ("squared", "power3", "exponential"),
            "squared",
            help="sparsity: function summed in the numerator",
        )
        group.choice(
            "--lfs_loss_fn_touse",
            ("ratio", "max_minus_ratio", "lasso", "entropy"),
            "ratio",
            help="sparsity: measure; max_minus_ratio is 0, as released",
        )

    @classmethod
    def from_options(cls, opts: Any) -> FeatureSparsity | None:
        """Enabled if ``--loss_featspars`` is above 0."""
        if opts.loss_featspars <= 0:
            return None
        criterion = loss.FeaturesSparsificationLoss(
            lfs_normalization=opts.lfs_normalization,
            lfs_shrinkingfn=opts.lfs_shrinkingfn,
            lfs_loss_fn_touse=opts.lfs_loss_fn_touse,
            fidelity=opts.fidelity,
        )
        return cls(opts.loss_featspars, criterion)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The weighted sparsity of the backbone's features."""
        sparsity = self.criterion(features=batch.features["body"], labels=batch.targets)
        return {"sparsity": self.weight * sparsity}


class SoftNearestNeighbours(Method):
    """Soft nearest neighbour loss on features (Frosst et al. 2019; an ablation of SDR)."""

    needs = frozenset({"body"})

    def __init__(self, weight: float, *, fidelity: str = "paper") -> None:
        self.weight = weight
        self.criterion = loss.SNNL(fidelity=fidelity)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """``--loss_SNNL``."""
        group.value("--loss_SNNL", loss_weight, 0.0, metavar="W", help="weight of the loss")

    @classmethod
    def from_options(cls, opts: Any) -> SoftNearestNeighbours | None:
        """Enabled if ``--loss_SNNL`` is above 0."""
        return cls(opts.loss_SNNL, fidelity=opts.fidelity) if opts.loss_SNNL > 0 else None

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The weighted loss."""
        distance = self.criterion(features=batch.features["body"], labels=batch.targets)
        return {"snnl": self.weight * distance}
