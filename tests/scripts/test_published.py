"""The scripts of the published experiments have the published settings (run with stand-in launchers)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from argparser import Options, parse_options
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

# docs/recipes.md: total batch, lr of step 0, lr of later steps, epochs VOC, epochs ADE20K, AMP level.
MIB_FAMILY = (24, 1e-2, {"voc": 1e-3, "ade": 1e-3}, {"voc": 30, "ade": 60}, "O1")
RECIPES = {
    "sats": MIB_FAMILY,
    "mib": MIB_FAMILY,
    "plop": MIB_FAMILY,
    "ilt": MIB_FAMILY,
    "ssul": (32, 1e-2, {"voc": 1e-2, "ade": 5e-2}, {"voc": 50, "ade": 100}, "O0"),
    "sdr": (8, 1e-3, {"voc": 1e-4}, {"voc": 30}, "O0"),
}
# Classes of each step without the background, from the tasks' names.
CLASSES = {
    "voc": {
        "19-1": [19, 1],
        "15-5": [15, 5],
        "15-1": [15, 1, 1, 1, 1, 1],
        "5-3": [5, 3, 3, 3, 3, 3],
        "10-1": [10] + 10 * [1],
    },
    "ade": {
        "100-50": [100, 50],
        "100-10": [100] + 5 * [10],
        "100-5": [100] + 10 * [5],
        "25-25": 6 * [25],
        "50-50": 3 * [50],
    },
}
SEGFORMER = [
    (dataset, method, "segformer", task)
    for dataset, tasks in (
        ("voc", ("15-1", "15-5", "5-3", "10-1")),
        ("ade", ("100-50", "100-10", "100-5", "25-25", "50-50")),
    )
    for method in ("sats", "mib", "plop", "ilt", "ssul")
    for task in tasks
]
DEEPLAB = [
    *(("voc", "plop", "deeplab", task) for task in ("19-1", "15-5", "15-1", "10-1")),
    *(("ade", "plop", "deeplab", task) for task in ("100-50", "100-10", "100-5", "50-50")),
    *(("voc", "sdr", "deeplab", task) for task in ("19-1", "15-5", "15-1")),
]
EXPERIMENTS = {f"{d}/{m}_{n}_{t}.sh": (d, m, n, t) for d, m, n, t in (*SEGFORMER, *DEEPLAB)}

# Repositories in published_commands.txt, and words that tell methods of one apart.
NEWER = {
    ("DKD", ""): "DKD",
    ("STAR", ""): "STAR",
    ("EWF_official", "--name MiB+ours"): "MIB+EWF",
    ("EWF_official", "--name PLOP+ours"): "PLOP+EWF",
    ("LGKD", ""): "LGKD",
    ("ECCV24_NeST", "--pod local"): "PLOP+NeST",
    ("ECCV24_NeST", "--loss_kd"): "MIB+NeST",
    ("RCIL", ""): "RCIL",
    ("RevisitingCSS", ""): "DFT",
}
# Epochs in the configuration files of DKD and STAR.
CONFIGURED_EPOCHS = {"voc": 60, "ade": 100}
# Options of published lines that follow from other options here, or that their program does not use.
NOT_COMPARED = {
    "all": {"method", "name", "task", "step", "lr", "batch_size", "epochs", "checkpoint", "overlap", "test"},
    "RCIL": {"pod", "pod_factor", "pod_logits", "pod_options", "classif_adaptive_factor", "init_balanced"},
    "DFT": {"task_num"},  # only checked here
}


# Options of published lines that mean nothing here, and the answer.
REFUSED = {
    "--backbone swin_b": "the papers' Swin-B is timm/",
    "--results_dir results": "--results_dir does not exist here: results are in the run's folder",
}


@dataclass(frozen=True)
class Line:
    """A published command line, without the options of folders."""

    method: str
    processes: int
    script: str
    words: str

    def value(self, *names: str) -> str:
        """Value of the option with one of these names."""
        (found,) = re.findall(rf"--(?:{'|'.join(names)}) (\S+)", self.words)
        return str(found)

    @property
    def dataset(self) -> str:
        return self.script[6:9] if self.script.startswith("train_") else self.value("dataset")

    @property
    def task(self) -> str:
        return {"15-5s": "15-1", "50": "50-50"}.get(task := self.value("task", "task_name"), task)

    @property
    def protocol(self) -> str:
        return "overlapped" if "--overlap" in self.words or "setting overlap" in self.words else "disjoint"

    @property
    def step(self) -> int:
        return int(self.value("step", "task_step"))

    @property
    def schedule(self) -> tuple[int, float, int]:
        """Total batch, rate and epochs."""
        total = self.processes * int(self.value("batch_size", "bs"))
        epochs = self.value("epochs") if "--epochs" in self.words else CONFIGURED_EPOCHS[self.dataset]
        return total, float(self.value("lr")), int(epochs)


def published_lines() -> list[Line]:
    lines = []
    for text in (Path(__file__).parent / "published_commands.txt").read_text(encoding="utf-8").splitlines():
        if not text.startswith("#"):
            repository, processes, script, words = text.removesuffix(" # off").split(" ", 3)
            method = next(m for (name, part), m in NEWER.items() if name == repository and part in words)
            lines.append(Line(method, int(processes), script, words))
    return lines


def newer_experiments() -> dict[tuple[str, str, str], list[Line]]:
    """Published lines by data set, method and task, but for backbones that there are not here."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in published_lines():
        if "swin_b" not in line.words:
            found.setdefault((line.dataset, line.method, line.task), []).append(line)
    return found


RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$RECORD"
printf '\\n\\0' >> "$RECORD"
"""


@dataclass
class Call:
    """A command of a script: words before run.py, and options after it."""

    launcher: list[str]
    words: list[str]

    @property
    def options(self) -> Options:
        return parse_options(self.words)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder for PATH whose torchrun, srun and python record their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("torchrun", "srun", "python"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    (folder / "scontrol").write_text("#!/usr/bin/env bash\necho node1\n")
    (folder / "scontrol").chmod(0o755)
    return folder


def calls(
    script: Path, stand_ins: Path, *words: str, code: int = 0, said: str = "", **variables: str
) -> list[Call]:
    """Commands that a script starts; checks its exit code and standard error."""
    record = stand_ins.parent / "record"
    record.write_bytes(b"")
    known = {"DATA", "GPUS", "NAME", "PROTOCOL", "LOGDIR", "BATCH", "PROGRAM"}
    environment = {name: value for name, value in os.environ.items() if name not in known}
    done = subprocess.run(
        ["bash", str(script), *words],
        cwd=ROOT,
        env={
            **environment,
            **{"PATH": f"{stand_ins}:{os.environ['PATH']}", "RECORD": str(record)},
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and said in done.stderr, done.stderr
    lines = [text.split("\0")[:-1] for text in record.read_text().split("\n\0")[:-1]]
    # srun hands run.py to the shell of each task; what follows its own name are the options.
    ends = [max(i for i, word in enumerate(line) if Path(word).name == "run.py") for line in lines]
    return [Call(line[:end], line[end + 1 :]) for line, end in zip(lines, ends, strict=True)]


def bat_calls(script: Path) -> list[Call]:
    """The python commands of a batch file with the values of its ``if not defined`` lines."""
    text = script.read_text(encoding="utf-8").replace("^\n", " ")
    values = dict(re.findall(r'^if not defined \w+ set "(\w+)=(.*)"$', text, re.M))
    for name, value in values.items():
        text = text.replace(f"%{name}%", value)
    commands = re.findall(r"^python run\.py (.*?) %\* \|\| exit /b 1$", text, re.M)
    assert not re.search("%[A-Z]+%", text)
    return [Call(["python"], shlex.split(command)) for command in commands]


def check(found: list[Call], dataset: str, method: str, task: str, processes: int) -> list[Options]:
    """Assert that the commands of a script follow its method's recipe through all steps of the task."""
    batch, first_lr, later_lr, epochs, level = RECIPES[method]
    all_options = [call.options for call in found]
    lrs = {step: lr for opts in all_options for step, lr in zip(opts.steps, opts.lrs, strict=True)}
    steps = CLASSES[dataset][task]
    assert lrs == {step: later_lr[dataset] if step else first_lr for step in range(len(steps))}
    for opts in all_options:
        assert opts.dataset == dataset
        last = opts.task_.num_steps - 1
        assert opts.task_.classes_per_step(last) == [steps[0] + 1, *steps[1:]]
        assert (processes * opts.batch_size, opts.epochs, opts.opt_level) == (
            batch,
            epochs[dataset],
            level,
        )
        assert (opts.momentum, opts.weight_decay, opts.lr_policy, opts.lr_power) == (0.9, 1e-4, "poly", 0.9)
        assert opts.crop_size == (513 if method == "ssul" else 512)
        assert opts.warmup == (0.1 if (method, dataset) == ("ssul", "ade") and opts.steps[0] else 0)
    assert len({(opts.name, opts.logdir, opts.data_root, opts.task) for opts in all_options}) == 1
    return all_options


def check_sdr(found: list[Options]) -> None:
    """As published: step 0 with prototypes, then SDR."""
    first, later = found
    assert (first.method, first.unce, first.loss_de_prototypes, first.sample_num) == (None, True, 1.0, 10)
    assert (later.method, later.loss_kd, later.loss_de_prototypes, later.sample_num) == ("SDR", 100, 1e-2, 10)
    assert (later.loss_fc, later.lfc_sep_clust, later.loss_featspars) == (1e-3, 1e-3, 1e-3)
    assert later.loss_de_prototypes_sumafter
    assert (later.lfs_normalization, later.lfs_shrinkingfn) == ("max_maskedforclass", "exponential")
    assert first.protocol == later.protocol == "disjoint"
    assert first.model == "deeplab" and first.backbone == "resnet101"


def test_there_is_a_script_for_every_published_experiment_and_no_other() -> None:
    found = {str(path.relative_to(SCRIPTS)) for path in SCRIPTS.glob("[av]*/*")}
    assert found == {*EXPERIMENTS, "voc/newer.sh", "ade/newer.sh"}


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_script_follows_the_recipe(script: str, stand_ins: Path) -> None:
    dataset, method, network, task = EXPERIMENTS[script]
    found = calls(SCRIPTS / script, stand_ins)
    processes = 1 if method == "sdr" else 2
    for call in found:
        assert call.launcher[:2] == ["--standalone", f"--nproc_per_node={processes}"]
    options = check(found, dataset, method, task, processes)
    if method == "sdr":
        check_sdr(options)
        return
    model = ("segformer_b2", "sats") if network == "segformer" else ("deeplab", "sats")
    for opts in options:
        assert (opts.method, opts.protocol) == (method.upper(), "overlapped")
        assert (opts.model, opts.decoder) == model
        assert opts.backbone == "resnet101"
        assert opts.data_root == ROOT / "data"


@pytest.mark.parametrize(("dataset", "method", "task"), newer_experiments())
def test_a_newer_method_has_its_published_settings(
    dataset: str, method: str, task: str, stand_ins: Path
) -> None:
    """Schedule and every weight on the published command lines, by preset or by script."""
    first, later = calls(SCRIPTS / dataset / "newer.sh", stand_ins, method, task)
    assert first.options.steps == [0]
    assert later.options.steps == list(range(1, len(CLASSES[dataset][task])))
    for line in newer_experiments()[dataset, method, task]:
        call = later if line.step else first
        opts = call.options
        assert opts.task_.classes_per_step(0) == [CLASSES[dataset][task][0] + 1]
        assert (2 * opts.batch_size, *opts.lrs[:1], opts.epochs) == line.schedule
        assert len(set(opts.lrs)) == 1 and (opts.opt_level, opts.protocol) == ("O1", "overlapped")
        if line.script == "run.py":
            published = parse_options(shlex.split(line.words.replace("--results_dir results", "")))
            for name in published.typed - NOT_COMPARED["all"] - NOT_COMPARED.get(method, set()):
                assert getattr(opts, name) == getattr(published, name), name
        elif "--pos_weight" in line.words:
            assert opts.pos_weight[0] == float(line.value("pos_weight"))


def test_newer_methods_without_published_settings_start_nothing(stand_ins: Path) -> None:
    script = SCRIPTS / "voc" / "newer.sh"
    said = "published for LGKD are 19-1 15-5 15-1"
    assert calls(script, stand_ins, "LGKD", "10-1", code=2, said=said) == []
    assert calls(script, stand_ins, code=2, said="give DKD, DKD-M, STAR") == []
    assert calls(script, stand_ins, "LGKD", "15-1", GPUS="3", code=2, said="a batch of 16") == []


def test_variables_of_newer_methods(stand_ins: Path) -> None:
    variables = {"GPUS": "4", "NAME": "mine", "PROTOCOL": "disjoint", "BATCH": "8"}
    for call in calls(SCRIPTS / "voc" / "newer.sh", stand_ins, "RCIL", "15-1", "--test", **variables):
        opts = call.options
        assert (opts.batch_size, opts.name, opts.protocol, opts.test) == (2, "mine", "disjoint", True)


@pytest.mark.parametrize(
    "method", sorted({line.method for line in published_lines() if line.script == "run.py"})
)
def test_published_command_lines_are_understood(method: str) -> None:
    """Those of PLOP's forks, but for two options that get an answer."""
    for line in published_lines():
        if line.method != method:
            continue
        words = line.words
        for option, answer in REFUSED.items():
            if option in words:
                with pytest.raises(UserError) as caught:
                    parse_options(shlex.split(words))
                assert answer in str(caught.value) and "\n" not in str(caught.value)
                words = words.replace(option, "")
        assert parse_options(shlex.split(words)).task_.name == line.value("task")


def test_variables_and_further_words_are_passed_on(stand_ins: Path) -> None:
    variables = {"DATA": "/my data", "GPUS": "3", "NAME": "mine", "LOGDIR": "my logs", "PROTOCOL": "disjoint"}
    script = SCRIPTS / "voc" / "mib_segformer_15-1.sh"
    (call,) = calls(script, stand_ins, "--epochs", "5", "--test", **variables)
    assert call.launcher[1] == "--nproc_per_node=3"
    opts = call.options
    assert (opts.data_root, opts.name, opts.logdir) == (Path("/my data"), "mine", Path("my logs"))
    assert (opts.protocol, opts.batch_size, opts.epochs, opts.test) == ("disjoint", 8, 5, True)
    (call,) = calls(script, stand_ins, PROTOCOL="sequential", BATCH="6")
    assert (call.options.protocol, call.options.batch_size) == ("sequential", 3)
    assert call.options.logdir == Path("logs/sequential")


@pytest.mark.parametrize(
    "variables", [{"GPUS": "5"}, {"GPUS": "two"}, {"PROTOCOL": "overlap"}, {"GPUS": "0"}]
)
def test_a_wrong_variable_starts_nothing(stand_ins: Path, variables: dict[str, str]) -> None:
    assert calls(SCRIPTS / "voc" / "sats_segformer_15-5.sh", stand_ins, code=2, **variables) == []


def test_a_failed_step_ends_the_script(stand_ins: Path) -> None:
    (stand_ins / "torchrun").write_text(RECORDER + "exit 1\n")
    assert len(calls(SCRIPTS / "voc" / "sdr_deeplab_19-1.sh", stand_ins, code=1)) == 1


def test_slurm_script_of_sdr(stand_ins: Path) -> None:
    script = SCRIPTS / "slurm" / "sdr_19-1.slurm"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_SUBMIT_DIR": str(ROOT)}
    found = calls(script, stand_ins, "--fidelity", "released", DATA="/d", **slurm)
    options = check(found, "voc", "sdr", "19-1", 4)
    check_sdr(options)
    assert {(opts.data_root, opts.fidelity) for opts in options} == {(Path("/d"), "released")}


def test_tasks_that_cannot_share_the_batch_start_nothing(
    stand_ins: Path,
) -> None:
    script = SCRIPTS / "slurm" / "sdr_19-1.slurm"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert calls(script, stand_ins, code=2, said="--ntasks=3 cannot share a batch of 8 evenly", **slurm) == []
    found = calls(script, stand_ins, BATCH="9", **slurm)
    assert [call.options.batch_size for call in found] == [3, 3]


@pytest.mark.parametrize("name", ["sdr_19-1.slurm", "requeue.slurm"])
def test_slurm_scripts_find_the_program_or_say_so(name: str, stand_ins: Path, tmp_path: Path) -> None:
    """Slurm runs a copy of the script: the program is in the folder of sbatch, or in PROGRAM."""
    copy = tmp_path / "slurm_script"
    shutil.copy(SCRIPTS / "slurm" / name, copy)
    elsewhere = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert calls(copy, stand_ins, code=2, said=f"{tmp_path} is not the program's folder", **elsewhere) == []
    assert calls(copy, stand_ins, PROGRAM=str(ROOT), **elsewhere) != []
    assert calls(copy, stand_ins, **{**elsewhere, "SLURM_SUBMIT_DIR": str(ROOT)}) != []


def documented(text: str) -> list[Options]:
    """Options of every ``sbatch ... requeue.slurm`` of a text."""
    found = re.findall(r"requeue\.slurm \\\n((?:.*\\\n)*.*)", text)
    return [parse_options(shlex.split(words.replace("\\\n", " ").replace("#", " "))) for words in found]


@pytest.mark.parametrize("path", ["docs/long_runs.md", "scripts/slurm/requeue.slurm"])
def test_the_examples_for_slurm_follow_the_recipe(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    (opts,) = documented(text)
    assert "--ntasks-per-node=4" in text
    total, first, later, epochs, level = RECIPES[str(opts.method).lower()]
    assert (4 * opts.batch_size, opts.epochs, opts.opt_level) == (total, epochs["voc"], level)
    assert opts.lrs == [first, later["voc"]]


def test_batch_file_of_sdr() -> None:
    found = bat_calls(SCRIPTS / "windows" / "sdr_19-1.bat")
    options = check(found, "voc", "sdr", "19-1", 1)
    check_sdr(options)
    assert {opts.where_to_sim for opts in options} == {"GPU_windows"}


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck")
    scripts = [
        *SCRIPTS.glob("[av]*/*.sh"),
        *SCRIPTS.glob("slurm/*"),
        SCRIPTS / "newer_methods.sh",
        SCRIPTS / "run_task.sh",
        SCRIPTS / "share_batch.sh",
    ]
    done = subprocess.run(
        [program, *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
