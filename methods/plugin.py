"""Methods in a Python file of one's own: ``--method_file FILE.py`` (docs/methods.md has an example)."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import ModuleType
from typing import Any

from methods.base import Method
from methods.checks import check_class
from modules.classifiers import Classifier, add_classifier
from utils.errors import UserError


def read_method_file(
    path: Path, taken: AbstractSet[str]
) -> tuple[list[type[Method]], dict[str, dict[str, Any]]]:
    """Run a Python file, make its kinds of classifiers known and return the methods that it defines.

    Only a file that the user names on the command line may be given: whatever stands in it is run.

    Args:
        path: the file.
        taken: names of methods that cannot be used again.

    Returns:
        Its subclasses of ``Method`` in the order of the file, and its ``PRESETS``: options by the name for
        ``--method``.

    Raises:
        UserError: the file is missing or fails, defines no method, or a method or presets that do not fit.
    """
    module = _run(path)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for classifier in own:
        if issubclass(classifier, Classifier) and "name" in vars(classifier):
            try:
                add_classifier(classifier)
            except UserError as error:
                raise UserError(f"--method_file {path}: {error}") from error
    kinds = [value for value in own if issubclass(value, Method)]
    # What others of the file extend and what cannot be built by itself is a base class.
    kinds = [
        kind
        for kind in kinds
        if "from_options" in vars(kind) or not any(k is not kind and issubclass(k, kind) for k in kinds)
    ]
    if not kinds:
        raise UserError(f"--method_file {path}: defines no subclass of methods.Method")
    for kind in kinds:
        if kind.__name__ in taken:
            raise UserError(
                f"--method_file {path}: there is a method {kind.__name__} already; rename the class"
            )
        check_class(kind)
    presets = getattr(module, "PRESETS", {})
    if not isinstance(presets, dict) or not all(isinstance(options, dict) for options in presets.values()):
        raise UserError(
            f"--method_file {path}: PRESETS must be options by name, e.g. {{'MINE': {{'unce': True}}}}"
        )
    return kinds, presets


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_method_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--method_file {path}: is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickled objects of the file look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        reason = " ".join(str(error).split())
        raise UserError(f"--method_file {path}, line {line}: {type(error).__name__}: {reason}") from error
    return module
