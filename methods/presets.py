"""``--method`` names as sets of options (docs/methods.md); typed options override them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from utils.errors import UserError

FAMILY_PLOP = {"void_label": "ignore", "unseen_label": "background"}
_MEMORY_DKD = {"memory_choice": "predicted", "memory_labels": "new", "memory_batches": "joined"}


def _pod(factor: float, logits: float) -> dict[str, Any]:
    """PLOP's weights: of the stages' maps and of the small logits."""
    last = {"extra_channels": "sum", "factor": logits, "type": "local"}
    return {"pod_factor": factor, "pod_options": {"switch": {"after": last}}}


_PRESETS: dict[str, dict[str, Any]] = {
    "FT": {},
    "LWF": {"loss_kd": 100.0},
    "LWF-MC": {"icarl": True, "icarl_importance": 10.0},
    "ILT": {"loss_kd": 100.0, "loss_de": 100.0},
    "EWC": {"regularizer": "ewc", "reg_importance": 500.0},
    "RW": {"regularizer": "rw", "reg_importance": 100.0, "reg_iterations": 10},
    "PI": {"regularizer": "pi", "reg_importance": 500.0},
    "MIB": {"unce": True, "unkd": True, "loss_kd": 10.0, "init_balanced": True},
    "CIL": {"loss_CIL": 1.0},
    "SDR": {
        "loss_kd": 100.0,
        "unce": True,
        "unkd": True,
        "loss_de_prototypes": 1e-2,
        "loss_de_prototypes_sumafter": True,
        "loss_fc": 1e-3,
        "lfc_sep_clust": 1e-3,
        "loss_featspars": 1e-3,
        "lfs_normalization": "max_maskedforclass",
        "lfs_shrinkingfn": "exponential",
        "lfs_loss_fn_touse": "ratio",
    },
    "PLOP": {
        "pod": "local",
        **_pod(1e-2, 5e-4),
        "pod_logits": True,
        "pseudo": "entropy",
        "threshold": 1e-3,
        "classif_adaptive_factor": True,
        "init_balanced": True,
        **FAMILY_PLOP,
    },
    "SSUL": {"unknown": True, "threshold": 0.7, "memory": 0, **FAMILY_PLOP},
    "SSUL-M": {"extends": "SSUL", "memory": 100},
    "SATS": {
        "distill_object": "sats-selfattn",
        "distill_weight_args": 20.0,
        "pseudo": "entropy",
        "threshold": 1e-3,
        "classif_adaptive_factor": True,
        "unkd": True,
        "loss_kd": 20.0,
        "init_balanced": True,
        **FAMILY_PLOP,
    },
    "SATS-M": {"extends": "SATS", "memory": 100},
    "MIB+EWF": {"extends": "MIB", "ewf": True, "fix_pre_cls": True, "loss_kd": 10.0, **FAMILY_PLOP},
    "PLOP+EWF": {"extends": "PLOP", "ewf": True, "fix_pre_cls": True},
    "LGKD": {"extends": "PLOP", "lgkd": True},
    "MIB+NeST": {
        "extends": "MIB",
        "nest": True,
        "warm_epochs": 5,
        "warm_lr_scale": 1.0,
        "loss_kd": 10.0,
        **FAMILY_PLOP,
    },
    "PLOP+NeST": {
        "extends": "PLOP",
        "nest": True,
        "warm_epochs": 5,
        "warm_lr_scale": 1.0,
        "fix_pre_cls": True,
    },
    "DKD": {"dkd": True, "pos_weight": [2.0, 1.0], **FAMILY_PLOP},
    "DKD-M": {"extends": "DKD", "memory": 100, **_MEMORY_DKD},
    "STAR": {"star": True, "pos_weight": [4.0], **FAMILY_PLOP},
    "STAR-M": {"extends": "STAR", "memory": 50, **_MEMORY_DKD},
    "RCIL": {
        "two_branches": True,
        "loss_pckd": 1e-2,
        "loss_pckd_last": 5e-4,
        "unce": True,
        "unkd": True,
        "loss_kd": 100.0,
        "init_balanced": True,
        **FAMILY_PLOP,
    },
    "DFT": {"pre_allocate": True, "fix_backbone": True, "fix_pre_cls": True, **FAMILY_PLOP},
}

METHODS = list(_PRESETS)

_NEST_ADE = {"warm_epochs": 15, "warm_lr_scale": 500.0}
# Values for a data set and task: patterns of both (fnmatch), and the options; a later row wins. Task names
# are canonical: VOC's 15-1 is 15-5s; a letter at the end is another class order.
_VALUES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "MIB": [("*", "15-5s*", {"loss_kd": 100.0})],
    "PLOP": [("ade", "*", _pod(1e-3, 1e-5))],
    "SSUL-M": [("ade", "*", {"memory": 300})],
    "SATS-M": [("ade", "*", {"memory": 300})],
    "MIB+EWF": [("ade", task, {"loss_kd": 100.0}) for task in ("100-10*", "100-5")],
    "LGKD": [
        ("*", "19-1*", {"prev_kd": 5.0, "novel_kd": 0.5}),
        ("*", "15-5", {"prev_kd": 5.0, "novel_kd": 1.0}),
        ("*", "15-5s*", {"prev_kd": 1.0, "novel_kd": 0.0}),
        ("ade", "100-50*", {"prev_kd": 1.0, "novel_kd": 20.0}),
        ("ade", "100-10*", {"prev_kd": 1.0, "novel_kd": 1.0}),
        ("ade", "50", {"prev_kd": 2.0, "novel_kd": 10.0}),
        ("ade", "50[bc]", {"prev_kd": 2.0, "novel_kd": 10.0}),
    ],
    "MIB+NeST": [("ade", "*", _NEST_ADE)],
    "PLOP+NeST": [("ade", "*", {**_NEST_ADE, "fix_pre_cls": False})],
    "DKD": [("ade", "*", {"pos_weight": [35.0], "unseen_label": "ignore"})],
    "DKD-M": [("ade", "*", {"memory": 300})],
    "STAR": [("ade", "*", {"pos_weight": [30.0], "unseen_label": "ignore"})],
    "RCIL": [("ade", "*", {"loss_pckd": 5e-6, "loss_pckd_last": 5e-7})],
}

# Values in which the released programs differ from the papers.
_WHEN_RELEASED: dict[str, dict[str, Any]] = {
    "SATS": {"keep": "best"},
    "SSUL": {"keep": "best", "unseen_label": "ignore"},
    "RCIL": {"init_balanced": False},
}
_NO_EFFECT_WHEN_RELEASED = {"CIL": "loss_CIL is compared with 1 instead of being set to it"}


def preset_note(method: str, fidelity: str) -> str | None:
    """Message for the log about a preset that the released code does not apply (docs/fidelity.md)."""
    if fidelity != "released" or method not in _NO_EFFECT_WHEN_RELEASED:
        return None
    return (
        f"--method {method} --fidelity released sets nothing, as in the released code "
        f"({_NO_EFFECT_WHEN_RELEASED[method]}): this run is FT"
    )


def add_preset(name: str, options: Mapping[str, Any], *, source: Path) -> None:
    """Register a name for ``--method``.

    Args:
        name: the name, in any case.
        options: values by the options' names without dashes; ``extends`` names a preset whose options are
            the defaults, those for the data set, the task and the fidelity included.
        source: its file, for the message.

    Raises:
        UserError: the name exists, or there is no preset that it extends.
    """
    base = options.get("extends")
    by_lower = {known.lower(): known for known in METHODS}
    if base is not None and (not isinstance(base, str) or base.lower() not in by_lower):
        raise UserError(
            f"{source}: PRESETS['{name}'] extends {base!r}, which is no preset before it; "
            f"known are {', '.join(METHODS)}"
        )
    if name.lower() in by_lower:
        raise UserError(f"{source}: there is a --method {name} already; choose another name in PRESETS")
    _PRESETS[name] = dict(options) if base is None else {**options, "extends": by_lower[base.lower()]}
    METHODS.append(name)


def preset(method: str, *, dataset: str, task: str, fidelity: str = "paper") -> dict[str, Any]:
    """Options that ``--method`` sets.

    Args:
        method: one of ``METHODS``.
        dataset, task: some values depend on them; ``task`` is the canonical name.
        fidelity: "paper" or "released"; see ``preset_note``. "released" adds values in which the programs of
            SATS, SSUL and RCIL differ.
    """
    if preset_note(method, fidelity) is not None:
        return {}
    options = copy.deepcopy(_PRESETS[method])
    if (base := options.pop("extends", None)) is not None:
        options = {**preset(base, dataset=dataset, task=task, fidelity=fidelity), **options}
    for data_set, tasks, values in _VALUES.get(method, []):
        if fnmatchcase(dataset, data_set) and fnmatchcase(task, tasks):
            options |= copy.deepcopy(values)
    if fidelity == "released":
        options |= _WHEN_RELEASED.get(method, {})
    return options
