"""A checkpoint's content as a ``.safetensors`` file: the form in which it is published.

Weights have their names in the network, which other programs can read. The rest of the content is JSON in the
file's metadata, with the names of the tensors that belong to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

SUFFIX = ".safetensors"
_CONTENT = "continual_segmentation"
_WEIGHTS = "model_state"


def to_bytes(content: Mapping[str, Any]) -> bytes:
    """A checkpoint's content as a file's bytes.

    Args:
        content: of the types that ``runs.checkpoint.check_loadable`` allows.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            name = name.removeprefix(f"{_WEIGHTS}/")
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, Mapping):  # JSON has no other keys than strings
            return {"dict": [[key, plain(item, f"{name}/{key}".lstrip("/"))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [plain(item, f"{name}/{place}") for place, item in enumerate(value)]}
        return value

    structure = json.dumps(plain(content, ""))
    return save(tensors, metadata={"format": "pt", _CONTENT: structure})


def read_content(path: Path) -> dict[str, Any]:
    """The content of a file of :func:`to_bytes`; of another file its tensors, by name.

    Raises:
        ValueError: it is damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            structure = (file.metadata() or {}).get(_CONTENT)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if structure is None:
        return tensors
    kinds: dict[str, Callable[[Any], Any]] = {
        "tensor": tensors.__getitem__,
        "dict": lambda items: {key: whole(item) for key, item in items},
        "list": lambda items: [whole(item) for item in items],
        "tuple": lambda items: tuple(whole(item) for item in items),
    }

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            ((kind, inner),) = value.items()
            return kinds[kind](inner)
        return value

    try:
        return dict(whole(json.loads(structure)))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"its metadata are damaged ({error!r})") from error
