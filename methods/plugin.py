"""Methods in a user's Python file: ``--method_file FILE.py`` (docs/methods.md has an example)."""

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
from utils.errors import UserError


def read_method_file(
    path: Path, taken: AbstractSet[str]
) -> tuple[list[type[Method]], dict[str, dict[str, Any]]]:
    """Run a user's Python file, register its classifiers and return its methods and presets.

    The file is executed: pass only a path that the user gave on the command line.

    Args:
        path: the file.
        taken: names of existing methods.

    Returns:
        Its subclasses of ``Method`` in file order, and its ``PRESETS``: options by ``--method`` name.

    Raises:
        UserError: the file is missing or fails, defines no method, or has an invalid method or preset.
    """
    from methods.classifiers import Classifier, add_classifier  # needs torch

    module = _run(path)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for classifier in classes:
        if issubclass(classifier, Classifier) and "name" in vars(classifier):
            try:
                add_classifier(classifier)
            except UserError as error:
                raise UserError(f"--method_file {path}: {error}") from error
    methods = [value for value in classes if issubclass(value, Method)]
    # A class without from_options that another one of the file extends is a base class.
    kinds = [
        kind
        for kind in methods
        if "from_options" in vars(kind) or not any(k is not kind and issubclass(k, kind) for k in methods)
    ]
    if not kinds:
        raise UserError(f"--method_file {path}: defines no subclass of methods.Method")
    for kind in kinds:
        if kind.__name__ in taken:
            raise UserError(f"--method_file {path}: method {kind.__name__} already exists; rename the class")
        check_class(kind)
    presets = getattr(module, "PRESETS", {})
    if not isinstance(presets, dict) or not all(isinstance(options, dict) for options in presets.values()):
        raise UserError(
            f"--method_file {path}: PRESETS must map names to options, e.g. {{'MINE': {{'unce': True}}}}"
        )
    return kinds, presets


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_method_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--method_file {path}: is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for the file's dataclasses and pickled objects
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) and error.lineno else lines[-1] if lines else 1
        reason = " ".join(str(error).split())
        raise UserError(f"--method_file {path}, line {line}: {type(error).__name__}: {reason}") from error
    return module
