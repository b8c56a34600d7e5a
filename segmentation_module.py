"""The incremental network: a backbone and a head, and one classifier per step over the head's channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from modules import Network, NetworkSpec, build_network
from modules.classifiers import classifier_kind
from modules.network import freeze
from modules.norm import norm_layers
from utils.errors import UserError

_COUNTER = ".num_batches_tracked"
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, StochasticDepth)


class IncrementalSegmentationModule(nn.Module):
    """A segmentation network with one classifier per step.

    Args:
        network: backbone and head; returns (pre_logits B×256×h×w, intermediates).
        classes: number of classes of each step up to this one; the first includes the background.
        later: number of classes of each later step.
        classifier: its kind (``--classifier``).

    Attributes:
        intermediates: names of what ``forward`` returns beside the logits; nothing else is computed.
    """

    def __init__(
        self,
        network: Network,
        classes: Sequence[int],
        later: Sequence[int] = (),
        *,
        classifier: str = "linear",
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = list(classes)
        self.intermediates: frozenset[str] = frozenset()
        self.cls = classifier_kind(classifier)(network.out_channels, classes, later)

    @property
    def num_classes(self) -> int:
        """Number of classes seen up to this step, background included."""
        return sum(self.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Segment normalised images.

        Args:
            images: B×3×H×W, float.

        Returns:
            Logits B×C×H×W, float32 or the autocast type (with some kinds of classifiers C is larger than the
            number of classes), and the intermediates named in ``self.intermediates``.
        """
        inner = self.intermediates - {"logits_small"}
        pre_logits, features = self.network(images, inner)
        small = self.cls(pre_logits)
        if "logits_small" in self.intermediates:
            features["logits_small"] = small
        logits = F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits, features

    def scores(self, logits: Tensor) -> Tensor:
        """Scores B×C×H×W whose argmax is the prediction, by the classifier's decision rule."""
        return self.cls.scores(logits)

    def is_older_classifier(self, weight: str) -> bool:
        """Whether a weight, named as in this module, belongs to the classifier of an earlier step."""
        if len(self.classes) == 1 or not weight.startswith("cls."):
            return False
        part = self.cls.part_of(weight.removeprefix("cls."))
        return part is not None and part < self.cls.newest

    def fix_bn(self, *, statistics: bool = True) -> None:
        """Freeze every norm layer.

        Args:
            statistics: freeze the running statistics too and normalise by them; else only the affine
                parameters: the released ``train()`` puts the layers back into training mode.
        """
        for layer in norm_layers(self):
            if statistics:
                freeze(layer)
            else:
                layer.requires_grad_(False)

    def fix_older_classifiers(self) -> None:
        """Freeze the weights of the classifiers of earlier steps, the background's included."""
        for name, parameter in self.named_parameters():
            if self.is_older_classifier(name):
                parameter.requires_grad_(False)

    def fix_dropout(self) -> None:
        """Switch off every dropout layer and stochastic depth."""
        for layer in self.modules():
            if isinstance(layer, _DROPOUTS) or type(layer).__name__ == "DropPath":  # timm's stochastic depth
                freeze(layer)

    def train(self, mode: bool = True) -> IncrementalSegmentationModule:
        """Training mode, except for modules frozen by ``freeze``."""
        super().train(mode)
        for module in self.modules():
            if mode and getattr(module, "frozen", False):
                for part in module.modules():
                    part.training = False
        return self

    def load_previous(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of the previous step's network; only a part that this step adds may be missing.

        Raises:
            UserError: the state belongs to a network of another architecture.
        """
        start = self.network.from_previous(state, "network.")
        load_state(self, start, may_miss=None if self.cls.of_all_steps else f"cls.{self.cls.newest}.")


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, may_miss: str | None = None) -> None:
    """Load weights strictly, except for missing keys that begin with ``may_miss``.

    The norm layers' counters of batches are no weights: nothing reads them, and inplace-abn's have none.

    Raises:
        UserError: a key is missing, unknown, or of another shape.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not (may_miss and k.startswith(may_miss))]
    unknown = [k for k in state if k not in own]
    missing, unknown = ([k for k in keys if not k.endswith(_COUNTER)] for keys in (missing, unknown))
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    for what, keys in (("lacks", missing), ("has unknown", unknown), ("has another shape for", shapes)):
        if keys:
            raise UserError(
                f"the checkpoint {what} {len(keys)} weights ({keys[0]}, ...): it belongs to another network; "
                "give --model, --backbone, --norm_act, --head, --two_branches, --decoder, --classifier and "
                "--task as it was trained with"
            )
    module.load_state_dict(state, strict=False)


def make_model(
    spec: NetworkSpec, classes: Sequence[int], later: Sequence[int] = ()
) -> IncrementalSegmentationModule:
    """The network of a step, with random weights.

    Args:
        spec: its architecture.
        classes: number of classes of each step up to this one.
        later: number of classes of each later step.

    Raises:
        UserError: a value of ``spec`` is not among the choices.
    """
    network = build_network(spec, later_step=len(classes) > 1)
    model = IncrementalSegmentationModule(network, classes, later, classifier=spec.classifier)
    model.cls.released = spec.released
    model.cls.initialise(spec.head)
    return model
