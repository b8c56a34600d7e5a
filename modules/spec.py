"""The architecture of a network."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from modules.classifiers import classifier_kind


@dataclass(frozen=True)
class NetworkSpec:
    """Architecture of a network.

    Attributes:
        model: ``deeplab``, ``mlp``, ``segformer_b0`` ... ``segformer_b5``.
        backbone: of DeepLab and ``mlp``: ``resnet50``, ``resnet101``, ``mobilenet_v2`` or ``timm/NAME``.
        norm_act: of DeepLab and of the backbone, see :mod:`modules.norm` and :mod:`modules.timm_backbone`.
        output_stride: of the backbone, 16 or 8.
        pooling: of DeepLab's ``mib`` head: window of the evaluation pooling in features, 0 for the whole map.
        head: of DeepLab: ``mib`` (MiB, PLOP, SDR), ``aspp`` (SSUL, torchvision) or ``dkd`` (DKD, STAR).
        decoder: of SegFormer: ``sats`` or ``segformer``.
        checkpointing: recompute the activations inside the backbone's stages in the backward pass.
        classifier: kind of classifier, see :mod:`modules.classifiers`.
        two_branches: of DeepLab's ``mib`` head, see :mod:`modules.branches`.
        released_resnet: dilations, running statistics and activations of the ResNet as in SDR's program,
            with the same names and shapes of weights.
        released: the classifier's decision rule is the released program's, where that differs.
        drop_path: largest rate of stochastic depth of SegFormer and timm's networks; None: their default.
    """

    model: str = "deeplab"
    backbone: str = "resnet101"
    norm_act: str = "std"
    output_stride: int = 16
    pooling: int = 32
    head: str = "mib"
    decoder: str = "sats"
    checkpointing: bool = False
    classifier: str = "linear"
    released_resnet: bool = False
    released: bool = False
    two_branches: bool = False
    drop_path: float | None = None

    @property
    def shaping(self) -> dict[str, str | bool]:
        """Options that determine names and shapes of the weights, with their values."""
        own: dict[str, str | bool] = {"decoder": self.decoder}
        if self.model in ("deeplab", "mlp"):
            own = {"backbone": self.backbone, "norm_act": self.norm_act}
        if self.model == "deeplab":
            own |= {"head": self.head, "two_branches": self.two_branches}
        return {"model": self.model, **own, "classifier": self.classifier}

    @classmethod
    def of(cls, options: Mapping[str, Any] | Namespace) -> NetworkSpec:
        """Architecture from a run's options; missing options have the defaults of this class.

        ``--fidelity released`` selects SDR's ResNet with ``std`` and ``sync``, unless the classifier's or the
        branches' released program uses another (docs/fidelity.md).

        Raises:
            UserError: unknown kind of classifier.
        """
        given = options if isinstance(options, Mapping) else vars(options)
        names = {field.name for field in fields(cls)} - {"released_resnet", "released"}
        spec = cls(
            **{name: given[name] for name in names & given.keys()},
            checkpointing=given.get("grad_checkpointing", False),
        )
        kind = classifier_kind(spec.classifier)
        released = given.get("fidelity") == "released"
        released_resnet = (
            released
            and spec.model == "deeplab"
            and spec.backbone.startswith("resnet")
            and spec.norm_act in ("std", "sync")
            and not (kind.torchvision_resnet or spec.two_branches)
        )
        return replace(spec, released_resnet=released_resnet, released=released)
