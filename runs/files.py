"""Names of the files in a run's folder, ``<logdir>/<task>-<dataset>_<name>/``.

They must not change: folders of earlier versions and users' scripts use them.
"""

from __future__ import annotations

import re
from pathlib import Path

OPTIONS = "run.json"  # options of the latest start and of every step
LOG = "train.log"
SAMPLES = "samples"  # folder of the sample images
# One per step; {run} is the folder's name.
CHECKPOINT = "{run}_{step}.pth"
MANIFEST = "{run}_{step}.json"  # of the checkpoint
RESULTS = "results_{step}.json"  # written last, so it marks the step as done
CONFUSION = "confusion_{step}.csv"
HISTORY = "history_{step}.jsonl"
EXEMPLARS = "exemplars_{step}.json"
PREDICTIONS = "predictions_{step}.png"
TENSORBOARD = "step_{step}"  # folder
TENSORBOARD_TASK = "task"  # folder of the curves over the steps
WANDB_ID = "wandb_id"  # of the run on Weights & Biases, with --wandb
CACHED = "{name}_{step}.pth"  # tensors that methods compute before a step
OUTPUT = "output.log"  # what a run of an experiment prints


def run_folder(logdir: Path | str, task: str, dataset: str, name: str) -> Path:
    """``<logdir>/<task>-<dataset>_<name>``."""
    return Path(logdir) / f"{task}-{dataset}_{name}"


def results_csv(date: str | None, dataset: str, task: str, name: str) -> str:
    """Name of the CSV file of IoU by class and step, as the released programs write it."""
    return "_".join(part for part in (date, dataset, task, f"{name}.csv") if part)


def step_file(run_dir: Path, kind: str, step: int) -> Path:
    """Path of a step's file of one kind (``RESULTS``, ...)."""
    return run_dir / kind.format(run=run_dir.name, step=step)


def step_files(run_dir: Path, kind: str) -> dict[int, Path]:
    """The existing files of one kind, by step, in order of steps."""
    before, after = kind.replace("{run}", re.escape(run_dir.name)).split("{step}")
    pattern = re.compile(rf"{before}(\d+){re.escape(after)}")
    found = ((pattern.fullmatch(path.name), path) for path in run_dir.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))
