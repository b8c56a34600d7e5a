"""The command line: options in titled groups, presets, and every check on options with its message.

Options keep the names and defaults of the four released programs. What the user typed wins over the
preset of ``--method``, and the log says so.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import CLASSIFIERS, METHODS, REGISTRY, Method, classifier_of, load_method_file, preset
from methods.checks import defaults_of, fault, options_of, preset_fault, shown
from methods.presets import preset_note
from tasks import Task, get_task, read_class_order
from utils.errors import UserError
from utils.files import name_fault, printable
from utils.option_roles import Declaration, OptionGroup, OptionParser
from utils.option_types import Number, Parser, count, path_option, positive_int, seed, share, whole

VERSION = "0.1.0"  # as in pyproject.toml
# Smaller ones change no weight in single precision, larger ones leave none finite.
LEARNING_RATE = Number(float, 1e-12, 1000)
BACKBONES = ("resnet50", "resnet101", "mobilenet_v2")
NORMS = ("std", "sync", "abn", "iabn", "iabn_sync", "iabn_sync_test")


class Options(argparse.Namespace):
    """The options of a run: one attribute per option, checked and with the preset applied.

    Beside the options themselves: ``task_`` (the class order), ``steps`` (steps to run), ``lrs`` (one
    learning rate per step), ``protocol``, ``notes`` (what the log should say about the options),
    ``typed`` (names of the options that the user typed).
    """

    task_: Task
    steps: list[int]
    lrs: list[float]
    protocol: str
    notes: list[str]
    typed: set[str]

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for the log and for checkpoints."""
        derived = {"task_", "notes", "typed"}
        return {k: _plain(v) for k, v in sorted(vars(self).items()) if k not in derived}

    def as_json(self) -> dict[str, Any]:
        """The options in JSON types, as a run keeps them in its checkpoints and in ``run.json``."""
        return dict(json.loads(json.dumps(self.as_dict(), default=str)))

    def summary(self) -> str:
        """One line: what was typed, and what a preset or another option set."""
        defaults = vars(_parser(tuple(REGISTRY)).parse_args([], namespace=argparse.Namespace()))
        shown = [
            f"{name}={_plain(value)}" + ("" if name in self.typed else " (preset)")
            for name, value in sorted(vars(self).items())
            if name in defaults and (name in self.typed or value != defaults[name])
        ]
        return "options: " + ", ".join(shown)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _HelpFormatter(argparse.HelpFormatter):
    """Help as a user reads it: short names for values, and every default that says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Number):
            return action.type.metavar
        return "PATH" if action.type is path_option else "NAME"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.nargs == 0 or default in (None, "", argparse.SUPPRESS) or "default" in text:
            return text
        values = default if isinstance(default, list) else [default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{text} (default: {shown})"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _method(word: str) -> str:
    """Method names are matched without case."""
    by_lower = {name.lower(): name for name in METHODS}
    if word.lower() not in by_lower:
        hint = _nearest(word.lower(), list(by_lower)) or f"; known methods: {', '.join(METHODS)}"
        raise argparse.ArgumentTypeError(
            f"unknown method '{word}': no preset of that name; a file of your own is given with "
            f"--method_file{hint}"
        )
    return by_lower[word.lower()]


def _backbone(word: str) -> str:
    """A backbone of this program, or any name of timm's: timm is imported only for one of its own."""
    if word in BACKBONES or word.removeprefix("timm/") not in (word, ""):
        return word
    hint = "; the papers' Swin-B is timm/swin_base_patch4_window12_384" if "swin" in word else ""
    raise argparse.ArgumentTypeError(
        f"'{word}' is none of {', '.join(BACKBONES)} and not timm/NAME, a network of timm{hint}"
    )


def _classifier(word: str) -> str:
    """A kind of classifier that there is."""
    if word not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise argparse.ArgumentTypeError(f"unknown, choose one of {known}; others come with --method_file")
    return word


# Options of published command lines without a meaning here, and what to do instead.
_ELSEWHERE = {
    "--results_dir": "results are in the run's folder, below --logdir; drop it",
    "--num_classes": "the task sets the number of classes; drop it",
}


def build_parser() -> OptionParser:
    """The parser with all groups: the general ones, then each method's own options."""
    parser = OptionParser(
        prog="python run.py",
        usage="python run.py [options], or torchrun --nproc_per_node=N run.py [options]",
        description="Continual semantic segmentation: learn classes step by step.",
        epilog="What is typed wins over the preset of --method. docs/recipes.md has whole commands, "
        "docs/methods.md the equations behind the options.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    _add_launch(parser.group("launch", role="incidental"))
    _add_task(parser.group("task and data", role="data"))
    _add_model(parser.group("model", role="network"))
    _add_training(parser.group("training", role="learning"))
    _add_evaluation(parser.group("evaluation and prediction", role="incidental"))
    _add_logging(parser.group("log and checkpoints", role="incidental"))
    _add_method(parser.group("method", role="learning"))
    for kind in REGISTRY:
        summary = (kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip(".")
        kind.add_options(parser.group(summary, role="learning"))
    return parser


# Values that follow from options and stand in a run's records beside them.
_DERIVED = (
    Declaration("steps", "--step", "incidental", derived=True),
    Declaration("lrs", "--lr", "incidental", derived=True),
    Declaration("protocol", "protocol", "learning", derived=True),
)


@functools.cache
def _parser(kinds: tuple[type[Method], ...]) -> OptionParser:
    """With the options of these methods: those of the registry, which ``--method_file`` extends."""
    return build_parser()


@functools.cache
def _declared(kinds: tuple[type[Method], ...]) -> Mapping[str, Declaration]:
    """By name, with the options of these methods."""
    return {value.name: value for value in _DERIVED} | _parser(kinds).declared


def declared(name: str) -> Declaration:
    """What an option means for a run.

    Args:
        name: of an attribute of ``Options``. One that is unknown here stands in the records of a run with a
            ``--method_file`` or of another version; it counts as one that decides what is learnt.
    """
    return _declared(tuple(REGISTRY)).get(name) or Declaration(name, f"--{name}", "learning")


def declarations() -> list[Declaration]:
    """What every option means."""
    return [each for each in _declared(tuple(REGISTRY)).values() if not each.derived]


# One option in two or three lines: what it is, then its help.
# fmt: off

def _add_launch(group: OptionGroup) -> None:
    group.choice("--where_to_sim", ("GPU_server", "GPU_windows", "CPU", "CPU_windows"), None,
        help="GPU_server: NCCL; CPU: Gloo; *_windows: one process, no group; default: the machine "
        "decides")
    group.value("--local_rank --local-rank", count, 0,
        help="set by torch.distributed.launch")
    group.value("--random_seed", seed, 42, role="data", of_method=False, set_by_experiment=True,
        help="seed of everything drawn")
    group.value("--num_workers", whole(0, 1024), 1,
        help="loader processes per process")
    group.flag("--deterministic", role="learning",
        help="the same weights, bit for bit, for the same seed and number of processes (slower on "
        "CUDA)")
    # At most 1,000,000 s: more milliseconds than poll() counts would wrap round.
    group.value("--timeout", Number(float, 1, 1_000_000), 1800.0, metavar="SECONDS",
        help="how long a process waits for the others before that is an error")


def _add_method(group: OptionGroup) -> None:
    group.value("--method", _method, None, metavar="NAME", compared_by_meaning=True, precedes_presets=True,
        help=f"preset: {', '.join(METHODS)}")
    group.value("--method_file", path_option, None, metavar="FILE.py", role="incidental",
        precedes_presets=True,
        help="a custom method: a Python file, which is run (docs/methods.md)")
    group.choice("--fidelity", ("paper", "released"), "paper", role="network", with_results=True,
        precedes_presets=True,
        help="follow the papers, or reproduce what the released code computes (docs/fidelity.md)")


def _add_task(group: OptionGroup) -> None:
    group.value("--data_root", path_option, Path("data"), compared_by_meaning=True, precedes_presets=True,
        help="folder of the data set")
    group.choice("--dataset", ("voc", "ade", "folder", "shapes"), "voc", precedes_presets=True,
        help="Pascal VOC 2012, ADE20K, own images, or generated ones")
    group.value("--task", str, "19-1", chooses_task=True,
        help="steps: a published name, e.g. 19-1, 15-5, 15-1 (folders name it 15-5s), 100-50, or "
        "A-B: A classes, then B per step")
    group.value("--task_num", positive_int, None, compared_by_meaning=True, restored=False,
        help="number of steps of the task; checked where it is given (DFT*)")
    group.value("--task_file", path_option, None, chooses_task=True,
        help="YAML or JSON file with own tasks")
    group.value("--class_order", path_option, None, metavar="FILE", chooses_task=True,
        help="file with the classes in the order of the task: one name or id per line")
    group.value("--class_order_seed", seed, None, chooses_task=True,
        help="shuffle the classes of the task by this seed")
    group.value("--step", str, ["0"], nargs="+", metavar="N", role="incidental", set_by_experiment=True,
        help="steps to run, or 'all'")
    group.flag("--no_mask", role="learning",
        help="sequential protocol: old labels visible")
    group.flag("--overlap --overlapped", role="learning",
        help="overlapped protocol (default: disjoint)")
    group.flag("--partitioned", role="learning",
        help="partitioned protocol: every image in the step of one of its classes, drawn at random (CISS)")
    group.value("--partition_seed", seed, 0, role="learning",
        help="seed of the partitioned protocol; 0: the published lists of VOC")
    group.choice("--data_masking", ("current", "current+old", "all", "new"), "current", role="learning",
        help="classes that training labels show; the others become background")
    group.choice("--void_label", ("ignore", "background"), "background", role="learning",
        help="what void is in training: ignored (PLOP, SATS, SSUL) or background (MiB, SDR)")
    group.value("--crop_size", whole(32, 16384), 512,
        help="side of the crops, in pixels")
    group.choice("--augmentation", ("resized_crop", "scale_crop"), "resized_crop", role="learning",
        help="of training images, beside flips; resized_crop: RandomResizedCrop of 0.5 to 2 times the "
        "area; scale_crop: resized by 0.5 to 2, padded, and a random crop (SSUL)")
    group.add_argument("--whole_val", "--crop_val", dest="crop_val", action="store_false", role="evaluation",
        restored=True,
        help="evaluate on whole images, one by one")
    group.flag("--cross_val", role="learning",
        help="validate on 20 %% of the training images")
    group.flag("--val_on_trainset", role="evaluation", restored=True,
        help="final evaluation on the training images")
    group.flag("--test_on_val",
        help="evaluate on a fifth of the training images, kept back in every step (PLOP)")
    group.value("--memory", count, 0, metavar="N", role="learning",
        help="exemplars of earlier steps' images, half of each batch")
    group.choice("--memory_choice", ("balanced", "in_turn", "predicted"), "balanced", role="learning",
        help="how exemplars are chosen; balanced: the class that has fewest is next; in_turn: each "
        "class in turn takes any image that shows it (SSUL); predicted: the same, and the previous "
        "step's network tells which older classes an image shows (DKD, STAR)")
    group.choice("--memory_labels", ("stored", "current", "new"), "stored", role="learning",
        help="classes that exemplars' labels show: those known when the image was stored, or also "
        "those of the current step (SSUL), or only these (new; DKD, STAR)")
    group.choice("--memory_batches", ("halves", "overwrite", "joined"), "halves", role="learning",
        help="halves: a batch is half exemplars, an epoch shows each image once; overwrite: exemplars "
        "take the place of half of each batch's images (SSUL); joined: an epoch shows each image and "
        "each exemplar once (DKD, STAR)")
    group.value("--splits_dir", path_option, None, compared_by_meaning=True, restored=False,
        help="folder with own image lists train-<step>.npy")
    group.value("--skip_corrupt", count, 0, metavar="N", role="incidental", restored=True,
        help="skip up to N unreadable images, not masks, instead of stopping; they are listed")
    group.flag("--check_data", role="incidental", set_by_experiment=True,
        help="check the data set and its lists, then end")


def _add_model(group: OptionGroup) -> None:
    group.choice("--model", ("deeplab", "mlp", *(f"segformer_b{i}" for i in range(6))), "deeplab",
        metavar="NAME",
        help="deeplab, mlp (SegFormer's all-MLP head over the backbone's stages) or segformer_b0 .. "
        "segformer_b5")
    group.value("--backbone", _backbone, "resnet101", metavar="NAME",
        help=f"backbone of deeplab and mlp: {', '.join(BACKBONES)}, or timm/NAME of any network of timm "
        "with feature maps")
    group.value("--output_stride", int, 16, choices=(8, 16),
        help="pixels per position of the backbone's last feature map, where timm/NAME can be dilated")
    group.choice("--norm_act", NORMS, "std",
        help="normalisation and activation; std: BatchNorm and ReLU (SDR); iabn_sync: MiB, PLOP; with "
        "timm/NAME of the head alone, but sync of all batch norms")
    group.value("--drop_path", Number(float, 0, 1, below=True), None, role="learning",
        help="largest rate of stochastic depth of SegFormer and timm/NAME (default: SegFormer 0.1, timm's)")
    group.add_argument("--mib_network", "--net_pytorch", dest="net_pytorch", action="store_false",
        compared_by_meaning=True, restored=False,
        help="the network of MiB and PLOP: norm_act becomes iabn_sync unless given")
    group.flag("--no_pretrained --no-pretrained", role="learning",
        help="start from random weights")
    group.value("--pretrained_path", path_option, None, role="learning",
        help="file with the backbone's pretrained weights")
    group.value("--pooling", whole(0, 16384), 32,
        help="window of the head's pooling at evaluation, 0: global")
    group.choice("--head", ("mib", "aspp", "dkd"), "mib",
        help="head of deeplab; mib: one norm over all branches (MiB, PLOP, SDR); aspp: five branches "
        "with norms of their own and dropout (SSUL, torchvision); dkd: aspp and a 3x3 convolution (DKD, "
        "STAR)")
    group.flag("--two_branches",
        help="deeplab's 3x3 convolutions and the maps of --head mib in two branches, merged into one before "
        "every step (RCIL)")
    group.choice("--decoder", ("sats", "segformer"), "sats",
        help="head of the SegFormer models")
    group.value("--classifier", _classifier, "linear",
        help=f"kind of classifier: {', '.join(CLASSIFIERS)} (default: the method's, or linear)")
    group.value("--feat_dim", Number(float, 1, 1e6), 2048, compared_by_meaning=True, restored=False,
        help="channels of the backbone's last feature map; checked where it is given")
    group.flag("--fix_bn", role="learning",
        help="freeze the norm layers (released: their weights)")
    group.flag("--freeze", role="learning",
        help="freeze the backbone")
    group.flag("--fix_pre_cls", role="learning",
        help="freeze the classifiers of earlier steps, the background's too (EWF, NeST)")
    group.flag("--init_balanced", role="learning",
        help="new classifiers start from the background's (MiB)")


def _add_training(group: OptionGroup) -> None:
    group.value("--epochs", positive_int, 30,
        help="epochs of every step")
    group.value("--batch_size", positive_int, 4, compared_by_meaning=True,
        help="images per process")
    group.value("--lr", LEARNING_RATE, [0.007], nargs="+", metavar="LR", compared_by_meaning=True,
        help="one for all steps, or one per step")
    group.value("--lr_old", Number(float, 0, 1000), None,
        help="factor on the learning rate of the old classifiers")
    group.value("--momentum", Number(float, 0, 1, below=True), 0.9,
        help="of SGD; above 0: Nesterov's")
    group.value("--weight_decay", share, 1e-4,
        help="of SGD, on all weights")
    group.choice("--lr_policy", ("poly", "step"), "poly",
        help="how the rate falls")
    group.value("--lr_power", Number(float, 0, 100), 0.9,
        help="exponent of the poly policy")
    group.value("--min_lr", Number(float, 0, 1000), 0.0,
        help="smallest rate of the poly policy")
    group.value("--lr_decay_step", positive_int, 5000,
        help="iterations (step policy)")
    group.value("--lr_decay_factor", Number(float, 0, 1, above=True), 0.1,
        help="factor (step policy)")
    group.value("--warmup", Number(float, 0, 1, below=True), 0.0,
        help="share of the iterations that warm up")
    group.choice("--warmup_form", ("before", "factor", "exact_factor"), "before",
        help="before: the policy has the iterations after the warm-up; factor: the warm-up multiplies "
        "poly's curve over all iterations, for a whole number of them (SSUL); exact_factor: the same, "
        "not rounded (DKD, STAR)")
    group.choice("--opt_level", ("O0", "O1", "O2", "O3"), "O0",
        help="O0: fp32 (on CUDA TF32 in convolutions); O1: autocast of the network; O2: of the losses "
        "too; O3: weights in half precision; on processors without bfloat16 all are O0")
    group.choice("--half", ("auto", "float16"), "auto",
        help="half precision of O1 and O2; auto: bfloat16 where the device has it, else float16 with loss "
        "scaling on CUDA; float16: on every GPU, as the published runs")
    group.value("--accumulate", positive_int, 1, metavar="N",
        help="batches per optimiser step; its gradient is the mean of theirs")
    group.flag("--grad_checkpointing", role="incidental",
        help="less memory, more time: activations inside the backbone's stages are computed twice")
    group.flag("--compile", role="incidental",
        help="run the networks through torch.compile in training")
    group.choice("--keep", ("last", "best"), "last",
        help="a step's result: the last epoch's weights, or those of the epoch with the best "
        "validation mIoU")
    group.flag("--debug", role="incidental",
        help="log more")


def _add_evaluation(group: OptionGroup) -> None:
    group.flag("--test", set_by_experiment=True,
        help="evaluate a checkpoint, do not train")
    group.value("--ckpt", path_option, None, set_by_experiment=True,
        help="checkpoint to test, or to continue training from")
    group.choice("--unseen_label", ("ignore", "background"), "ignore", role="evaluation", restored=True,
        with_results=False,
        help="what classes of later steps count as: ignored (MiB, SDR, released SSUL) or background (PLOP, "
        "SATS)")
    group.choice("--eval_images", ("all", "seen"), "all", role="evaluation",
        help="images of the final evaluation: all, or those with a class seen so far (--fidelity "
        "released)")
    group.value("--test_scales", Number(float, 0.01, 16), [1.0], nargs="+", role="evaluation",
        help="scales of each image, fused")
    group.flag("--test_flip", role="evaluation",
        help="also predict the mirrored image")
    group.choice("--fusion-mode", ("mean", "voting", "max"), "mean", dest="fusion_mode", role="evaluation",
        help="how the predictions of several scales and flips are fused")
    group.value("--predict", path_option, None, metavar="PATH",
        help="predict an image or a folder of images with --ckpt, then end; writes to --out")
    group.value("--out", path_option, None, metavar="DIR",
        help="folder for --predict's results")
    group.flag("--raw",
        help="--predict writes class ids as grey levels instead of palette images")


def _add_logging(group: OptionGroup) -> None:
    group.value("--logdir", path_option, Path("logs"), set_by_experiment=True,
        help="folder of all runs")
    group.value("--name", str, "Experiment", set_by_experiment=True,
        help="name of the run")
    group.value("--date", str, "",
        help="prefix of the CSV file of results")
    group.value("--checkpoint", path_option, None, set_by_experiment=True,
        help="folder of the checkpoints (default: the run's folder)")
    group.value("--step_ckpt", path_option, None, set_by_experiment=True,
        help="checkpoint of the previous step, if it is another run's")
    group.value("--sample_num", count, 0,
        help="validation images to show")
    group.add_argument("--no_tensorboard", "--visualize", dest="visualize", action="store_false",
        help="write no TensorBoard file")
    group.value("--wandb", str, None, metavar="PROJECT",
        help="also log to this project of Weights & Biases (package wandb)")
    group.value("--print_interval", positive_int, 10,
        help="batches between two log lines")
    group.value("--val_interval", positive_int, 1, role="evaluation", of_method=False, with_results=False,
        help="epochs between two validations")
    group.value("--ckpt_interval", positive_int, 1,
        help="epochs between two checkpoints")
    group.value("--ckpt_minutes", Number(float, 0, 1e6), 15.0, metavar="M",
        help="also save in the middle of an epoch, when M minutes have passed since the last time; 0: "
        "never")
    group.choice("--resume", ("auto", "fresh"), "auto",
        help="auto: unfinished steps in the run's folder are resumed, finished ones are kept; fresh: "
        "they start over")
    group.add_argument("--fresh", dest="resume", action="store_const", const="fresh",
        help="the same as --resume fresh")

# fmt: on


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Parse and check the command line.

    Raises:
        UserError: an unknown or wrong option; the message names the nearest ones.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser_for(argv)
    opts, unknown = parser.parse_known_args(argv, namespace=Options())
    if unknown:
        word = unknown[0].split("=")[0]
        if word in _ELSEWHERE:
            raise UserError(f"{word} does not exist here: {_ELSEWHERE[word]}")
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"unknown option {word}{_nearest(word, known)} (see python run.py --help)")
    opts.typed = _typed(argv)
    opts.notes = []
    opts.task_ = _task(opts)
    opts.task = opts.task_.name
    _apply_preset(opts, parser)
    _derive(opts)
    _check(opts)
    return opts


def _parser_for(argv: Sequence[str]) -> OptionParser:
    """The parser with the options of ``--method_file``, where the command line names one."""
    first = Parser(prog="python run.py", add_help=False, allow_abbrev=False)
    first.add_argument("--method_file", type=path_option, default=None)
    path = first.parse_known_args(argv)[0].method_file
    if path is None:
        return _parser(tuple(REGISTRY))
    taken = {action.dest for action in build_parser()._actions} | set(Options.__annotations__)
    kinds, presets = load_method_file(path)
    try:
        parser = build_parser()
    except argparse.ArgumentError as error:
        raise UserError(f"--method_file {path}: {error}; rename the option") from error
    except UserError as error:
        raise UserError(f"--method_file {path}: {error}") from error
    for kind in kinds:
        for action in options_of(kind):
            if action.dest in taken:
                name = action.option_strings[0]
                what = f"{name} sets opts.{action.dest}, which has a meaning already; rename the option"
                raise fault(kind, "add_options", what)
    for preset_name, options in presets.items():
        for name, value in options.items():
            if name != "extends" and (reason := _preset_fault(parser, name, value)):
                raise UserError(
                    f"--method_file {path}: PRESETS['{preset_name}']: --{name} {value!r}: {reason}"
                )
    return parser


def _preset_fault(parser: OptionParser, name: str, value: Any) -> str | None:
    """What is wrong with a preset's value for an option; None: it is valid."""
    if name in parser.declared and parser.declared[name].precedes_presets:
        return "is read before presets are applied; type it on the command line instead"
    return preset_fault(next((action for action in parser._actions if action.dest == name), None), value)


def _task(opts: Options) -> Task:
    """The class order; without ``--task``, the task file's only one, or all classes for ``--check_data``."""
    name = opts.task
    if "task" not in opts.typed:
        if opts.task_file is not None:
            name = None
        elif opts.check_data or opts.predict is not None:
            name = "offline"
    class_names = _own_classes(opts)
    class_order = None
    if opts.class_order is not None:
        from dataset import class_names as names_of  # imports numpy, which --help need not wait for

        class_order = read_class_order(opts.class_order, names_of(opts.dataset, opts.data_root))
    return get_task(
        opts.dataset,
        name,
        task_file=opts.task_file,
        class_order=class_order,
        class_order_seed=opts.class_order_seed,
        num_classes=None if class_names is None else len(class_names),
    )


def _own_classes(opts: Options) -> tuple[str, ...] | None:
    """Class names of a data set of the user's own, the background's first."""
    if opts.dataset != "folder":
        return None
    from dataset.folder import read_class_names  # imports numpy, too

    return read_class_names(opts.data_root / "classes.txt")


def _typed(argv: Sequence[str]) -> set[str]:
    """Names of the options that the user typed."""
    return set(vars(_parser_without_defaults(tuple(REGISTRY)).parse_known_args(argv)[0]))


@functools.cache
def _parser_without_defaults(kinds: tuple[type[Method], ...]) -> OptionParser:
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _apply_preset(opts: Options, parser: OptionParser) -> None:
    """Set what was not typed: what ``--method`` stands for, then what the other options imply."""
    named: dict[str, Any] = {}
    if opts.method is not None:
        named = preset(opts.method, dataset=opts.dataset, task=opts.task, fidelity=opts.fidelity)
        if note := preset_note(opts.method, opts.fidelity):
            opts.notes.append(note)
    _set_untyped(opts, named)
    _set_untyped(opts, {**_implied(opts, parser), **named}, tell=True)


def _set_untyped(opts: Options, values: Mapping[str, Any], *, tell: bool = False) -> None:
    for name, value in values.items():
        typed = getattr(opts, name)
        if name not in opts.typed:
            setattr(opts, name, value)
        elif tell and typed != value:
            source = f"--method {opts.method}" if opts.method else "the other options"
            opts.notes.append(f"--{name} {typed} was typed and wins over {value} of {source}")


def _implied(opts: argparse.Namespace, parser: OptionParser) -> dict[str, Any]:
    """What options become by others, where they are neither typed nor set by the preset."""
    implied: dict[str, Any] = {}
    if opts.fidelity == "released":
        implied["eval_images"] = "seen"
        if opts.no_mask:
            # SDR's data sets, the only ones with published sequential numbers.
            implied["void_label"] = "ignore"
    for kind in REGISTRY:
        chosen: object = kind.implied_options(opts)
        if not isinstance(chosen, dict):
            raise fault(
                kind, "implied_options", f"returned {shown(chosen)}; return a dict of options, {{}} for none"
            )
        for name, value in chosen.items():
            if reason := _preset_fault(parser, name, value):
                raise fault(kind, "implied_options", f"--{name} {value!r}: {reason}")
        implied |= chosen
    return implied


def option_defaults() -> dict[str, Any]:
    """Every option's default, in JSON types as runs keep them."""
    return dict(_defaults(tuple(REGISTRY)))


@functools.cache
def _defaults(kinds: tuple[type[Method], ...]) -> dict[str, Any]:
    defaults = vars(_parser(kinds).parse_args([], namespace=argparse.Namespace()))
    return dict(json.loads(json.dumps(defaults, default=str)))


def with_implied(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded options with those that its version lacked: as the others imply, else the default.

    What released programs do around their options came with ``--keep``; versions before it did none of it.
    """
    parser, defaults = _parser(tuple(REGISTRY)), option_defaults()
    opts = argparse.Namespace(**{**defaults, **recorded}, typed=set())
    implied = _implied(opts, parser) if "keep" in recorded else {}
    implied["classifier"] = classifier_of(opts) or opts.classifier
    return {**defaults, **implied, **recorded}


def _derive(opts: Options) -> None:
    protocols = {"sequential": opts.no_mask, "overlapped": opts.overlap, "partitioned": opts.partitioned}
    opts.protocol = next((name for name, chosen in protocols.items() if chosen), "disjoint")
    if not opts.net_pytorch and "norm_act" not in opts.typed:
        opts.norm_act = "iabn_sync"
    needed = classifier_of(opts)
    if needed is not None and needed != opts.classifier:
        if "classifier" in opts.typed or opts.classifier != "linear":
            raise UserError(
                f"--classifier {opts.classifier}: the method needs --classifier {needed}; drop --classifier, "
                "or choose another method"
            )
        opts.classifier = needed
    if opts.keep == "best" and opts.val_interval >= opts.epochs > 1:
        opts.notes.append(
            f"--keep best has nothing to choose from: --val_interval {opts.val_interval} validates only the "
            f"last of {opts.epochs} epochs"
        )
    opts.steps = _steps(opts)
    if len(opts.lr) not in (1, len(opts.steps)):
        raise UserError(
            f"--lr has {len(opts.lr)} values for {len(opts.steps)} steps; give one for all or one per step"
        )
    opts.lrs = opts.lr * len(opts.steps) if len(opts.lr) == 1 else list(opts.lr)


def _steps(opts: Options) -> list[int]:
    number = opts.task_.num_steps
    if opts.step == ["all"]:
        return list(range(number))
    try:
        steps = [int(word) for word in opts.step]
    except ValueError:
        raise UserError(f"--step {' '.join(opts.step)}: give step numbers, or 'all'") from None
    for step in steps:
        if not 0 <= step < number:
            raise UserError(
                f"--step {step}: task {opts.task} of {opts.dataset} has the steps 0 to {number - 1}"
            )
    if steps != sorted(set(steps)):
        raise UserError(f"--step {' '.join(opts.step)}: give each step once, in ascending order")
    return steps


def _check(opts: Options) -> None:
    """Options that contradict each other or the run."""
    flags = ("no_mask", "overlap", "partitioned")
    given = [f"--{flag}" for flag in flags if getattr(opts, flag)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one")
    if "partition_seed" in opts.typed and not opts.partitioned:
        raise UserError("--partition_seed has an effect only with --partitioned; add that or drop it")
    if opts.task_num not in (None, opts.task_.num_steps):
        raise UserError(
            f"--task_num {opts.task_num}: task {opts.task} of {opts.dataset} has {opts.task_.num_steps} "
            "steps; drop it"
        )
    _check_prediction(opts)
    if opts.step_ckpt is not None and opts.steps[0] == 0:
        raise UserError("--step_ckpt is the checkpoint of the previous step, but step 0 has none; drop it")
    if opts.ckpt is not None and len(opts.steps) > 1:
        raise UserError("--ckpt names one checkpoint; give a single --step with it")
    if opts.wandb is not None and (opts.check_data or opts.predict is not None):
        raise UserError("--wandb: --check_data and --predict log nothing; drop it")
    # A folder of the name, which wandb makes, is found as a package without origin.
    if opts.wandb is not None and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
        raise UserError("--wandb needs the package wandb; install it (pip install wandb), or drop the option")
    if opts.pretrained_path is not None and opts.no_pretrained:
        raise UserError("--pretrained_path and --no_pretrained exclude each other; give one")
    _check_unused(opts)
    if _trains(opts):
        _check_classifier(opts)
    _check_network(opts)
    fixed = opts.fix_bn and opts.fidelity == "paper"  # released: the statistics move all the same
    own_statistics = opts.model == "deeplab" and opts.norm_act in ("std", "abn", "iabn") and not fixed
    if opts.batch_size == 1 and _trains(opts) and own_statistics:
        raise UserError(
            "--batch_size 1: the head normalises one pooled value per image over the batch, which needs "
            "--batch_size 2 or more, or --fix_bn with --fidelity paper"
        )
    if opts.compile and opts.grad_checkpointing:
        raise UserError(
            "--compile and --grad_checkpointing exclude each other (torch.compile takes no checkpoint that "
            "leaves running statistics alone); give one"
        )
    if opts.opt_level == "O3" and opts.norm_act in ("iabn", "iabn_sync"):
        raise UserError(
            f"--opt_level O3 and --norm_act {opts.norm_act} exclude each other: inplace-abn has no bfloat16; "
            "give --opt_level O1, or --norm_act abn"
        )
    for name in ("name", "date"):
        word = getattr(opts, name)
        if (fault := name_fault(word)) and (word or name == "name"):
            raise UserError(f"--{name} {printable(word)} {fault}")
    # The longest of the files' names has all three; each may be short enough, and the whole too long.
    if len((together := opts.date + opts.task + opts.name).encode()) > 180:
        raise UserError(
            f"--date, --task and --name stand together in file names, with {len(together.encode())} bytes; "
            "use at most 180"
        )
    if _trains(opts):
        _note_unread(opts)


def _trains(opts: Options) -> bool:
    return not (opts.test or opts.check_data or opts.predict is not None)


def _check_network(opts: Options) -> None:
    """A network that cannot be built, or lacks what the methods read."""
    from modules import NetworkSpec, check_buildable, network_class, pretrained_repository

    # A released program's checkpoint shows its model, which is not known yet.
    brought = "model" not in opts.typed and (opts.ckpt is not None or opts.step_ckpt is not None)
    if _trains(opts) and not brought:
        for method in (kind.from_options(opts) for kind in REGISTRY):
            if not isinstance(method, Method) or isinstance(method.needs, str):
                continue  # reported with its file when the method is made
            if max(opts.steps) > 0 or not method.needs_teacher:
                network_class(opts.model).check_needs(frozenset(method.needs) - {"logits_small"})
    if opts.model in ("deeplab", "mlp") and opts.backbone.startswith("timm/"):
        import methods.classifiers  # noqa: F401  # registers its kinds, one of which may be the network's

        check_buildable(NetworkSpec.of(opts))
        if _trains(opts) and 0 in opts.steps and not opts.no_pretrained and opts.pretrained_path is None:
            pretrained_repository(opts.backbone)
    elif opts.drop_path is not None and opts.model in ("deeplab", "mlp"):
        raise UserError(f"--drop_path: --backbone {opts.backbone} has no stochastic depth; drop it")


def _check_unused(opts: Options) -> None:
    """Typed options that another option leaves without effect."""
    for name in ("memory_choice", "memory_labels", "memory_batches"):
        if name in opts.typed and not opts.memory:
            raise UserError(f"--{name} goes with --memory; give it, or drop this")
    if "lr_old" in opts.typed and opts.fix_pre_cls:
        raise UserError(
            f"--lr_old {opts.lr_old:g} has no effect: --fix_pre_cls freezes the old classifiers; drop one"
        )
    if opts.half == "float16" and opts.opt_level not in ("O1", "O2"):
        raise UserError(
            f"--half float16 is of --opt_level O1 and O2, not {opts.opt_level}; give one of these, or drop it"
        )
    for name, policy in (("lr_power", "poly"), ("lr_decay_step", "step"), ("lr_decay_factor", "step")):
        if name in opts.typed and opts.lr_policy != policy:
            raise UserError(f"--{name} is of --lr_policy {policy}, not {opts.lr_policy}; drop one of the two")
    if "warmup_form" in opts.typed and (opts.warmup == 0 or opts.lr_policy != "poly"):
        raise UserError("--warmup_form goes with --warmup and --lr_policy poly; give them, or drop this")
    for name in ("backbone", "output_stride"):
        if name in opts.typed and opts.model.startswith("segformer_"):  # as an experiment's common options
            opts.notes.append(f"--{name} has no effect on --model {opts.model}")
    if "head" in opts.typed and opts.model != "deeplab":
        other = ", which has --decoder" if opts.model.startswith("segformer_") else ""
        raise UserError(f"--head is of --model deeplab, not {opts.model}{other}; drop it")
    if "decoder" in opts.typed and not opts.model.startswith("segformer_"):
        raise UserError(f"--decoder is of --model segformer_b0 .. segformer_b5, not {opts.model}; drop it")
    if opts.model == "mlp" and "pooling" in opts.typed and opts.pooling:
        raise UserError(f"--pooling {opts.pooling}: is of --model deeplab, not mlp; drop it")
    own_norms = opts.model == "mlp" and opts.backbone.startswith("timm/")
    if own_norms and "norm_act" in opts.typed and opts.norm_act not in ("std", "sync"):
        raise UserError(
            f"--norm_act {opts.norm_act}: --model mlp with timm/NAME has its own norms; give std or sync"
        )
    if "pooling" in opts.typed and opts.pooling and opts.head != "mib":
        raise UserError(
            f"--pooling {opts.pooling}: --head {opts.head} pools over the whole map; drop one of them"
        )
    if "min_lr" in opts.typed and opts.min_lr and opts.lr_policy != "poly":
        raise UserError(f"--min_lr is the poly policy's, not --lr_policy {opts.lr_policy}'s; drop one")
    if "min_lr" in opts.typed and opts.min_lr > min(opts.lrs):
        raise UserError(f"--min_lr {opts.min_lr:g} is above --lr {min(opts.lrs):g}; give less")


def _recording(opts: Options, read: set[str]) -> Options:
    """A copy that adds to ``read`` the names of the options that are read."""

    class Recording(Options):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    copy = Recording()
    vars(copy).update(vars(opts))
    return copy


def _note_unread(opts: Options) -> None:
    """Note typed options of methods that are off, unless a method that is on reads them.

    They are not refused, because published command lines have such options.
    """
    read, reads = set[str](), set[str]()
    unread: dict[str, str] = {}
    recording = _recording(opts, reads)
    for kind in REGISTRY:
        reads.clear()
        if kind.from_options(recording) is None:
            defaults = defaults_of(kind).items()
            unread |= {name: kind.__name__ for name, default in defaults if getattr(opts, name) != default}
        else:
            read |= reads
    for name in sorted(opts.typed & unread.keys() - read):
        opts.notes.append(f"--{name} has no effect: its method, {unread[name]}, is off")


def _check_classifier(opts: Options) -> None:
    """Options that the kind of classifier does not know."""
    from methods.classifiers import Classifier, classifier_kind  # needs torch

    kind = classifier_kind(opts.classifier)
    if kind.needs_its_method and classifier_of(opts) is None:
        raise UserError(
            f"--classifier {opts.classifier} is trained only by a method that names it; drop it, or choose "
            "that method"
        )
    if opts.init_balanced and not kind.starts_balanced:
        if "init_balanced" in opts.typed:
            raise UserError(f"--classifier {kind.name} does not support --init_balanced; drop it")
        opts.notes.append(f"--classifier {kind.name} starts in its own way: --init_balanced has no effect")
    unsure = kind.confident_labels is Classifier.confident_labels
    if opts.memory and opts.memory_choice == "predicted" and unsure:
        raise UserError(
            f"--memory_choice predicted needs a classifier with a sigmoid per class, not --classifier "
            f"{opts.classifier}; choose another --memory_choice"
        )


def _check_prediction(opts: Options) -> None:
    """Options of ``--predict``."""
    if opts.predict is None:
        if opts.out is not None or opts.raw:
            raise UserError(f"{'--raw' if opts.raw else '--out'} goes with --predict; give it, or drop this")
        return
    for name in ("test", "check_data"):
        if getattr(opts, name):
            raise UserError(f"--predict and --{name} exclude each other; give one")
    if opts.step_ckpt is not None:
        raise UserError("--predict reads --ckpt only; drop --step_ckpt")
    for name in ("ckpt", "out"):
        if getattr(opts, name) is None:
            what = {"ckpt": "FILE, the checkpoint", "out": "DIR, the folder for the results"}[name]
            raise UserError(f"--predict needs --{name} {what}")
    precision = ("opt_level", "half")  # also of a prediction
    learning = (each for each in declarations() if each.role == "learning" and not each.precedes_presets)
    if unread := [each.flag for each in learning if each.name in opts.typed and each.name not in precision]:
        opts.notes.append(f"no effect on --predict: {', '.join(unread)}")
