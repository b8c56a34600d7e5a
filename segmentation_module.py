"""The network that grows: a body and a head, and one classifier per step over the head's channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules import Network, NetworkSpec, build_network
from modules.norm import norm_layers
from utils.errors import UserError

M = TypeVar("M", bound=nn.Module)


class ConvolutionalClassifier(nn.Sequential):
    """SSUL's head of a step: 3×3 convolution, norm, ReLU, 1×1 convolution (SSUL, section 3.2)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, classes, 1),
        )


def freeze(module: M) -> M:
    """Stop a module from learning: no gradients, and its norm layers stay in evaluation mode."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.frozen = True  # type: ignore[assignment]  # read by IncrementalSegmentationModule.train
    return module


class IncrementalSegmentationModule(nn.Module):
    """A segmentation network with one classifier per step.

    Args:
        network: body and head; returns (pre_logits B×256×h×w, intermediates).
        classes: number of classes of each step up to the present one; the first counts the background.
        unknown: SSUL's network: convolutional classifiers, the background in one of its own, and an
            "unknown" class whose logit is the last channel.

    ``intermediates`` names what ``forward`` hands out beside the logits; nothing else is computed.
    """

    def __init__(self, network: Network, classes: Sequence[int], *, unknown: bool = False) -> None:
        super().__init__()
        self.network = network
        self.classes = list(classes)
        self.intermediates: frozenset[str] = frozenset()
        channels = network.out_channels
        self.unknown: nn.Module | None = None
        if unknown:
            widths = [1, self.classes[0] - 1, *self.classes[1:]]
            self.cls = nn.ModuleList(ConvolutionalClassifier(channels, n) for n in widths)
            self.unknown = ConvolutionalClassifier(channels, 1)
        else:
            self.cls = nn.ModuleList(nn.Conv2d(channels, n, 1) for n in self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes seen up to this step, background included, "unknown" left out."""
        return sum(self.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Segment normalised images.

        Args:
            images: B×3×H×W, float.

        Returns:
            Logits B×C×H×W (C+1 with "unknown"), float32 or the autocast type, and the intermediates
            asked for by ``self.intermediates``.
        """
        inner = self.intermediates - {"logits_small"}
        pre_logits, features = self.network(images, inner)
        small = self._classify(pre_logits)
        if "logits_small" in self.intermediates:
            features["logits_small"] = small
        logits = F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits, features

    def _classify(self, pre_logits: Tensor) -> Tensor:
        if self.unknown is not None:
            return torch.cat([head(pre_logits) for head in [*self.cls, self.unknown]], dim=1)
        # One convolution with the classifiers' joined weights: one pass for any number of steps.
        heads = [cast(nn.Conv2d, head) for head in self.cls]
        weight = torch.cat([head.weight for head in heads])
        bias = torch.cat([cast(Tensor, head.bias) for head in heads])
        return F.conv2d(pre_logits, weight, bias)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores B×C×H×W whose arg-max is the prediction.

        They are the logits themselves; with "unknown", its sigmoid is added to the background's
        (SSUL: what is unknown at evaluation counts as background).
        """
        if self.unknown is None:
            return logits
        scores = logits.float().sigmoid()
        scores[:, 0] += scores[:, -1]
        return scores[:, :-1]

    def init_new_classifier(self) -> None:
        """Balanced initialisation of the newest classifier (MiB, eqs. 9 and 10).

        New weights are the background's; the background's mass is shared with the new classes through
        the biases: b_bkg − log(N_new + 1), for the new classes and for the background.
        """
        first, last = cast(nn.Conv2d, self.cls[0]), cast(nn.Conv2d, self.cls[-1])
        old_bias, new_bias = cast(Tensor, first.bias), cast(Tensor, last.bias)
        with torch.no_grad():
            bias = old_bias[0] - math.log(self.classes[-1] + 1)
            last.weight.copy_(first.weight[0].expand_as(last.weight))
            new_bias.fill_(bias)
            old_bias[0] = bias

    def init_from_unknown(self) -> None:
        """Start the newest classifier from the unknown class's (SSUL, section 3.2)."""
        assert self.unknown is not None
        with torch.no_grad():
            for new, unknown in zip(
                self.cls[-1].state_dict().values(), self.unknown.state_dict().values(), strict=True
            ):
                new.copy_(unknown.expand_as(new))

    def fix_bn(self, *, statistics: bool = True) -> None:
        """Freeze every norm layer.

        Args:
            statistics: freeze the running statistics too and normalise by them. Without, the affine
                parameters alone stay: the released ``train()`` puts the layers back into training.
        """
        for layer in norm_layers(self):
            if statistics:
                freeze(layer)
            else:
                layer.requires_grad_(False)

    def train(self, mode: bool = True) -> IncrementalSegmentationModule:
        """Training mode for all but what ``freeze`` has frozen."""
        super().train(mode)
        for module in self.modules():
            if mode and getattr(module, "frozen", False):
                for part in module.modules():
                    part.training = False
        return self

    def load_previous(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of the previous step's network; only the newest classifier may be new.

        Raises:
            UserError: the state belongs to a network of another form.
        """
        newest = f"cls.{len(self.cls) - 1}."
        load_state(self, state, may_miss=newest)


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, may_miss: str | None = None) -> None:
    """Load weights strictly, except for keys that begin with ``may_miss``.

    Raises:
        UserError: a key is missing, left over, or of another shape.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not (may_miss and k.startswith(may_miss))]
    left_over = [k for k in state if k not in own]
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    for what, keys in (("lacks", missing), ("has unknown", left_over), ("has another shape for", shapes)):
        if keys:
            raise UserError(
                f"the checkpoint {what} {len(keys)} weights ({keys[0]}, ...): it belongs to another network; "
                "give --model, --backbone, --norm_act, --head, --decoder and --task as it was trained with"
            )
    module.load_state_dict(state, strict=False)


def make_model(spec: NetworkSpec, classes: Sequence[int]) -> IncrementalSegmentationModule:
    """The network of a step, with random weights.

    Args:
        spec: its form.
        classes: number of classes of each step up to the present one.
    """
    model = IncrementalSegmentationModule(build_network(spec), classes, unknown=spec.classifier == "unknown")
    if spec.head == "aspp" and model.unknown is not None:
        # As SSUL does, whose classifiers are part of this head.
        for module in (*model.cls.modules(), *model.unknown.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return model
