"""A folder of a trained step for the Hugging Face hub, from which ``hf:`` reads it again.

python -m runs.publish RUN --step 0 --out DIR
hf upload OWNER/REPO DIR       (a command of the package huggingface_hub)
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argparser import declared, option_defaults
from dataset import class_names
from runs.checkpoint import load_checkpoint, saved_options, write_manifest
from runs.files import CHECKPOINT, RESULTS, step_file
from runs.results import read_step_results
from runs.tensor_file import SUFFIX, to_bytes
from utils.command import run_command
from utils.errors import UserError
from utils.files import atomic_write, atomic_write_text
from utils.option_types import Parser, count, path_option
from utils.tables import markdown_table

# What a later step, an evaluation and a prediction read; the rest only resumes the step on its own machine.
_KEPT = {
    *("format", "save_id", "manifest", "model_state", "modules", "method_state"),
    *("epoch", "batch", "batches_per_epoch", "best_score", "ended", "kept_epoch"),
}
_LICENCES = {
    "voc": "Pascal VOC 2012: images from Flickr, under Flickr's terms of use "
    "(host.robots.ox.ac.uk/pascal/VOC).",
    "ade": "ADE20K: images for non-commercial research and education only, annotations under BSD-3 "
    "(groups.csail.mit.edu/vision/datasets/ADE20K/terms).",
    "shapes": "Generated images (data/make_shapes.py), without restrictions.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("runs.publish", lambda: print(_publish(argv)))


def _publish(argv: Sequence[str] | None) -> str:
    parser = Parser(
        prog="python -m runs.publish",
        description="Write a folder for the Hugging Face hub: weights, results and a model card of a step.",
    )
    parser.add_argument("run", type=path_option, metavar="RUN", help="folder of the run")
    parser.add_argument("--step", type=count, default=0, help="the trained step (default: 0)")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--checkpoint", type=path_option, metavar="DIR", help="as of the run, if typed there")
    parser.add_argument("--data_license", metavar="TEXT", help="licence of your own data (--dataset folder)")
    args = parser.parse_args(argv)
    return publish(args.run, args.step, args.out, args.checkpoint, args.data_license)


def publish(
    run: Path, step: int, out: Path, checkpoints: Path | None = None, data_licence: str | None = None
) -> str:
    """Write the folder; returns a line for the user.

    Args:
        run: folder of the run.
        step: a trained and evaluated step.
        out: folder to write: weights, manifest, ``config.json``, results and the model card ``README.md``.
        checkpoints: folder of the checkpoints; None: the run's.
        data_licence: of the user's own data; known of the published data sets.

    Raises:
        UserError: the step is not trained and evaluated, its licence is unknown, or a file cannot be written.
    """
    path = step_file(run, CHECKPOINT, step)
    path = path if checkpoints is None else checkpoints / path.name
    evaluated, results = step_file(run, RESULTS, step), read_step_results(run, step)
    if results is None:
        raise UserError(f"{evaluated}: not there, so step {step} is not finished; finish it")
    if results.get("miou_all") is None:
        raise UserError(f"{evaluated}: has no miou_all to publish; test the step again")
    earlier = {number: read_step_results(run, number) for number in range(step)}
    _check_there(path, step)
    content = {name: value for name, value in load_checkpoint(path).items() if name in _KEPT}
    manifest = content.get("manifest")
    if not isinstance(manifest, Mapping):
        raise UserError(f"{path}: has no manifest (a released checkpoint?); publish a run of this program")
    licence = data_licence or _LICENCES.get(str(manifest["dataset"]))
    if licence is None:
        raise UserError(
            f"--data_license: say under which licence the data of --dataset {manifest['dataset']} are"
        )
    content["manifest"] = manifest = {**manifest, "options": _without_folders(saved_options(content))}
    weights = out / path.with_suffix(SUFFIX).name
    data = to_bytes(content)
    texts = {
        RESULTS.format(step=number): _json(found)
        for number, found in {**earlier, step: results}.items()
        if found is not None
    }
    texts["config.json"] = _json(_config(manifest, step))
    texts["README.md"] = _card(manifest, step, results, licence, weights.name)
    with atomic_write(weights) as file:
        file.write(data)
    write_manifest(weights, content, len(data), hashlib.sha256(data).hexdigest())
    for name, text in texts.items():
        atomic_write_text(out / name, text)
    return f"{out}: {len(data) / 1e6:.0f} MB; evaluate it with --test --ckpt {weights}"


def _check_there(path: Path, step: int) -> None:
    """Refuse a checkpoint that is not there; if the run's folder was renamed, name the one that is."""
    found = sorted(path.parent.glob(CHECKPOINT.format(run="*", step=step)))
    others = [file.name for file in found if file.with_suffix(".json").is_file()]  # not a method's tensors
    if path in found:
        return
    if others:
        raise UserError(
            f"{path}: no such checkpoint, but {others[0]}; give the run's folder the name with which its "
            "checkpoints begin"
        )
    raise UserError(f"{path}: no such checkpoint; train the step, or give its folder with --checkpoint")


def _without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, of paths only the last name: folders say who trained where."""
    return {
        name: Path(value).name if declared(name).is_path and isinstance(value, str) else value
        for name, value in options.items()
    }


def _config(manifest: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What the hub shows and other programs read: the network and the classes of its outputs."""
    ids = [class_id for classes in manifest["steps"][: step + 1] for class_id in classes]
    own = manifest["dataset"] == "folder"  # its names are in the data set's folder
    names = {} if own else dict(enumerate(class_names(manifest["dataset"], Path())))
    network = {
        name: value for name, value in manifest.items() if name not in ("options", "versions", "steps")
    }
    return {**network, "id2label": {str(place): names.get(i, f"class {i}") for place, i in enumerate(ids)}}


def _card(manifest: Mapping[str, Any], step: int, results: Any, licence: str, file: str) -> str:
    options, numbers = manifest["options"], results["miou_all"]
    setting = f"step {step} of {manifest['task']} on {manifest['dataset']}, {options.get('protocol', '')}"
    rows = [[name, "–" if iou is None else f"{100 * iou:.2f}"] for name, iou in results["class_iou"].items()]
    return f"""---
license: other
license_name: of-the-data
library_name: pytorch
pipeline_tag: image-segmentation
tags: [continual-learning, class-incremental-semantic-segmentation]
---
# {options.get("method") or "A method"}: {setting}

mIoU over all classes: {100 * numbers:.2f} %. Trained with

```bash
{_command(options)}
```

at commit {manifest.get("git_commit")}. The next step starts from it with `--step_ckpt hf:OWNER/REPO/{file}`;
`--test --ckpt hf:OWNER/REPO/{file}` and the options above evaluate it.

{markdown_table(["class", "IoU %"], rows)}

## Licence of the data

{licence}
"""


def _command(options: Mapping[str, Any]) -> str:
    """The command line that trained a step: all options that differ from their defaults."""
    words = []
    usual = option_defaults()
    for name, value in options.items():
        option = declared(name)
        if option.derived or name not in usual or value == usual[name] or value is None:
            continue
        shown = option.as_typed(value)
        if isinstance(shown, bool):
            words += [option.flag] if shown else []
        else:
            values = shown if isinstance(shown, list) else [shown]
            words += [option.flag, *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return f"python run.py {shlex.join(words)}"


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
