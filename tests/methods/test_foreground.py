"""DKD and STAR as methods: their classifiers, what they train, and STAR's statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_files import cases, load
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from argparser import parse_options
from benchmarks.workbench import bench, options
from methods import Context, build_methods
from methods.classifiers import AuxiliaryClassifier, ForegroundClassifier
from modules import NetworkSpec
from modules.norm import norm_layers
from segmentation_module import IncrementalSegmentationModule, make_model
from tasks import get_task
from train import Trainer
from utils.errors import UserError

CPU = torch.device("cpu")
TASK = get_task("voc", "15-5")
KINDS = [ForegroundClassifier, AuxiliaryClassifier]


def network(classifier: str, classes: list[int], **spec: Any) -> IncrementalSegmentationModule:
    return make_model(NetworkSpec(backbone="mobilenet_v2", classifier=classifier, **spec), classes)


def words(method: str, *more: str) -> list[str]:
    return ["--method", method, "--task", "15-5", "--overlap", "--backbone", "mobilenet_v2", *more]


def batches(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 21, (2, 2, 64, 64), generator=g)
    labels = torch.where(labels < 8, 0, labels).repeat_interleave(16, 2)[:, :, :64]
    return [(torch.randn(2, 3, 64, 64, generator=g), y) for y in labels]


# ── classifiers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_the_channel_of_a_class_is_its_index(kind: type[ForegroundClassifier]) -> None:
    classifier = kind(8, [4, 2])
    features = torch.randn(2, 8, 3, 3)
    logits = classifier(features)
    by_hand = [part(features) for part in classifier.parts]
    if kind is ForegroundClassifier:
        by_hand = [torch.zeros(2, 1, 3, 3), *by_hand]
    torch.testing.assert_close(logits, torch.cat(by_hand, dim=1))
    widths = [part.out_channels for part in classifier.parts]  # type: ignore[union-attr]
    assert widths == ([3, 2] if kind is ForegroundClassifier else [1, 3, 2])


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", cases("dkd_scores*"))
def test_the_prediction_is_that_of_the_released_program(
    name: str, kind: type[ForegroundClassifier], released: bool
) -> None:
    """Channel 0 of the golden logits is the auxiliary one, whatever it is."""
    z, _ = load(name, CPU)
    classifier = kind(4, [9])
    classifier.released = released
    prediction = classifier.scores(z["logits"]).argmax(dim=1)
    assert torch.equal(prediction, z["prediction" if released else "prediction_paper"].long())


def test_the_form_of_the_decision_comes_with_the_options() -> None:
    for fidelity, background in (("paper", 0.0), ("released", 0.5)):
        spec = NetworkSpec.of({"classifier": "foreground", "backbone": "mobilenet_v2", "fidelity": fidelity})
        scores = make_model(spec, [3]).scores(torch.full((1, 3, 1, 1), -9.0))
        assert scores[0, 0].item() == background and (scores[0, 1:] < background).all()


def test_new_classes_start_from_the_auxiliary_classifier() -> None:
    old, grown = network("auxiliary", [16]), network("auxiliary", [16, 5])
    grown.load_previous(old.state_dict())
    grown.cls.start(balanced=False)
    auxiliary, new = grown.cls.parts[0], grown.cls.parts[-1]
    assert isinstance(auxiliary, nn.Conv2d) and isinstance(new, nn.Conv2d)
    assert torch.equal(new.weight, auxiliary.weight.expand_as(new.weight))
    assert auxiliary.bias is not None and new.bias is not None
    assert torch.equal(new.bias, auxiliary.bias.expand(5))
    assert torch.equal(auxiliary.weight, old.cls.parts[0].weight), "it goes on from its own values"  # type: ignore[arg-type]


def test_the_auxiliary_channel_sends_no_gradient_to_the_features() -> None:
    classifier, features = AuxiliaryClassifier(8, [4]), torch.randn(1, 8, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(classifier(features)[:, :1].sum(), features, allow_unused=True)
    assert gradient is None or not gradient.any()
    assert torch.autograd.grad(classifier(features)[:, 1:].sum(), features)[0].any()


@pytest.mark.parametrize("name", cases("star_memory_labels*"))
def test_confident_labels(name: str) -> None:
    z, _ = load(name, CPU)
    logits = nn.functional.pad(z["logits"], (0, 0, 0, 0, 1, 0))
    for released, key in ((False, "pseudo_labels_paper"), (True, "pseudo_labels")):
        star, dkd = ForegroundClassifier(4, [17]), AuxiliaryClassifier(4, [17])
        star.released = dkd.released = released
        assert torch.equal(star.confident_labels(z["labels"], logits), z[key].long())
        # DKD's program drops its auxiliary channel, rightly.
        assert torch.equal(dkd.confident_labels(z["labels"], logits), z["pseudo_labels_paper"].long())


# ── what is trained ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "rates", "decays"),
    [
        ("DKD", {"body": 1, "head": 10, "old": 10, "new": 10}, {"body": 0, "head": 0, "old": 0, "new": 1}),
        ("STAR", {"body": 1, "head": 10, "old": 10, "new": 100}, {"body": 1, "head": 1, "old": 1, "new": 1}),
    ],
)
@pytest.mark.parametrize("model", ["segformer_b0", "deeplab-mobilenet_v2"])
def test_factors_and_frozen_layers(
    method: str, rates: dict[str, int], decays: dict[str, int], model: str
) -> None:
    opts = options(method, model, batch=2, crop=64)
    for step in (0, 1):
        made = bench(opts, CPU, step=step)
        newest = made.student.cls.newest
        named = {id(parameter): name for name, parameter in made.student.named_parameters()}
        trained = set()
        for group in made.trainer.optimizer.param_groups:
            for parameter in group["params"]:
                name = named[id(parameter)]
                trained.add(name)
                part = "new" if name.startswith(f"cls.{newest}.") else "old"
                part = name.split(".")[1] if name.startswith("network.") else part
                expected = rates[part] if step else min(rates[part], 10)
                assert group["lr"] == pytest.approx(1e-4 * expected), name
                decay = decays[part] if step else 1
                assert group["weight_decay"] == pytest.approx(opts.weight_decay * decay), name
        norms = {id(p) for layer in norm_layers(made.student) for p in layer.parameters()}
        frozen = {name for key, name in named.items() if key in norms}
        assert trained == set(named.values()) - (frozen if step else set())
        made.trainer.set_training()
        kinds = nn.Dropout | nn.Dropout2d | StochasticDepth
        random = [module for module in made.student.modules() if isinstance(module, kinds)]
        assert random
        for layer in (*norm_layers(made.student), *random):
            assert layer.training == (step == 0)


def test_momentum_of_the_published_backbone() -> None:
    context = Context(TASK, 0, network("auxiliary", [16]))
    published = make_model(NetworkSpec(backbone="resnet50", classifier="auxiliary", head="dkd"), [16])
    for model, momentum in ((context.model, 0.1), (published, 0.01)):
        (method,) = build_methods(parse_options(words("DKD")), 0).values()
        method.begin_step(Context(TASK, 0, model))
        body, head = ({layer.momentum for layer in norm_layers(part)} for part in _parts(model))
        assert body == {momentum} and head == {0.1}


def _parts(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.network.body, model.network.head


def test_the_published_head_is_taken_unless_another_is_typed() -> None:
    for method in ("DKD", "STAR", "DKD-M", "STAR-M"):
        assert parse_options(words(method)).head == "dkd"
        assert parse_options(words(method, "--head", "mib")).head == "mib"
    assert parse_options(["--method", "DKD", "--model", "segformer_b0"]).head == "mib"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--loss_dkd", "2"], "--loss_dkd goes with --dkd"),
        (["--method", "DKD", "--loss_sad", "2"], "--loss_sad goes with --star"),
        (["--pos_weight", "2"], "--pos_weight goes with --dkd or --star"),
        (["--dkd", "--star"], "disable one"),
        (["--method", "MIB", "--memory", "9", "--memory_choice", "predicted"], "not --classifier linear"),
    ],
)
def test_options_without_effect_are_refused(typed: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_options(typed)


def test_two_weights_of_positives_at_most() -> None:
    with pytest.raises(UserError, match="--pos_weight has 3 values"):
        build_methods(parse_options(words("DKD", "--pos_weight", "1", "2", "3")), 0)


# ── DKD's and STAR's losses as methods ───────────────────────────────────────────────────────────────


def terms_of(method: str, *more: str, step: int = 1) -> dict[str, Tensor]:
    opts = options(method, "deeplab-mobilenet_v2", batch=2, crop=64, words=("--overlap", *more))
    return bench(opts, CPU, step=step).run()


def test_terms_and_their_weights() -> None:
    assert terms_of("DKD", step=0).keys() == {"mbce", "auxiliary", "total"}
    assert terms_of("STAR", step=0).keys() == {"mbce", "total"}
    dkd = terms_of("DKD")
    assert dkd.keys() == {"mbce", "auxiliary", "kd", "dkd_positive", "dkd_negative", "total"}
    halved = terms_of("DKD", "--loss_dkd", "2.5", "--loss_sigmoid_kd", "1")
    torch.testing.assert_close(2 * halved["dkd_negative"], dkd["dkd_negative"])
    torch.testing.assert_close(5 * halved["kd"], dkd["kd"])
    star = terms_of("STAR")
    assert star.keys() == {"mbce", "ocfm", "sad", "total"}
    torch.testing.assert_close(2 * star["sad"], terms_of("STAR", "--loss_sad", "0.1")["sad"])


# ── STAR's statistics ────────────────────────────────────────────────────────────────────────────────


class Steps:
    """Steps of STAR on fixed batches, without the session."""

    def __init__(self, fidelity: str = "paper", reduce: Any = lambda tensor: tensor) -> None:
        self.opts = parse_options(words("STAR", "--fidelity", fidelity))
        self.reduce = reduce

    def context(self, step: int, model_old: Any = None) -> Context:
        torch.manual_seed(step)
        released = self.opts.fidelity == "released"
        context = Context(
            *(TASK, step, network("foreground", TASK.classes_per_step(step), released=released)),
            model_old=model_old,
            protocol="overlapped",
            fidelity=self.opts.fidelity,
            batches=batches,
            reduce=self.reduce,
        )
        for model in (context.model, context.model_old):
            if model is not None:
                model.eval().intermediates = frozenset({"pre_logits", "logits_small"})
        return context

    def method(self) -> Any:
        (method,) = build_methods(self.opts, 1).values()
        return method

    def first(self) -> tuple[Context, dict[str, Tensor]]:
        context, method = self.context(0), self.method()
        method.begin_step(context)
        method.end_step(context)
        return context, method.state_dict()


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_statistics_grow_with_the_steps(fidelity: str) -> None:
    steps = Steps(fidelity)
    before, state = steps.first()
    assert {name: tuple(values.shape) for name, values in state.items()} == {
        "numbers": (16,), "prototypes": (15, 256), "norm_mean_and_std": (2, 15), "noise": (15, 256)
    }  # fmt: skip
    context, method = steps.context(1, before.model), steps.method()
    method.from_previous_step(copy.deepcopy(state))
    method.begin_step(context)
    assert method.state_dict() == {}, "nothing before the step's end"
    method.end_step(context)
    again, grown = steps.method(), method.state_dict()
    for name, old in state.items():
        axis = 1 if name == "norm_mean_and_std" else 0
        assert grown[name].shape[axis] == old.shape[axis] + 5
        if name != "numbers":
            assert torch.equal(grown[name].narrow(axis, 0, old.shape[axis]), old)
    again.from_previous_step(copy.deepcopy(state))
    again.begin_step(context)
    again.end_step(context)  # as after a kill before the last checkpoint
    assert all(torch.equal(again.state_dict()[name], grown[name]) for name in grown)
    again.load_state_dict({})
    assert again.state_dict() == {}


def test_sums_are_those_of_all_processes_in_the_paper_form() -> None:
    """Two processes with equal images: twice the numbers, and the same prototypes and plan for each."""
    alone, both = Steps(), Steps(reduce=lambda tensor: tensor.mul_(2))
    before, state = alone.first()
    _, doubled = both.first()
    torch.testing.assert_close(doubled["numbers"], 2 * state["numbers"])
    torch.testing.assert_close(doubled["prototypes"], state["prototypes"])
    plans = []
    for steps, statistics in ((alone, state), (both, doubled)):
        method = steps.method()
        method.from_previous_step(statistics)
        method.begin_step(steps.context(1, before.model))
        plans.append(method)
    assert torch.equal(plans[0].counts, plans[1].counts)
    torch.testing.assert_close(plans[1].schedule["numbers"][:16], 2 * plans[0].schedule["numbers"][:16])
    own_share = Steps("released", reduce=lambda tensor: pytest.fail("each process keeps its own share"))
    _, released = own_share.first()
    torch.testing.assert_close(released["numbers"], state["numbers"])


def test_a_step_needs_the_statistics_of_the_step_before() -> None:
    steps = Steps()
    method = steps.method()
    with pytest.raises(UserError, match=r"the checkpoint of step 0 holds no feature statistics.*--star"):
        method.begin_step(steps.context(1, steps.context(0).model))


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_without_old_classes_to_replay_the_loss_is_finite(fidelity: str) -> None:
    steps = Steps(fidelity)
    before, state = steps.first()
    state["numbers"] = torch.zeros_like(state["numbers"])
    context, method = steps.context(1, before.model), steps.method()
    method.from_previous_step(state)
    method.begin_step(context)
    assert not method.counts.any()
    optimizer = torch.optim.SGD(context.model.parameters(), 0.01)
    terms = Trainer(context, {"FeatureReplay": method}, optimizer).train_step(*batches()[0])
    assert all(torch.isfinite(term) for term in terms.values())


def test_replayed_features_train_the_classifier_only() -> None:
    steps = Steps()
    before, state = steps.first()
    state["numbers"] = state["numbers"] * 1000  # earlier steps showed far more
    context, method = steps.context(1, before.model), steps.method()
    method.from_previous_step(state)
    method.begin_step(context)
    assert method.counts.sum() > 0
    loss = method._replayed()
    named = dict(context.model.named_parameters())
    trained = {n: p for n, p in named.items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    reached = {name for name, g in zip(trained, gradients, strict=True) if g is not None and g.any()}
    assert reached == {"cls.1.weight", "cls.1.bias"}, "old classes are not among the logits that count"
