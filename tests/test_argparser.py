"""Options: presets, what was typed, and the message of each fault."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argparser import build_parser, declarations, declared, parse_options, with_implied
from methods import CLASSIFIERS, METHODS, REGISTRY
from methods.classifiers import classifier_names
from methods.ssul import UnknownClass
from scripts import experiment_plan
from utils import loss
from utils.errors import UserError
from utils.option_roles import Declaration
from utils.option_types import Number

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(["--version"])
    assert ended.value.code == 0
    assert f'version = "{capsys.readouterr().out.strip()}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("name", "known"),
    [("lfs_normalization", loss.NORMALIZATIONS), ("distill_object", loss.DISTILL_OBJECTS)],
)
def test_choices_are_those_of_the_loss(name: str, known: tuple[str, ...]) -> None:
    assert next(action.choices for action in build_parser()._actions if action.dest == name) == known


def test_all_kinds_of_classifiers_can_be_chosen() -> None:
    assert set(CLASSIFIERS) == set(classifier_names())


def test_a_preset_sets_its_options_and_is_matched_without_case() -> None:
    opts = parse_options(["--method", "mib", "--task", "15-5"])
    assert (opts.method, opts.loss_kd) == ("MIB", 10)
    assert opts.unce and opts.unkd and opts.init_balanced


def test_what_was_typed_wins_over_the_preset_and_is_said() -> None:
    opts = parse_options(["--method", "MIB", "--loss_kd", "3", "--task", "15-5"])
    assert opts.loss_kd == 3
    assert any("--loss_kd 3" in note and "10" in note for note in opts.notes)


def test_a_default_that_was_typed_wins_too() -> None:
    opts = parse_options(["--method", "MIB", "--loss_kd", "0"])
    assert opts.loss_kd == 0


@pytest.mark.parametrize(("task", "weight"), [("15-5", 10), ("15-1", 100), ("15-5s", 100), ("19-1", 10)])
def test_mib_distils_stronger_on_15_1(task: str, weight: float) -> None:
    assert parse_options(["--method", "MIB", "--task", task]).loss_kd == weight


def test_plop_and_ssul_have_values_of_their_own_on_ade() -> None:
    voc = parse_options(["--method", "PLOP", "--task", "15-5"])
    ade = parse_options(["--method", "PLOP", "--dataset", "ade", "--task", "100-50"])
    assert (voc.pod_factor, ade.pod_factor) == (1e-2, 1e-3)
    assert voc.pod_options["switch"]["after"]["factor"] == 5e-4
    assert ade.pod_options["switch"]["after"]["factor"] == 1e-5
    assert parse_options(["--method", "SSUL-M", "--task", "15-5"]).memory == 100
    assert parse_options(["--method", "SSUL-M", "--dataset", "ade", "--task", "100-50"]).memory == 300


def test_void_and_unseen_follow_the_family_of_the_method() -> None:
    mib, plop = parse_options(["--method", "MIB"]), parse_options(["--method", "PLOP"])
    by_options = parse_options(["--method", "FT", "--pod", "local", "--pseudo", "entropy"])
    assert (mib.void_label, mib.unseen_label) == ("background", "ignore")
    assert (plop.void_label, plop.unseen_label) == ("ignore", "background")
    assert (by_options.void_label, by_options.unseen_label) == ("ignore", "background")


def test_released_ssul_brings_its_head_augmentation_and_floor() -> None:
    def chosen(*words: str) -> tuple[str, str, float]:
        opts = parse_options([*words, "--task", "15-5"])
        return opts.head, opts.augmentation, opts.min_lr

    plain = ("mib", "resized_crop", 0.0)
    released = ("--fidelity", "released")
    assert chosen() == chosen("--method", "SSUL-M") == chosen("--method", "PLOP", *released) == plain
    for words in (["--method", "SSUL"], ["--method", "SSUL-M"], ["--unknown"]):
        assert chosen(*words, *released) == ("aspp", "scale_crop", 1e-6)
    assert chosen("--method", "SSUL", *released, "--warmup", "0.1") == ("aspp", "scale_crop", 0.0)
    assert chosen("--method", "SSUL", *released, "--model", "segformer_b0")[0] == "mib"
    typed = ("--head", "mib", "--augmentation", "resized_crop", "--min_lr", "0")
    assert chosen("--method", "SSUL", *released, *typed) == plain
    notes = parse_options(["--unknown", *released, *typed]).notes
    assert "--head mib was typed and wins over aspp of the other options" in notes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--overlap"], ["--overlapped"]),
        (["--no_pretrained"], ["--no-pretrained"]),
        (["--task", "15-1"], ["--task", "15-5s"]),
    ],
)
def test_both_spellings_mean_the_same(one: list[str], other: list[str]) -> None:
    assert parse_options(one).as_dict() == parse_options(other).as_dict()


def test_steps_and_learning_rates() -> None:
    opts = parse_options(["--task", "15-1", "--step", "all", "--lr", "0.01"])
    assert opts.steps == [0, 1, 2, 3, 4, 5]
    assert opts.lrs == [0.01] * 6
    opts = parse_options(["--task", "15-5", "--step", "0", "1", "--lr", "0.01", "0.001"])
    assert opts.lrs == [0.01, 0.001]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--overlaped"], ["--overlaped", "--overlap"]),
        (["--method", "SDRR"], ["SDRR", "sdr"]),
        (["--task", "15-6"], ["15-6"]),
        (["--step", "x"], ["--step x", "all"]),
        (["--step", "7"], ["--step 7", "0 to 1"]),
        (["--task", "15-5", "--step", "0", "1", "--lr", "1", "1", "1"], ["--lr", "2 steps"]),
        (["--lr", "-1"], ["--lr"]),
        (["--no_mask", "--overlap"], ["--no_mask", "--overlap"]),
        (["--partitioned", "--overlap"], ["--overlap", "--partitioned"]),
        (["--partition_seed", "1"], ["--partition_seed", "--partitioned"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--pod_options", "{"], ["--pod_options", "JSON"]),
        (["--pod_prepro", "squared"], ["--pod_prepro", "pow"]),
        (["--spp_scales", "1", "0"], ["--spp_scales", "at least 1"]),
        (["--reg_iterations", "0"], ["--reg_iterations", "at least 1"]),
        (["--opt_level", "O3", "--norm_act", "iabn_sync"], ["--opt_level O3", "bfloat16", "O1"]),
        (["--pseudo", "entropie"], ["--pseudo", "entropy"]),
        (["--crop_size", "16"], ["--crop_size", "16", "at least 32"]),
        (["--pod_options", '{"switch": {"after": {"factor": Infinity}}}'], ["--pod_options", "inf"]),
        (["--pod_options", '{"switch": {"before": {"factor": 1e999}}}'], ["--pod_options", "inf"]),
        (["--pod_options", '{"switch": {"after": {"spp_scales": [1, -2]}}}'], ["--pod_options", "-2"]),
        (["--name", "a/b"], ["--name a/b"]),
        (["--name", ""], ["--name", "empty"]),
        (["--name", ".."], ["--name ..", "dot"]),
        (["--date", "2024/01/01"], ["--date 2024/01/01", "leave out /"]),
        (["--name", "n" * 150, "--date", "d" * 40], ["--date, --task and --name", "at most 180"]),
        (["--step_ckpt", "x.pth"], ["--step_ckpt", "step 0"]),
        (["--batch_size", "1"], ["--batch_size 1"]),
        (["--head", "unet"], ["--head", "aspp"]),
        (["--head", "aspp", "--model", "segformer_b0"], ["--head", "--decoder"]),
        (["--head", "aspp", "--pooling", "16"], ["--pooling 16", "--head aspp"]),
        (["--model", "mlp", "--pooling", "16"], ["--pooling 16", "not mlp"]),
        (
            ["--model", "mlp", "--backbone", "timm/resnet10t", "--norm_act", "abn"],
            ["--norm_act abn", "its own norms"],
        ),
        (["--augmentation", "crop"], ["--augmentation", "scale_crop"]),
        (["--min_lr", "-1"], ["--min_lr"]),
        (["--min_lr", "0.1", "--lr", "0.01"], ["--min_lr 0.1", "--lr 0.01"]),
        (["--min_lr", "1e-6", "--lr_policy", "step"], ["--min_lr", "--lr_policy step"]),
        (["--memory_labels", "current"], ["--memory_labels goes with --memory"]),
        (["--warmup_form", "factor"], ["--warmup_form goes with --warmup"]),
        (["--half", "float16"], ["--half float16 is of --opt_level O1 and O2, not O0"]),
        (["--half", "float16", "--opt_level", "O3"], ["not O3"]),
    ],
)
def test_faults_are_one_line_that_names_the_option(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def _numeric() -> list[argparse.Action]:
    """Every option whose default or type is a number."""
    return [
        action
        for action in build_parser()._actions
        if isinstance(action.type, Number)
        or action.type in (int, float)
        or any(type(value) in (int, float) for value in _listed(action.default))
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _beyond(number: Number) -> list[str]:
    """Words for what lies outside a range on both sides."""
    away = 1 if number.kind is int else 0.5
    outside = [number.low if number.above else number.low - away]
    outside.append(number.high if number.below else number.high * (1 + 1e-9) + away)
    return [repr(number.kind(value)) for value in outside]


@pytest.mark.parametrize("action", _numeric(), ids=lambda action: action.option_strings[0])
def test_every_number_has_a_range_that_is_told(action: argparse.Action) -> None:
    """A bare ``int`` or ``float`` as the type of an option fails here; utils.option_types has ranges."""
    name = action.option_strings[0]
    words = ["nan", "inf", "-inf", "-Infinity", "1e999", "-1e999", "9" * 5000, "x", ""]
    if isinstance(action.type, Number):
        assert math.isfinite(action.type.low) and math.isfinite(action.type.high)
        assert all(value is None or value in action.type for value in _listed(action.default))
        words += _beyond(action.type)
        if -1 not in action.type:
            words.append("-1")
    else:
        assert action.choices, f"{name} is a number without a range"
        words.append("-1")
    parser = build_parser()
    for word in words:
        for arguments in ([f"{name}={word}"], [name, word]):
            with pytest.raises(UserError) as caught:
                parser.parse_args(arguments)
            message = str(caught.value)
            assert name in message and "\n" not in message
            if isinstance(action.type, Number):
                assert action.type.description in message and len(message) < 300, message


def test_numbers_at_the_ends_of_their_ranges_are_taken() -> None:
    for action in _numeric():
        if isinstance(action.type, Number):
            low, high = (action.type.kind(end) for end in (action.type.low, action.type.high))
            ends = [end for end, open_ in ((low, action.type.above), (high, action.type.below)) if not open_]
            for end in ends:
                found = build_parser().parse_args([action.option_strings[0], repr(end)])
                assert _listed(getattr(found, action.dest)) == [end]
    assert parse_options(["--step_threshold", "-1e-3"]).step_threshold == -1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_parses(method: str) -> None:
    assert parse_options(["--method", method.lower(), "--task", "15-5"]).method == method


def test_every_option_marked_now_exists_with_its_default() -> None:
    table = SHARED / "options.csv"
    if not table.is_file():
        pytest.skip("needs ../shared/options.csv")
    # Decided by the machine or the family instead, see docs/fidelity.md.
    decided = {"--where_to_sim", "--norm_act", "--model", "--distill_object", "--checkpoint", "--fusion-mode"}
    several = {"--lr", "--step", "--batch_size", "--val_interval"}
    actions = {name: action for action in build_parser()._actions for name in action.option_strings}
    with table.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["scope"] != "now":
                continue
            assert row["option"] in actions, row["option"]
            action, default = actions[row["option"]], row["default"]
            if row["option"] in decided | several:
                continue
            if row["kind"] == "flag":
                assert action.default is (not default.startswith("off")), row["option"]
            elif default not in ("None", ""):
                words = default.strip("[]").split(", ") if "[" in default else [default]
                values = action.default if isinstance(action.default, list) else [action.default]
                assert values == [type(v)(w) for v, w in zip(values, words, strict=True)], row["option"]


def test_wandb_without_its_package_or_anything_to_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--wandb: --check_data and --predict log nothing; drop it"):
        parse_options(["--wandb", "board", "--check_data"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert parse_options([]).wandb is None
    with pytest.raises(UserError, match="--wandb needs the package wandb"):
        parse_options(["--wandb", "board"])


def own_data(root: Path) -> list[str]:
    """Options of a data set of five classes below ``root``; only its ``classes.txt`` is read."""
    (root / "classes.txt").write_text("background\ncat\ndog\ncow\nhen\n")
    return ["--dataset", "folder", "--data_root", str(root)]


def test_own_data_takes_its_order_from_a_file_or_a_seed(tmp_path: Path) -> None:
    common = own_data(tmp_path)
    order = tmp_path / "order.txt"
    order.write_text("hen\n3\ndog\ncat\n")
    opts = parse_options([*common, "--task", "2-1", "--class_order", str(order)])
    assert opts.task_.steps == ((0, 4, 3), (2,), (1,))
    assert opts.as_dict()["class_order"] == str(order)
    assert parse_options([*common, "--task", "2-1", "--class_order_seed", "1"]).task_.order[0] == 0
    with pytest.raises(UserError, match="--class_order and --class_order_seed exclude each other"):
        parse_options([*common, "--task", "2-1", "--class_order", str(order), "--class_order_seed", "1"])
    order.write_text("".join(f"{number}\n" for number in range(20, 0, -1)))
    voc = parse_options(["--dataset", "voc", "--task", "15-5", "--class_order", str(order)])
    assert voc.task_.steps[1] == (5, 4, 3, 2, 1)


def test_a_task_file_with_one_task_needs_no_name(tmp_path: Path) -> None:
    common = own_data(tmp_path)
    (tmp_path / "tasks.yaml").write_text("mine: [[0, 1, 2], [3, 4]]\n")
    assert parse_options([*common, "--task_file", str(tmp_path / "tasks.yaml")]).task == "mine"


def test_the_check_of_the_data_needs_no_task(tmp_path: Path) -> None:
    assert parse_options(["--check_data", "--dataset", "ade"]).task == "offline"
    assert parse_options([*own_data(tmp_path), "--check_data"]).task_.steps == ((0, 1, 2, 3, 4),)
    assert parse_options(["--check_data", "--task", "15-1"]).task == "15-5s"


def test_own_data_without_its_class_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classes\.txt: missing; .*docs/own_data\.md"):
        parse_options(["--dataset", "folder", "--data_root", str(tmp_path), "--task", "2-1"])
    (tmp_path / "classes.txt").write_bytes(b"background\nchi\xe9n\n")
    with pytest.raises(UserError, match=r"classes\.txt: not UTF-8 text"):
        parse_options(["--dataset", "folder", "--data_root", str(tmp_path), "--task", "2-1"])


def test_what_the_released_programs_do_beside_their_options() -> None:
    released = ["--fidelity", "released"]
    # SDR's sequential data sets keep void; MiB's would not, and no number of theirs is published.
    assert parse_options(["--no_mask", *released]).void_label == "ignore"
    assert parse_options(["--no_mask", "--void_label", "background", *released]).void_label == "background"
    assert parse_options(["--no_mask"]).void_label == parse_options(released).void_label == "background"
    for method, keep, unseen in (("SATS", "best", "background"), ("SSUL-M", "best", "ignore")):
        opts = parse_options(["--method", method, *released])
        assert (opts.keep, opts.unseen_label) == (keep, unseen)
        paper = parse_options(["--method", method])
        assert (paper.keep, paper.unseen_label) == ("last", "background")
    assert parse_options(["--method", "PLOP", *released]).keep == "last"
    assert parse_options(["--method", "SATS", "--keep", "last", *released]).keep == "last"
    (note,) = parse_options(["--keep", "best", "--epochs", "3", "--val_interval", "3"]).notes
    assert "--keep best has nothing to choose from" in note
    assert not parse_options(["--keep", "best", "--epochs", "3", "--val_interval", "2"]).notes
    with pytest.raises(UserError, match=r"--batch_size 1: .* --fix_bn with --fidelity paper"):
        parse_options(["--fix_bn", "--batch_size", "1", *released])
    parse_options(["--fix_bn", "--batch_size", "1"])


# What the lists of the first version said of every option that it had, which the roles replace. By letters:
QUESTIONS: dict[str, Callable[[Declaration], bool]] = {
    "r": lambda option: option.must_agree_on_resume(keep_best=False),
    "b": lambda option: option.must_agree_on_resume(keep_best=True),
    "c": lambda option: option.comes_with_checkpoint,
    "t": lambda option: option.chooses_task,
    "m": lambda option: option.tells_methods_apart,
    "p": lambda option: option.tells_methods_apart and option.is_path,
    "x": lambda option: option.tells_methods_apart and experiment_plan.is_compared(option),
    "g": lambda option: option.set_by_experiment,
    "n": lambda option: option.is_named_with_results,
}
VERDICTS = {
    "": (
        "where_to_sim local_rank num_workers timeout grad_checkpointing compile debug predict out "
        "raw date sample_num visualize print_interval ckpt_interval ckpt_minutes resume method_file "
        "steps lrs"
    ),
    "rbcg": "random_seed",
    "rbmx": (
        "deterministic no_mask overlap data_masking void_label augmentation cross_val memory "
        "no_pretrained fix_bn freeze init_balanced epochs lr_old momentum weight_decay lr_policy "
        "lr_power min_lr lr_decay_step lr_decay_factor warmup opt_level accumulate keep bce unce "
        "focal_loss focal_loss_gamma loss_kd unkd alpha kd_scheduling loss_de loss_de_maskedold "
        "loss_de_cosine icarl icarl_importance icarl_disjoint icarl_bkg loss_CIL loss_de_prototypes "
        "loss_fc lfc_sep_clust loss_de_prototypes_sumafter lfc_L2normalized lfc_nobgr lfc_orth_sep "
        "lfc_orth_maxonly lfc_sep_clust_ison_proto loss_featspars lfs_normalization lfs_shrinkingfn "
        "lfs_loss_fn_touse loss_SNNL pseudo threshold step_threshold pseudo_nb_bins "
        "classif_adaptive_factor classif_adaptive_min_factor pod pod_factor pod_options pod_prepro "
        "no_pod_schedule pod_apply pod_logits pod_large_logits spp_scales distill_object "
        "distill_weight_args regularizer reg_importance reg_alpha reg_no_normalize reg_iterations"
    ),
    "cmp": "data_root",
    "rbcmx": (
        "dataset crop_size test_on_val model backbone output_stride norm_act pooling head decoder unknown"
    ),
    "tmx": "task class_order_seed",
    "tmpx": "task_file class_order",
    "g": "step check_data test ckpt logdir name checkpoint step_ckpt",
    "bcmxn": "crop_val val_on_trainset",
    "mp": "splits_dir",
    "c": "skip_corrupt",
    "mx": "net_pytorch feat_dim batch_size lr method",
    "rbmpx": "pretrained_path",
    "bcmx": "unseen_label",
    "bmxn": "test_scales test_flip fusion_mode",
    "b": "val_interval",
    "rbcmxn": "fidelity",
    "rbm": "protocol",
}


def test_roles_say_what_the_lists_of_the_first_version_said() -> None:
    listed = {name: verdict for verdict, names in VERDICTS.items() for name in names.split()}
    said = {
        name: "".join(letter for letter, ask in QUESTIONS.items() if ask(declared(name))) for name in listed
    }
    assert said == listed


def test_every_option_has_a_role() -> None:
    parser = build_parser()
    assert {action.dest for action in parser._actions} - {"help", "version"} == parser.declared.keys()
    assert {option.name for option in declarations()} == parser.declared.keys()
    assert declared("no_such_option").role == "learning"


def test_what_switches_something_off_says_so_and_keeps_its_published_name() -> None:
    for honest, published in (
        ("--whole_val", "crop_val"),
        ("--no_tensorboard", "visualize"),
        ("--mib_network", "net_pytorch"),
    ):
        assert declared(published).flag == honest
        for typed in (honest, f"--{published}"):
            opts = parse_options([typed])
            assert getattr(opts, published) is False
            assert published in opts.typed
    off = [option for option in declarations() if option.switches_off]
    assert [option.flag for option in off if option.flag == f"--{option.name}"] == []


def test_the_method_names_the_classifier() -> None:
    assert parse_options([]).classifier == parse_options(["--method", "MIB"]).classifier == "linear"
    for words in (["--unknown"], ["--method", "SSUL"], ["--method", "SSUL-M", "--classifier", "unknown"]):
        assert parse_options(words).classifier == "unknown"
    # Without its method a kind with channels of its own can be evaluated, not trained.
    assert parse_options(["--classifier", "unknown", "--test"]).classifier == "unknown"
    with pytest.raises(UserError, match="--classifier unknown is trained only by a method that names it"):
        parse_options(["--method", "MIB", "--classifier", "unknown"])
    with pytest.raises(UserError, match="--classifier linear: the method needs --classifier unknown; drop"):
        parse_options(["--method", "SSUL", "--classifier", "linear"])
    with pytest.raises(UserError, match=r"--classifier: unknown, choose one of linear.*--method_file"):
        parse_options(["--classifier", "liner"])


@pytest.mark.parametrize("words", ["--loss_kd 10", "--loss_CIL 1", "--icarl", "--pseudo entropy", "--lgkd"])
@pytest.mark.parametrize("method", ["SSUL", "STAR", "DKD"])
def test_logits_of_other_channels_are_not_read_class_by_class(method: str, words: str) -> None:
    option = words.split()[0]
    with pytest.raises(UserError, match=f"{option} takes channel c of the logits for class c, but"):
        parse_options(["--method", method, *words.split()])
    parse_options(["--method", "DFT", *words.split()])  # its teacher's logits are those of the seen classes


def test_typed_options_of_methods_that_are_off_are_noted() -> None:
    def notes(*words: str) -> list[str]:
        return [note for note in parse_options(list(words)).notes if "has no effect" in note]

    off = "--threshold has no effect: its method, PseudoLabels, is off"
    assert notes("--method", "FT", "--threshold", "0.5", "--pod_logits") == [
        "--pod_logits has no effect: its method, PooledOutputDistillation, is off", off
    ]  # fmt: skip
    assert notes("--method", "PLOP", "--threshold", "0.5", "--pod_factor", "1") == []
    assert notes("--method", "SSUL", "--threshold", "0.5") == [], "SSUL reads it too"
    assert notes("--method", "MIB", "--loss_CIL", "0") == [], "the default"
    predict = ("--predict", "x", "--ckpt", "y", "--out", "z", "--method", "FT", "--opt_level", "O0")
    assert parse_options([*predict, "--epochs", "7", "--memory", "3"]).notes == [
        "no effect on --predict: --memory, --epochs"
    ]
    with pytest.raises(UserError, match="--predict reads --ckpt only; drop --step_ckpt"):
        parse_options([*predict, "--step_ckpt", "w"])
    of_deeplab = ("--backbone", "resnet50", "--output_stride", "8")
    assert [note.split()[0] for note in notes("--model", "segformer_b0", *of_deeplab)] == [*of_deeplab[::2]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr_policy step --lr_power 2", "--lr_power is of --lr_policy poly, not step"),
        ("--lr_decay_step 3", "--lr_decay_step is of --lr_policy step, not poly"),
        ("--lr_decay_factor 0.3", "--lr_decay_factor is of --lr_policy step, not poly"),
        ("--task 15-1 --step 1 0", "--step 1 0: give each step once, in ascending order"),
        ("--task 15-1 --step 0 0", "--step 0 0: give each step once, in ascending order"),
    ],
)
def test_options_of_another_choice_are_refused(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_options(words.split())


def test_two_methods_that_need_different_classifiers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(UnknownClass):
        classifier = "linear"

    monkeypatch.setattr("methods.REGISTRY", [*REGISTRY, Other])
    with pytest.raises(
        UserError, match="UnknownClass needs --classifier unknown, Other needs --classifier lin"
    ):
        parse_options(["--unknown"])


@pytest.mark.parametrize(
    ("implied", "words"),
    [
        ({"warmop": 0.1}, "--warmop 0.1: is no option"),
        ({"warmup": 2}, "--warmup 2: "),
        (None, r"returned None; return a dict of options, \{\} for none"),
    ],
)
def test_wrong_implied_options_are_the_methods_fault(
    monkeypatch: pytest.MonkeyPatch, implied: Any, words: str
) -> None:
    monkeypatch.setattr(UnknownClass, "implied_options", classmethod(lambda cls, opts: implied))
    with pytest.raises(UserError, match=rf"ssul\.py: UnknownClass\.implied_options: {words}"):
        parse_options([])


def test_released_programs_of_exemplars_schedule_and_evaluation() -> None:
    def chosen(*words: str) -> tuple[str, ...]:
        opts = parse_options([*words, "--task", "15-5"])
        return (
            opts.eval_images,
            opts.memory_choice,
            opts.memory_labels,
            opts.memory_batches,
            opts.warmup_form,
        )

    released = ("--fidelity", "released")
    plain = ("balanced", "stored", "halves", "before")
    assert chosen("--method", "SSUL-M") == chosen() == ("all", *plain)
    assert chosen("--method", "SATS-M", *released) == ("seen", *plain)
    for words in (["--method", "SSUL-M"], ["--unknown"]):
        assert chosen(*words, *released) == ("all", "in_turn", "current", "overwrite", "factor")
    typed = ("--eval_images", "seen", "--memory_labels", "stored")
    assert chosen("--method", "SSUL-M", *released, *typed)[:3] == ("seen", "in_turn", "stored")


def test_pseudo_labels_weigh_nothing_in_the_released_program_of_sats() -> None:
    def chosen(*words: str) -> tuple[bool, float | None]:
        opts = parse_options([*words])
        return opts.pseudo_unweighted, opts.pseudo_infinite

    released = ("--fidelity", "released")
    assert chosen("--method", "SATS") == chosen("--method", "PLOP", *released) == (False, None)
    assert chosen("--method", "SATS-M", *released) == (True, 0.005)
    assert chosen("--distill_object", "sats-selfattn", *released) == (True, 0.005)


def test_a_record_of_an_earlier_version_has_what_its_options_imply() -> None:
    for words in (["--method", "MIB"], ["--method", "SSUL-M", "--fidelity", "released"]):
        recorded = parse_options(words).as_json()
        younger = ("classifier", "eval_images", "memory_choice", "memory_labels", "memory_batches")
        older = {name: value for name, value in recorded.items() if name not in (*younger, "warmup_form")}
        assert with_implied(older) == with_implied(recorded) == recorded
    first = {"method": "SSUL", "unknown": True, "fidelity": "released"}  # before --head and --keep
    found = with_implied(first)
    assert (found["classifier"], found["head"], found["eval_images"]) == ("unknown", "mib", "all")
