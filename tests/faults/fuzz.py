"""Damaged files for every reader: a clear error or the right content, nothing else.

Readers: checkpoints, step lists (``train-<step>.npy``), exemplar lists, task files, lists of class names,
VOC's image lists, the cache of the image-level labels, label masks.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import differences
from PIL import Image

from dataset.decoding import read_mask
from dataset.exemplars import Exemplar, load_exemplars, save_exemplars
from dataset.folder import read_class_names
from dataset.image_labels import mask_values, scan_image_labels
from dataset.protocols import load_step_list
from dataset.voc import VOC_CLASSES, open_voc_layout
from runs.checkpoint import load_checkpoint, model_state, save_checkpoint
from tasks import get_task
from utils.errors import UserError


@dataclass
class Target:
    """A file, how it is read, and what reading the undamaged one gives.

    ``checked`` files carry checksums: other content than the right one must never come out of them. A text
    list with a changed digit is another list, and all that can be asked is an answer without a traceback.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    checked: bool
    beside: tuple[Path, ...] = ()


def run_cases(number: int, seed: int, folder: Path) -> tuple[list[str], dict[str, int]]:
    """Damage files and read them.

    Returns:
        A line for every case that went wrong, and how many cases gave an error, the right content, or
        (text lists only) other content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    targets = [make(folder / make.__name__) for make in _MAKERS]
    right = [target.read() for target in targets]
    failures: list[str] = []
    counts: Counter[str] = Counter()
    for case in range(number):
        index = case % len(targets)
        target = targets[index]
        files = (target.path, *target.beside)
        whole = {path: path.read_bytes() for path in files}
        victim = draw.choice(files) if draw.random() < 0.2 else target.path
        what = _damage(victim, draw)
        line = f"case {case}: {target.name}, {victim.name}: {what}"
        try:
            content = target.read()
        except UserError as error:
            counts["error"] += 1
            text = str(error)
            if "\n" in text or not text:
                failures.append(f"{line}: message of several lines: {text!r}")
        except Exception as error:
            failures.append(f"{line}: {type(error).__name__}: {error}")
        else:
            same = not differences(right[index], content)
            counts["right" if same else "other"] += 1
            if target.checked and not same:
                failures.append(f"{line}: wrong content was read")
        finally:
            for path, data in whole.items():
                path.write_bytes(data)
    return failures, dict(counts)


def _damage(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "flip", "cut", "byte", "insert", "zeros", "head"))
    place = draw.randrange(len(data))
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 3, 20))):
            place = draw.randrange(len(data))
            data[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "byte":
        data[place] = draw.randrange(256)
    elif kind == "insert":
        data[place:place] = draw.randbytes(draw.randint(1, 16))
    elif kind == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    else:  # the first bytes, where formats keep what they trust
        place = draw.randrange(min(len(data), 200))
        data[place] = draw.randrange(256)
    path.write_bytes(data)
    return f"{kind} at {place}"


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────


def checkpoint(folder: Path) -> Target:
    path = folder / "a_0.pth"
    generator = torch.Generator().manual_seed(0)
    state = {f"layer{i}.weight": torch.rand(8, 8, generator=generator) for i in range(4)}
    save_checkpoint(path, {"model_state": state, "epoch": 3, "best_score": 0.5, "method_state": {}})
    return Target(
        "checkpoint",
        path,
        lambda: dict(model_state(load_checkpoint(path))),
        checked=True,
        beside=(path.with_suffix(".json"),),
    )


def checkpoint_without_manifest(folder: Path) -> Target:
    target = checkpoint(folder)
    target.path.with_suffix(".json").unlink()
    return Target("checkpoint alone", target.path, target.read, checked=True)


def step_list(folder: Path) -> Target:
    folder.mkdir()
    np.save(folder / "train-0.npy", np.arange(40, dtype=np.int64) * 2)
    return Target("step list", folder / "train-0.npy", lambda: load_step_list(folder, 0, 100), checked=False)


def exemplars(folder: Path) -> Target:
    path = folder / "exemplars_1.json"
    save_exemplars(path, [Exemplar(i, 0) for i in range(20)], {"step": 1})
    return Target(
        "exemplars",
        path,
        lambda: [[e.index, e.step] for e in load_exemplars(path, {"step": 1})],
        checked=False,
    )


def task_file(folder: Path) -> Target:
    folder.mkdir()
    path = folder / "tasks.json"
    path.write_text(json.dumps({"mine": [[0, 1, 2], [3], [4]]}))
    return Target(
        "task file",
        path,
        lambda: [list(s) for s in get_task("voc", "mine", task_file=path).steps],
        checked=False,
    )


def task_file_yaml(folder: Path) -> Target:
    folder.mkdir()
    path = folder / "tasks.yaml"
    path.write_text("mine:\n  - [0, 1, 2]\n  - [3]\n  - [4]\n")
    return Target(
        "YAML task file",
        path,
        lambda: [list(s) for s in get_task("voc", "mine", task_file=path).steps],
        checked=False,
    )


def _mask(path: Path) -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(0).integers(0, 21, (40, 50), dtype=np.uint8)
    image = Image.fromarray(pixels, mode="P")
    image.putpalette([value % 256 for value in range(768)])
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return pixels


def mask(folder: Path) -> Target:
    path = folder / "mask.png"
    _mask(path)
    return Target("mask", path, lambda: read_mask(path), checked=True)


def mask_labels(folder: Path) -> Target:
    path = folder / "mask.png"
    _mask(path)
    return Target("mask's classes", path, lambda: mask_values(path).tolist(), checked=True)


def image_labels_cache(folder: Path) -> Target:
    mask_path = folder / "mask.png"
    _mask(mask_path)
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)

    def read() -> list[list[int]]:
        return [sorted(s) for s in scan_image_labels([mask_path], cache_dir=cache, progress=False)]

    read()
    (path,) = cache.glob("*.npz")
    return Target("cache of the image-level labels", path, read, checked=True)


def class_names(folder: Path) -> Target:
    folder.mkdir()
    path = folder / "classes.txt"
    path.write_text("background\ncat\ndog\nfäsan\n", encoding="utf-8")
    return Target("class names", path, lambda: list(read_class_names(path)), checked=False)


def image_list(folder: Path) -> Target:
    for name in ("JPEGImages", "SegmentationClassAug", "splits"):
        (folder / name).mkdir(parents=True)
    lines = []
    for index in range(3):
        _mask(folder / "SegmentationClassAug" / f"{index}.png")
        lines.append(f"/JPEGImages/{index}.jpg /SegmentationClassAug/{index}.png\n")
    path = folder / "splits" / "train_aug.txt"
    path.write_text("".join(lines))

    def read() -> list[list[int]]:
        masks = open_voc_layout("voc", folder, "train", VOC_CLASSES).masks
        return [sorted(s) for s in scan_image_labels(masks, progress=False)]

    return Target("image list", path, read, checked=False)


_MAKERS: tuple[Callable[[Path], Target], ...] = (
    checkpoint,
    checkpoint_without_manifest,
    step_list,
    exemplars,
    task_file,
    task_file_yaml,
    mask,
    mask_labels,
    image_labels_cache,
    class_names,
    image_list,
)
