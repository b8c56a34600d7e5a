"""With ``--fidelity released`` the weights after several steps are those of the released trainers.

Our side is what a run uses: parsed options, ``build_methods``, the optimiser and schedule of a session, and
``Trainer``. The other side is ``released_reference.py``. Networks are in float64, so what differs is what
is computed (our losses are in float32, hence 1e-5).
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released_reference as released
import torch
from released_reference import VOID, Toy
from torch import Tensor, nn
from torch.nn import functional as F

from argparser import Options, parse_options
from methods import Context, Method, build_methods
from modules.network import Network
from segmentation_module import IncrementalSegmentationModule
from session.optimizer import Schedule, make_optimizer
from train import Means, Trainer

GOLDEN = Path(__file__).resolve().parent / "golden"
STEPS, ITERATIONS, LR = 4, 10, 0.01
CLASSES = [16, 5]  # VOC 15-5
OLD, NEW = CLASSES
IMAGES = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ── the slow form is the released code ───────────────────────────────────────────────────────────


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A golden file's arrays in float64, and its options."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        meta = json.loads(str(archive["meta"]))
    return {
        key: value.double() if value.is_floating_point() else value for key, value in arrays.items()
    }, meta


def assert_golden(found: Any, expected: Tensor) -> None:
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    scale = float(expected.abs().max()) if torch.isfinite(expected).all() else 1.0
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("seed", [0, 1])
def test_reference_classification_and_distillation(seed: int) -> None:
    z, meta = golden(f"unbiased_ce-{seed}")
    assert_golden(released.unbiased_cross_entropy(z["inputs"], z["targets"], meta["old_cl"]), z["loss_none"])
    # The file cil_gs1 holds the paper's form; SDR's own program is compared through its step alone.
    z, _ = golden(f"kd_alpha1-{seed}")
    assert_golden(released.distillation(z["inputs"], z["targets"]), z["loss"])
    z, _ = golden(f"unbiased_kd_alpha1-{seed}")
    assert_golden(released.unbiased_distillation(z["inputs"], z["targets"]), z["loss"])
    z, _ = golden(f"icarl_bkg0-{seed}")
    assert_golden(released.binary_cross_entropy(z["inputs"], z["targets"], z["output_old"]).mean(), z["loss"])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("images", [1, 3])
def test_reference_sdr(images: int, seed: int) -> None:
    z, _ = golden(f"sdr_contrastive_default_b{images}-{seed}")
    sdr = released.ReleasedSDR(
        classes=6, old=4, step=1, protocol="overlapped", attraction=1.0, repulsion=1.0, matching=1.0
    )
    sdr.prototypes = dict(enumerate(z["prototypes"]))
    small = released.shrink_labels(z["labels"], z["features"])
    attraction, repulsion = sdr.contrast(z["features"], small)
    assert_golden(attraction, z["attraction"])
    assert_golden(repulsion, z["repulsion"])
    z, meta = golden(f"sdr_prototype_matching_sumafter1_b{images}-{seed}")
    sdr.old, sdr.prototypes = meta["classes_old"], dict(enumerate(z["prototypes"]))
    small = released.shrink_labels(z["labels"], z["features"])
    assert_golden(sdr.match(z["features"], small, z["outputs_old"]), z["loss"])
    z, _ = golden(f"sdr_sparsity_max_maskedforclass_exponential_ratio_b{images}-{seed}")
    assert_golden(sdr.sparse(z["features"], released.shrink_labels(z["labels"], z["features"])), z["loss"])


@pytest.mark.parametrize("seed", [0, 1])
def test_reference_plop_and_sats(seed: int) -> None:
    z, meta = golden(f"plop_local_pod-{seed}")
    maps = [[z[f"{side}_{i}"] for i in range(meta["n"])] for side in ("old", "new")]
    counts = {"old": meta["index_new_class"], "new": meta["nb_new_classes"]}
    assert_golden(released.pooled_distillation(*maps, **counts), z["loss"])
    z, meta = golden(f"plop_pseudo_labels-{seed}")
    classes = meta["nb_current_classes"]
    found = released.released_medians(
        lambda logits: (logits,), zip(z["logits"], z["labels"], strict=True), classes, 1e-3, None
    )
    assert_golden(found, z["released_thresholds"])
    filled = released.released_pseudo_labels(
        z["labels"][0], z["logits"][0], z["given_thresholds"].tolist(), classes
    )
    assert torch.equal(filled.labels, z["pseudo_labels"])
    assert_golden(filled.share, z["adaptive_factor"])
    z, meta = golden(f"sats_attention_transfer-{seed}")
    maps = [[z[f"attn_{side}_{i}"] for i in range(4)] for side in ("old", "new")]
    assert_golden(released.attention_transfer(*maps, z["labels"]), z["loss_released"])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["ewc", "pi", "rw"])
def test_reference_regularisers(kind: str, seed: int) -> None:
    z, meta = golden(f"regularizer_{kind}-{seed}")

    def weights(prefix: str) -> nn.ParameterDict:
        return nn.ParameterDict({name: nn.Parameter(z[f"{prefix}_{name}"].clone()) for name in "ab"})

    def move(model: nn.ParameterDict, prefix: str, rate: float) -> None:
        for name, parameter in model.items():
            parameter.grad = z[f"{prefix}_{name}"].clone()
        regulariser.update()
        with torch.no_grad():
            for parameter in model.values():
                parameter -= rate * parameter.grad

    settings = {"alpha": meta["alpha"], "every": meta["iterations"]}
    model = weights("init")
    regulariser = released.ReleasedRegulariser(kind, model, None, None, **settings)
    for i in range(6):
        move(model, f"g1_{i}", meta["lr1"])
    carried = regulariser.carry()
    for key, values in carried.items():
        for name in "ab":
            assert_golden(values[name], z[f"state_{key}_{name}"])
    teacher, model = weights("end"), weights("end")
    regulariser = released.ReleasedRegulariser(kind, model, teacher, carried, **settings)
    penalties = []
    for i in range(3):
        move(model, f"g2_{i}", meta["lr2"])
        penalties.append(regulariser.penalty().item())
    assert_golden(penalties, z["penalties"])


# ── the same start for both sides ────────────────────────────────────────────────────────────────


def draw_batches(step: int, seed: int, *, old_visible: bool = False, saliency: bool = False) -> list[Any]:
    """Images B×3×32×32 and labels: patches of a few classes, single pixels of others, void."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(range(1, OLD)) if step == 0 else list(range(OLD, OLD + NEW))
    if old_visible and step:
        ids += list(range(1, OLD))
    batches = []
    for _ in range(STEPS):
        images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
        pool = torch.tensor(
            [0, 0, 0, *[ids[i] for i in torch.randint(len(ids), (4,), generator=generator)], VOID]
        )
        patches = pool[torch.randint(len(pool), (IMAGES, 4, 4), generator=generator)]
        labels = patches.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        pixels = pool[torch.randint(len(pool), labels.shape, generator=generator)]
        labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.15, pixels, labels)
        extras = {"saliency": torch.rand(labels.shape, generator=generator) < 0.5} if saliency else {}
        batches.append((images, labels, extras) if saliency else (images, labels))
    return batches


def settle(network: nn.Module, seed: int, *, sharpness: float = 1.0) -> nn.Module:
    """Random weights, norm layers with statistics of their own, logits apart by ``sharpness``."""
    generator = torch.Generator().manual_seed(seed)
    network.double().train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * noise)
            if name.startswith("cls."):
                parameter.mul_(sharpness)
        for _ in range(3):
            network(torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64))
    return network


def grow(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Start a student at its teacher's weights, a little aside, its new classifier at random."""
    student.load_state_dict(teacher.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return student


@dataclass
class Start:
    """Networks and batches of a step; each side trains a copy."""

    step: int
    student: nn.Module
    teacher: nn.Module | None
    batches: list[Any]


def toy_start(step: int, *, attention: bool = False, sharpness: float = 1.0, **drawn: bool) -> Start:
    torch.manual_seed(0)
    teacher = None
    student = settle(Toy(CLASSES[: step + 1], attention=attention), 1, sharpness=sharpness)
    if step:
        teacher = settle(Toy(CLASSES[:1], attention=attention), 2, sharpness=sharpness)
        student = grow(student, teacher)
        teacher.requires_grad_(False).eval()
    return Start(step, student, teacher, draw_batches(step, 3 + step, **drawn))


# ── our side ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Ours:
    """A trained copy of a start's student, and what its run leaves behind."""

    student: nn.Module
    methods: dict[str, Method]
    terms: dict[str, float]
    states: dict[str, Any] = field(default_factory=dict)


def options(*words: str, fidelity: str = "released", lr: float = LR) -> Options:
    return parse_options([*words, "--task", "15-5", "--lr", str(lr), "--fidelity", fidelity])


def run_ours(opts: Options, start: Start, carried: dict[str, Any] | None = None) -> Ours:
    """Train as a session does, with the state of the previous step's methods."""
    student = copy.deepcopy(start.student)
    if start.step and isinstance(student, IncrementalSegmentationModule):
        student.cls.start(balanced=False)
    methods = build_methods(opts, start.step)
    context = Context(
        task=opts.task_,
        step=start.step,
        model=student,
        model_old=start.teacher,
        protocol=opts.protocol,
        fidelity=opts.fidelity,
        batches=lambda: ((images, labels) for images, labels, *_ in start.batches),
    )
    for name, method in methods.items():
        if carried and name in carried:
            method.from_previous_step(carried[name])
    if not any(method.uses_teacher for method in methods.values()):
        context.model_old = None
    for method in methods.values():
        method.begin_step(context)
    optimizer = make_optimizer(opts, student, methods, opts.lrs[0])
    scheduler = Schedule.of(opts).make(optimizer, ITERATIONS)
    trainer, means = Trainer(context, methods, optimizer, scheduler), Means()
    trainer.model.train()
    for batch in start.batches:
        means.add(trainer.train_step(*batch))
    terms = means.read()
    states = {name: method.state_dict() for name, method in methods.items()}
    return Ours(student, methods, terms, through_a_file(states))


def through_a_file(states: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ── comparison ───────────────────────────────────────────────────────────────────────────────────


def distance(start: nn.Module, ours: nn.Module, theirs: nn.Module) -> float:
    """Largest difference of a tensor after the steps, relative to its largest change."""
    worst = 0.0
    before, here, there = start.state_dict(), ours.state_dict(), theirs.state_dict()
    assert here.keys() == there.keys()
    for name, value in before.items():
        if not value.is_floating_point():
            assert torch.equal(here[name], there[name]), name
            continue
        change = there[name] - value
        difference = float((here[name] - there[name]).abs().max())
        largest = float(change.abs().max())
        worst = max(worst, difference / largest if largest else float(difference > 0) * math.inf)
    return worst


def assert_same(start: Start, ours: nn.Module, theirs: nn.Module) -> None:
    # The change of every tensor, which is the sharper comparison: weights move by a few per cent only.
    assert distance(start.student, ours, theirs) < 1e-5
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def run_theirs(start: Start, terms: released.Terms, **more: Any) -> nn.Module:
    student = copy.deepcopy(start.student)
    released.run_released(
        student, start.teacher, start.batches, terms, **{"lr": LR, "iterations": ITERATIONS, **more}
    )
    return student


# ── MiB's trainer: FT, LWF, LWF-MC, ILT, MIB, and CIL in SDR's ───────────────────────────────────

MIB_CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "FT": (["--method", "FT"], {}),
    "LWF": (["--method", "LWF"], {"kd": 100.0}),
    "LWF-MC": (["--method", "LWF-MC"], {"icarl": "combined", "icarl_importance": 10.0}),
    "LWF-MC disjoint": (["--method", "LWF-MC", "--icarl_disjoint"], {"icarl": "disjoint"}),
    "ILT": (["--method", "ILT"], {"kd": 100.0, "encoder": 100.0}),
    "MIB": (["--method", "MIB"], {"unce": True, "unkd": True, "kd": 10.0}),
}


@pytest.mark.parametrize("name", MIB_CASES)
def test_mib_family(name: str) -> None:
    words, settings = MIB_CASES[name]
    start = toy_start(1)
    theirs = run_theirs(start, released.mib_terms(old=OLD, **settings))
    assert_same(start, run_ours(options(*words), start).student, theirs)
    # docs/fidelity.md names none of these methods: the paper form is the same program.
    assert_same(start, run_ours(options(*words, fidelity="paper"), start).student, theirs)


@pytest.mark.parametrize("name", MIB_CASES)
def test_mib_family_at_step_0(name: str) -> None:
    words, settings = MIB_CASES[name]
    start = toy_start(0)
    binary = {"icarl": "step 0"} if "icarl" in settings else {}
    theirs = run_theirs(start, released.mib_terms(old=0, **binary))
    assert_same(start, run_ours(options(*words), start).student, theirs)


def test_cil_by_its_option() -> None:
    start = toy_start(1)
    theirs = run_theirs(start, released.mib_terms(old=OLD, cil=1.0))
    assert_same(start, run_ours(options("--loss_CIL", "1"), start).student, theirs)
    paper = run_ours(options("--loss_CIL", "1", fidelity="paper"), start)
    assert math.isfinite(paper.terms["cil"])
    assert distance(start.student, paper.student, theirs) > 1e-2


def test_the_preset_cil_does_nothing_when_released() -> None:
    start = toy_start(1)
    opts = options("--method", "CIL")
    assert opts.loss_CIL == 0
    assert any("--method CIL" in note and "FT" in note for note in opts.notes)
    theirs = run_theirs(start, released.mib_terms(old=OLD))
    assert_same(start, run_ours(opts, start).student, theirs)
    paper = options("--method", "CIL", fidelity="paper")
    assert paper.loss_CIL == 1 and not paper.notes
    assert options("--method", "CIL", "--loss_CIL", "2").loss_CIL == 2


# ── EWC, PI, RW ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fidelity", ["released", "paper"])
@pytest.mark.parametrize(
    ("name", "words", "importance"),
    [("ewc", [], 500.0), ("pi", [], 500.0), ("rw", ["--reg_iterations", "2"], 100.0)],
)
def test_regularisers_over_two_steps(name: str, words: list[str], importance: float, fidelity: str) -> None:
    """Importance is gathered at step 0 and penalised at step 1, whose teacher is step 0's network."""
    lr = 1e-3  # the published one: at 1e-2 such a penalty overshoots
    opts = options("--method", name, *words, fidelity=fidelity, lr=lr)
    first = toy_start(0)
    ours = run_ours(opts, first)
    theirs = copy.deepcopy(first.student)
    settings = {"every": 2} if words else {}
    regulariser = released.ReleasedRegulariser(name, theirs, None, None, **settings)
    classify = released.mib_terms(old=0)
    released.run_released(
        theirs, None, first.batches, classify, lr=lr, iterations=ITERATIONS, regulariser=regulariser
    )
    assert_same(first, ours.student, theirs)

    second = toy_start(1)
    second.teacher = copy.deepcopy(theirs).requires_grad_(False).eval()
    second.student.load_state_dict(second.teacher.state_dict(), strict=False)  # the penalty starts at 0
    ours = run_ours(opts, second, ours.states)
    assert ours.terms["reg"] > 0
    theirs = copy.deepcopy(second.student)
    regulariser = released.ReleasedRegulariser(name, theirs, second.teacher, regulariser.carry(), **settings)
    released.run_released(
        theirs,
        second.teacher,
        second.batches,
        classify,
        lr=lr,
        iterations=ITERATIONS,
        regulariser=regulariser,
        importance=importance,
    )
    assert_same(second, ours.student, theirs)
    plain = run_theirs(second, classify, lr=lr)
    assert distance(second.student, plain, theirs) > 1e-2, "the penalty moves nothing: the case is empty"


# ── SDR ──────────────────────────────────────────────────────────────────────────────────────────

PROTOCOLS = {"disjoint": [], "overlapped": ["--overlap"], "sequential": ["--no_mask"]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sdr_over_two_steps(protocol: str) -> None:
    """The published options, three images a batch; prototypes go from step 0 to step 1."""
    opts = options("--method", "SDR", *PROTOCOLS[protocol])
    first = toy_start(0)
    sdr = released.ReleasedSDR(classes=OLD, old=0, step=0, protocol=protocol)
    theirs = run_theirs(first, sdr.terms)
    ours = run_ours(opts, first)
    assert_same(first, ours.student, theirs)
    assert_prototypes(ours, sdr)

    second = toy_start(1, old_visible=protocol == "sequential")
    sdr = released.ReleasedSDR(classes=OLD + NEW, old=OLD, step=1, protocol=protocol, carried=sdr)
    theirs = run_theirs(second, sdr.terms)
    ours = run_ours(opts, second, ours.states)
    assert_same(second, ours.student, theirs)
    assert_prototypes(ours, sdr)
    assert {"unce", "unkd", "attraction", "repulsion", "matching", "sparsity"} <= ours.terms.keys()


def assert_prototypes(ours: Ours, theirs: released.ReleasedSDR) -> None:
    table = ours.states["PrototypeLearning"]
    for c, prototype in theirs.prototypes.items():
        assert int(table["count_features"][c]) == theirs.counts[c]
        torch.testing.assert_close(table["prototypes"][c].double(), prototype, rtol=1e-5, atol=1e-6)
    unseen = [c for c in range(theirs.classes) if c not in theirs.prototypes]
    assert not table["count_features"][unseen].any()


def test_each_term_of_sdr_alone_moves_the_weights_as_released() -> None:
    """The published weights make some terms small: here each is large enough to be seen."""
    start = toy_start(1)
    cases = {
        "matching": ["--loss_de_prototypes", "1", "--loss_de_prototypes_sumafter"],
        "attraction": ["--loss_fc", "1"],
        "repulsion": ["--lfc_sep_clust", "1"],
        "sparsity": [
            *("--loss_featspars", "1", "--lfs_normalization", "max_maskedforclass"),
            *("--lfs_shrinkingfn", "exponential", "--lfs_loss_fn_touse", "ratio"),
        ],
    }
    for term, words in cases.items():
        weights = dict.fromkeys(cases, 0.0) | {term: 1.0, "kd": 0.0}
        sdr = released.ReleasedSDR(classes=OLD + NEW, old=OLD, step=1, protocol="overlapped", **weights)
        theirs = run_theirs(start, sdr.terms)
        assert_same(start, run_ours(options("--unce", "--overlap", *words), start).student, theirs)


def test_sdr_differs_between_paper_and_release() -> None:
    start = toy_start(1)
    words = ["--method", "SDR", "--loss_fc", "1", "--loss_de_prototypes", "1"]
    paper, release = (run_ours(options(*words, fidelity=f), start) for f in ("paper", "released"))
    assert all(math.isfinite(value) for value in paper.terms.values())
    assert distance(start.student, paper.student, release.student) > 1e-3


# ── PLOP and SATS ────────────────────────────────────────────────────────────────────────────────

SHARP = 10.0


def medians(start: Start, infinite: float | None = None) -> list[float]:
    """The released thresholds, on batches where the pseudo-labels are a real choice."""
    assert start.teacher is not None
    found = released.released_medians(start.teacher, start.batches, OLD + NEW, 1e-3, infinite)
    for images, labels, *_ in start.batches:
        outputs, _ = start.teacher(images)
        filled = released.released_pseudo_labels(labels, outputs, found, OLD + NEW)
        assert (filled.sure & filled.asked).any() and (~filled.sure & filled.asked).any()
        assert filled.share.unique().numel() > 1
    return found


@pytest.mark.parametrize("overlap", [[], ["--overlap"]])
def test_plop(overlap: list[str]) -> None:
    start = toy_start(1, sharpness=SHARP)
    theirs = run_theirs(start, released.plop_terms(old=OLD, new=NEW, medians=medians(start)))
    ours = run_ours(options("--method", "PLOP", *overlap), start)
    assert_same(start, ours.student, theirs)
    assert ours.terms.keys() == {"ce", "pod", "total"}
    paper = run_ours(options("--method", "PLOP", *overlap, fidelity="paper"), start)
    assert all(math.isfinite(value) for value in paper.terms.values())
    assert distance(start.student, paper.student, theirs) > 1e-3


def test_plop_by_its_options() -> None:
    """The published command line: plain options instead of the preset."""
    start = toy_start(1, sharpness=SHARP)
    words = [
        *("--method", "FT", "--pod", "local", "--pod_factor", "0.01", "--pod_logits", "--pseudo", "entropy"),
        *("--threshold", "0.001", "--classif_adaptive_factor", "--init_balanced", "--pod_options"),
        '{"switch": {"after": {"extra_channels": "sum", "factor": 0.0005, "type": "local"}}}',
    ]
    theirs = run_theirs(start, released.plop_terms(old=OLD, new=NEW, medians=medians(start)))
    assert_same(start, run_ours(options(*words), start).student, theirs)


def test_the_step_threshold_comes_too_late_when_released() -> None:
    start = toy_start(1, sharpness=SHARP)
    words = ["--method", "PLOP", "--threshold", "0.02", "--step_threshold", "0.5"]
    found, without = (
        run_ours(options(*words[:end]), start).methods["PseudoLabels"].thresholds for end in (6, 4)
    )
    paper = run_ours(options(*words, fidelity="paper"), start).methods["PseudoLabels"].thresholds
    assert torch.equal(found, without)
    assert float(paper.min()) >= 0.52 - 1e-6


def test_an_infinite_threshold_stays_in_plop_and_is_0_005_in_sats() -> None:
    """Many pixels, no bin with half of them: the released sum passes by all and ends at an empty bin."""
    peaks = torch.linspace(0.0, 6.0, 120 * 120, dtype=torch.float64).view(1, 120, 120)
    logits = torch.zeros(1, OLD, 120, 120, dtype=torch.float64)
    logits[:, 3] = peaks + 1e-3
    batch = (logits, torch.zeros(1, 120, 120, dtype=torch.long))
    for name, infinite, expected in (("PLOP", None, math.inf), ("SATS", 0.005, 0.005)):
        method = build_methods(options("--method", name), 1)["PseudoLabels"]
        start = toy_start(1)
        context = Context(options("--method", name).task_, 1, start.student, fidelity="released")
        context.model_old, context.batches = (lambda images: (images, {})), lambda: [batch]  # type: ignore[assignment]
        method.begin_step(context)
        theirs = released.released_medians(lambda images: (images,), [batch], OLD + NEW, 1e-3, infinite)
        assert theirs[3] == expected
        torch.testing.assert_close(method.thresholds, torch.tensor(theirs))  # type: ignore[attr-defined]


def test_plop_at_step_0_is_fine_tuning() -> None:
    start = toy_start(0)
    theirs = run_theirs(start, released.mib_terms(old=0))
    assert_same(start, run_ours(options("--method", "PLOP"), start).student, theirs)


def test_sats() -> None:
    start = toy_start(1, attention=True, sharpness=SHARP)
    found = medians(start, infinite=0.005)
    theirs = run_theirs(start, released.sats_terms(old=OLD, new=NEW, medians=found))
    ours = run_ours(options("--method", "SATS", "--overlap"), start)
    assert_same(start, ours.student, theirs)
    assert ours.terms.keys() == {"ce", "unkd", "attention_transfer", "total"}
    paper = run_ours(options("--method", "SATS", "--overlap", fidelity="paper"), start)
    assert all(math.isfinite(value) for value in paper.terms.values())
    assert distance(start.student, paper.student, theirs) > 1e-3


def test_sats_feature_maps_are_the_stages_alone() -> None:
    """The head's output, which PLOP distils beside them, is not among them."""
    start = toy_start(1, attention=True, sharpness=SHARP)
    found = medians(start, infinite=0.005)
    theirs = run_theirs(start, released.sats_terms(old=OLD, new=NEW, medians=found, stages=True))
    words = ["--method", "SATS", "--overlap", "--distill_object", "sats-feature-CNN"]
    ours = run_ours(options(*words), start)
    assert_same(start, ours.student, theirs)
    without = run_theirs(start, released.sats_terms(old=OLD, new=NEW, medians=found, transfer=0.0))
    assert distance(start.student, without, theirs) > 1e-3, "the transfer moves nothing: the case is empty"


def test_plop_in_sats_trainer_is_plop_with_a_factor_of_1() -> None:
    start = toy_start(1, sharpness=SHARP)
    found = medians(start, infinite=0.005)
    theirs = run_theirs(start, released.plop_terms(old=OLD, new=NEW, medians=found, adaptive=False))
    words = ["--method", "PLOP", "--classif_adaptive_min_factor", "1"]
    assert_same(start, run_ours(options(*words), start).student, theirs)


# ── --fix_bn ─────────────────────────────────────────────────────────────────────────────────────


def test_fix_bn_freezes_affine_weights_alone_when_released() -> None:
    """The trainers' ``train()`` puts the norm layers back into training: their statistics move."""
    torch.manual_seed(0)
    student = settle(IncrementalSegmentationModule(ToyNetwork(), CLASSES[:1]), 1)
    start = Start(0, student, None, draw_batches(0, 3))
    theirs = copy.deepcopy(start)
    for module in theirs.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False).eval()
    theirs.student = run_theirs(theirs, released.mib_terms(old=0), train_mode=nn.Module.train)
    ours = {}
    for fidelity in ("released", "paper"):
        fixed = copy.deepcopy(start)
        fixed.student.fix_bn(statistics=fidelity == "paper")
        ours[fidelity] = run_ours(options("--fix_bn", fidelity=fidelity), fixed).student.state_dict()
    before, after = start.student.state_dict(), theirs.student.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(ours["released"][name], value, rtol=1e-5, atol=1e-7)
        if "running" in name:
            assert torch.equal(ours["paper"][name], before[name]) and not torch.equal(value, before[name])


# ── SSUL ─────────────────────────────────────────────────────────────────────────────────────────


SSUL_SHARP = 1.0


class ToyNetwork(Network):
    """The toy's body and head, for a network with SSUL's classifiers."""

    intermediates = frozenset()
    out_channels, backbone_channels = 10, 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1)
        )
        self.head = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 10, 1))

    def forward(self, images: Tensor, needs: frozenset[str]) -> tuple[Tensor, dict[str, Any]]:
        return self.head(F.relu(self.body(images))), {}


def ssul_start(step: int, saliency: bool) -> Start:
    torch.manual_seed(0)
    network = [
        IncrementalSegmentationModule(ToyNetwork(), CLASSES[: s + 1], classifier="unknown") for s in (0, step)
    ]
    teacher, student = (settle(net, seed, sharpness=SSUL_SHARP) for seed, net in enumerate(network))
    batches = draw_batches(step, 5, saliency=saliency)
    if step == 0:
        return Start(0, student, None, batches)
    return Start(1, grow(student, teacher), teacher.requires_grad_(False).eval(), batches)


def with_exemplars(start: Start) -> Start:
    """The same batches with one exemplar in each, whose labels show old classes too, the first among them."""
    visible = draw_batches(1, 6, old_visible=True)
    for place, ((_, labels, extras), (_, seen)) in enumerate(zip(start.batches, visible, strict=True)):
        extras["exemplar"] = torch.arange(IMAGES) == place % IMAGES
        seen[(seen > 0) & (seen < OLD // 2)] = 1
        labels[extras["exemplar"]] = seen[extras["exemplar"]]
        assert {0, 1, VOID} < set(labels[extras["exemplar"]].unique().tolist())
    return start


def slow_statistics(student: nn.Module) -> None:
    """Training mode; the body's running statistics move by 1 %."""
    student.train()
    for module in student.network.body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01


def freeze_as_ssul(student: nn.Module) -> None:
    """The published runs' --freeze --bn_freeze: every norm layer rests, all but three heads are frozen."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith(("cls.0.", "cls.2.", "cls.unknown.")))
    student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False).eval()


def start_from_unknown(student: nn.Module) -> None:
    """--w_transfer: the new head is the unknown class's, its last layer once per new class."""
    new, unknown = student.cls.parts[2].state_dict(), student.cls.unknown.state_dict()
    for name, value in unknown.items():
        new[name].copy_(torch.stack([value[0]] * NEW) if name.startswith("3.") else value)


SSUL_FLOOR = 1e-6


@pytest.mark.parametrize(
    ("saliency", "memory"), [(True, False), (False, False), (True, True)], ids=["maps", "no maps", "SSUL-M"]
)
def test_ssul(saliency: bool, memory: bool) -> None:
    start = ssul_start(1, saliency)
    if memory:
        start = with_exemplars(start)
    theirs = copy.deepcopy(start.student)
    start_from_unknown(theirs)
    released.run_released(
        theirs,
        start.teacher,
        start.batches,
        released.ssul_terms(),
        lr=LR,
        iterations=ITERATIONS,
        lr_factor=lambda name: 1e-4 if name.startswith("cls.0.") else 1.0,
        floor=SSUL_FLOOR,
        train_mode=freeze_as_ssul,
    )
    ours = run_ours(options("--method", "SSUL-M" if memory else "SSUL", "--overlap"), start)
    fresh = Start(1, copy.deepcopy(start.student), start.teacher, start.batches)
    start_from_unknown(fresh.student)
    assert_same(fresh, ours.student, theirs)
    scores = torch.cat([start.teacher(images)[0].sigmoid().amax(dim=1) for images, *_ in start.batches])
    assert 0.01 < float((scores >= 0.7).double().mean()) < 0.99, "the pseudo-labels are no choice"
    paper = run_ours(options("--method", "SSUL", "--overlap", fidelity="paper"), start)
    assert all(math.isfinite(value) for value in paper.terms.values())
    assert not torch.allclose(paper.student.cls.parts[2][3].weight, theirs.cls.parts[2][3].weight, atol=1e-6)


def test_ssul_at_step_0() -> None:
    start = ssul_start(0, True)
    theirs = run_theirs(
        start,
        released.ssul_terms(),
        lr_factor=lambda name: 0.1 if name.startswith("network.body.") else 1.0,
        floor=SSUL_FLOOR,
        train_mode=slow_statistics,
    )
    assert_same(start, run_ours(options("--method", "SSUL", "--overlap"), start).student, theirs)
