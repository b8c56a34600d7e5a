"""Writing, reading and checking checkpoints.

``<name>.pth`` has a manifest ``<name>.json`` with the file's sha256, written after it. If a run is killed
between the two writes, the ``save_id`` of the older manifest differs from the checkpoint's, and the manifest
is skipped with a log line. If the ids agree but the hash does not, the checkpoint is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import platform
import re
import secrets
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from torch import Tensor

from methods.classifiers import classifier_kind, classifier_names
from modules import NetworkSpec
from runs.released import network_of, our_names
from runs.tensor_file import SUFFIX, read_content
from tasks import Task
from utils.errors import UserError
from utils.files import atomic_write, atomic_write_text, cannot_write
from utils.hub import local_file

FORMAT_VERSION = 1

_log = logging.getLogger(__name__)
_NO_SPACE = "free some space or choose another --logdir"
_DOS_FOLDER = 0x10  # bit of a zip member's attributes
_WRAPPERS = ("module.", "_orig_mod.")
_SAME_WEIGHTS = ({"std", "sync"}, {"iabn", "iabn_sync", "iabn_sync_test"})  # --norm_act: same weights
# Released checkpoints hold their best score as a numpy number: the functions that unpickle one are safe.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint and its manifest atomically.

    Only one process at a time may write to a path: temporary files left by a killed run are removed.

    Args:
        path: file; its folder is made if missing.
        content: dict of tensors, numbers, strings, None, and dicts, lists and tuples of these. Its
            ``manifest`` (see ``make_manifest``) is also written to the JSON file.

    Raises:
        UserError: the file cannot be written (disk full, read-only folder).
        TypeError: the content has a type that ``load_checkpoint`` does not read.
    """
    check_loadable(dict(content), "content")
    path = Path(path)
    save_id = secrets.token_hex(8)
    try:
        for name in (path.name, _manifest_path(path).name):
            for left_over in path.parent.glob(f".{name}.*.tmp"):
                left_over.unlink(missing_ok=True)
        with atomic_write(path, _NO_SPACE) as file:
            torch.save({"format": FORMAT_VERSION, **content, "save_id": save_id}, file)
            size = file.tell()
            file.flush()
            with Path(file.name).open("rb") as written:
                digest = _sha256(written)
    except OSError as error:
        raise cannot_write(path, error, _NO_SPACE) from error
    except RuntimeError as error:
        # torch's archive writer raises a RuntimeError of its own over the operating system's error.
        if isinstance(error.__context__, OSError):
            raise cannot_write(path, error.__context__, _NO_SPACE) from error
        raise
    write_manifest(path, {**content, "save_id": save_id}, size, digest)


def write_manifest(path: Path, content: Mapping[str, Any], size: int, digest: str) -> None:
    """Write the JSON file beside a checkpoint.

    Args:
        path: the checkpoint.
        content: of it, with its ``save_id``.
        size: of the file, in bytes.
        digest: its sha256.

    Raises:
        UserError: the file cannot be written.
    """
    summary = {
        "file": path.name,
        "size": size,
        "sha256": digest,
        "save_id": content["save_id"],
        "epoch": content.get("epoch"),
        "manifest": content.get("manifest"),
    }
    atomic_write_text(_manifest_path(path), json.dumps(summary, indent=2) + "\n", _NO_SPACE)


def make_manifest(
    *,
    task: Task,
    step: int,
    spec: NetworkSpec,
    options: Mapping[str, Any],
    precision: str = "float32",
) -> dict[str, Any]:
    """Description of a checkpoint in JSON types: task, network, options, git commit, library versions."""
    return {
        "task": task.name,
        "dataset": task.dataset,
        "steps": [[int(class_id) for class_id in classes] for classes in task.steps],
        "step": step,
        "model": spec.model,
        "backbone": spec.backbone,
        "decoder": spec.decoder,
        "norm_act": spec.norm_act,
        "released_resnet": spec.released_resnet,
        "head": spec.head,
        "classifier": spec.classifier,
        "two_branches": spec.two_branches,
        "options": {str(key): _plain(value) for key, value in options.items()},
        "precision": precision,  # which --opt_level alone does not determine on every device
        "git_commit": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "numpy": np.__version__,
        },
    }


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def check_loadable(value: object, where: str) -> None:
    """Check that ``load_checkpoint`` can read a value.

    Raises:
        TypeError: naming type and place.
    """
    # Exact types: a numpy float is a float too, but ``weights_only`` does not load it.
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, torch.Size):
        return
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, Mapping)
        for key, item in value.items():
            check_loadable(key, f"key of {where}")
            check_loadable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        assert isinstance(value, Sequence)
        for position, item in enumerate(value):
            check_loadable(item, f"{where}[{position}]")
    else:
        raise TypeError(f"a checkpoint cannot hold {type(value).__name__} at {where}")


def _plain(value: Any) -> Any:
    """A value in JSON types; other types as str."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _git_commit() -> str | None:
    """Git commit of this code, with ``-dirty`` appended if files differ; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        # --match with a name that no tag has gives the commit instead of the nearest tag.
        done = subprocess.run(
            [*command, "--match", "no-such-tag"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("git commit unknown: %s", error)
        return None
    return done.stdout.strip() or None


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint of this program or of a released one to the CPU, without running code from it.

    Raises:
        UserError: the file does not exist, is damaged, is not a checkpoint, or contains more than data.
    """
    path = local_file(Path(path))
    try:
        with path.open("rb") as file:
            # Hash and content of one open file: another process may replace the checkpoint meanwhile.
            digest = _sha256(file)
            manifest = _read_manifest(path)
            if path.suffix == SUFFIX:
                content = _read_tensors(path)
            else:
                if digest != manifest.get("sha256"):
                    _check_archive(path, file)
                content = _read(path, file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; train the step first or give its file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a checkpoint; give another file")
    if manifest and digest != manifest.get("sha256"):
        if content.get("save_id") == manifest.get("save_id"):
            raise _damaged(path, "its sha256 is not the one in its manifest")
        _log.info("%s: its manifest is of another save and is skipped", path)
    version = content.get("format", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path}: has format {version}, newer than this code's {FORMAT_VERSION}; update the code"
        )
    return content


def save_id(path: Path) -> str | None:
    """The ``save_id`` of a checkpoint, from its manifest; None without a manifest."""
    found = _read_manifest(local_file(path)).get("save_id")
    return found if isinstance(found, str) else None


def saved_options(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of the run that wrote a checkpoint; empty for a released one."""
    manifest = content.get("manifest")
    options = manifest.get("options") if isinstance(manifest, Mapping) else None
    return options if isinstance(options, Mapping) else {}


def model_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights with this program's names, without the prefixes of wrapped models (``module.``).

    Args:
        content: of a checkpoint; its ``model_state`` or ``state_dict``, or the content itself if it is a
            plain state dict.

    Raises:
        UserError: it has no weights.
    """
    return our_names(_unwrapped(content))


def _unwrapped(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights with the names in the checkpoint, without the prefixes of wrapped models."""
    state = next((content[key] for key in ("model_state", "state_dict") if key in content), content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError("the checkpoint holds no 'model_state' with weights; give another file")
    weights = {str(name): tensor for name, tensor in state.items()}
    for prefix in _WRAPPERS * 2:  # DistributedDataParallel around torch.compile or vice versa
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def with_current_names(content: Mapping[str, Any], spec: NetworkSpec) -> dict[str, Any]:
    """The content of a checkpoint of any version, with the current names of the weights."""
    former = classifier_kind(spec.classifier).former_names

    def current(name: Any) -> Any:
        prefixes = (old for old in former if isinstance(name, str) and name.startswith(old))
        return next((former[old] + name.removeprefix(old) for old in prefixes), name)

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {current(key): renamed(item) for key, item in value.items()}
        return value

    found = {key: renamed(value) for key, value in content.items()} if former else dict(content)
    if "optimizer_weights" in found:
        found["optimizer_weights"] = [current(name) for name in found["optimizer_weights"]]
    return found


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty if there is none or it cannot be read."""
    try:
        manifest = json.loads(_manifest_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.warning(
            "%s: not readable, so the checkpoint's hash is not checked (%s)", _manifest_path(path), error
        )
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Verify the checksums in the zip archive, which ``torch.load`` does not."""
    file.seek(0)
    try:
        if not zipfile.is_zipfile(file):
            return  # the format before torch 1.6, or not a checkpoint; ``_read`` checks that
        with zipfile.ZipFile(file) as archive:
            member = archive.testzip()
            # torch's reader takes a member with this flag for a folder and leaves its tensor uninitialised.
            folders = [info.filename for info in archive.infolist() if info.external_attr & _DOS_FOLDER]
    except Exception as error:  # a damaged archive can raise many exceptions
        raise _damaged(path, _first_line(error)) from error
    if member is not None:
        raise _damaged(path, f"checksum of {member}")
    if folders:
        raise _damaged(path, f"attributes of {folders[0]}")


def _read(path: Path, file: BinaryIO) -> Any:
    file.seek(0)
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise _damaged(path, "not a checkpoint's pickle") from error
        raise UserError(
            f"{path}: holds more than weights and numbers ({refused[1]}) and was not loaded, as that could "
            "run code; where you trust it, save its tensors alone: c = torch.load(FILE, weights_only=False); "
            "torch.save({k: c[k] for k in ('model_state', 'state_dict', 'prototypes', 'count_features') "
            "if k in c}, NEW)"
        ) from error
    except Exception as error:  # damaged bytes can raise many exceptions
        raise _damaged(path, _first_line(error)) from error


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        return read_content(path)
    except ValueError as error:
        raise _damaged(path, _first_line(error)) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: damaged, truncated or not a checkpoint ({reason}); copy it again or train the step again"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__


# ── fitting ──────────────────────────────────────────────────────────────────────────────────────────


def check_fits(
    content: Mapping[str, Any],
    *,
    path: Path,
    task: Task,
    step: int,
    spec: NetworkSpec,
) -> None:
    """Check that a checkpoint is of this step of the task and of this network.

    Of a released checkpoint, which has no manifest, the classifiers are compared, and what the names of its
    weights say about the network. A task of another name with the same steps up to this one (15-5 and 15-5s
    at step 0) fits, unless the classifier has the parts of all steps.

    Raises:
        UserError: lists every difference.
    """
    manifest = content.get("manifest")
    whole = classifier_kind(spec.classifier).of_all_steps
    if manifest is None:
        known = {**spec.shaping, "released_resnet": spec.released_resnet, **network_of(_unwrapped(content))}
        misfits = _network_misfits(known, spec) + _classifier_misfits(model_state(content), task, step, spec)
    elif isinstance(manifest, Mapping):
        misfits = _task_misfits(manifest, task, step, whole=whole)
        misfits += _network_misfits(manifest, spec)
    else:
        misfits = ["its manifest is not a dictionary"]
    if misfits:
        raise UserError(
            f"{path}: does not fit this run: {'; '.join(misfits)}; give another checkpoint or options"
        )


def _task_misfits(manifest: Mapping[str, Any], task: Task, step: int, *, whole: bool) -> list[str]:
    """``whole``: the steps after this one count too."""
    misfits = []
    if manifest.get("dataset") != task.dataset:
        misfits.append(f"it is of --dataset {manifest.get('dataset')}, not {task.dataset}")
    if manifest.get("step") != step:
        misfits.append(f"it is of step {manifest.get('step')}, not {step}")
    theirs = manifest.get("steps")
    ours = [list(classes) for classes in task.steps]
    name = manifest.get("task")
    end = None if whole else step + 1
    if not isinstance(theirs, list) or theirs[:end] != ours[:end]:
        what = "another class order" if name == task.name else f"--task {name}, not {task.name}"
        misfits.append(f"it is of {what}")
    elif name != task.name:
        _log.info("checkpoint of task %s: its steps up to %d are those of %s", name, step, task.name)
    return misfits


def _network_misfits(manifest: Mapping[str, Any], spec: NetworkSpec) -> list[str]:
    misfits = []
    for option, value in spec.shaping.items():
        # Older checkpoints lack these; loading their weights checks the kind of classifier.
        found = manifest.get(option, {"head": "mib", "classifier": value, "two_branches": False}.get(option))
        if found != value and isinstance(value, bool):
            misfits.append(f"it is of a network {'without' if value else 'with'} --{option}")
        elif found != value and not any(found in kinds and value in kinds for kinds in _SAME_WEIGHTS):
            own = option == "classifier" and found not in classifier_names()
            brought = ", which a --method_file brings" if own else ""
            misfits.append(f"it has --{option} {found}{brought}, not {value}")
    released = manifest.get("released_resnet", manifest.get("sdr_network", False))
    if released != spec.released_resnet:
        theirs, ours = ("released", "paper") if released else ("paper", "released")
        misfits.append(f"it has the network of --fidelity {theirs}, not {ours}")
    return misfits


def network_shown(content: Mapping[str, Any], task: Task, step: int) -> dict[str, str | bool]:
    """What the weights of a released checkpoint say about its network, by the fields of ``NetworkSpec``.

    ``classifier`` only where a single kind has these parts. Empty for other checkpoints.

    Args:
        content: of ``load_checkpoint``.
        task: class order.
        step: of the checkpoint.
    """
    if "manifest" in content or not (shown := network_of(_unwrapped(content))):
        return {}
    found = _widths(model_state(content))
    kinds = [kind for kind in classifier_names() if _widths_of(kind, task, step) == found]
    return shown | ({"classifier": kinds[0]} if len(kinds) == 1 else {})


def _classifier_misfits(state: Mapping[str, Tensor], task: Task, step: int, spec: NetworkSpec) -> list[str]:
    found, wanted = _widths(state), _widths_of(spec.classifier, task, step)
    if not found or found == wanted:
        return []
    alike = [kind for kind in classifier_names() if _widths_of(kind, task, step) == found]
    hint = f" (as many with --classifier {' or '.join(alike)})" if alike else ""
    return [f"it has {_sum(found)} classes, step {step} has {_sum(wanted)}{hint}"]


def _widths_of(kind: str, task: Task, step: int) -> dict[str, int]:
    """``_widths`` of a kind of classifier at a step."""
    with torch.device("meta"):  # names and sizes only, without drawing weights
        made = classifier_kind(kind)(256, task.classes_per_step(step), task.later_classes_per_step(step))
    return _widths({f"cls.{name}": tensor for name, tensor in made.state_dict().items()})


def _widths(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Output channels of each part of the classifier, by its name: the size of its last weight."""
    weights = ((re.match(r"cls\.(\w+)\.", name), tensor) for name, tensor in state.items())
    return {found[1]: tensor.shape[0] for found, tensor in weights if found and tensor.dim()}


def _sum(widths: Mapping[str, int]) -> str:
    return " + ".join(str(widths[name]) for name in sorted(filter(str.isdigit, widths), key=int))
