"""The exemplar memory through the real command: its lists on disk, and what the log says of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch
from command import SMALL, Launch

from dataset import open_dataset
from dataset.image_labels import scan_image_labels
from dataset.protocols import task_indices
from dataset.shapes import SHAPE_CLASSES
from tasks import get_task


def test_lists_log_and_changed_choices(cli: Launch, tiny_data: Path, tmp_path: Path) -> None:
    common = (*SMALL, "--task", "10-5-5", "--overlap", "--logdir", tmp_path, "--name", "FT", "--lr", "0.01")
    trained = cli(*common, "--step", "all", "--memory", "8")
    assert trained.code == 0, trained.err
    run_dir = tmp_path / "10-5-5-shapes_FT"
    assert not (run_dir / "exemplars_0.json").exists(), "step 0 has no earlier images"

    task = get_task("shapes", "10-5-5")
    presence = scan_image_labels(open_dataset("shapes", tiny_data, "train").masks, progress=False)
    lists = [task_indices(task, step, "overlapped", presence) for step in range(3)]
    for step in (1, 2):
        content = (run_dir / f"exemplars_{step}.json").read_text(encoding="utf-8")
        pairs = json.loads(content)["exemplars"]
        assert len(pairs) == 8
        counts: Counter[str] = Counter()
        for index, stored in pairs:
            assert stored < step and index in lists[stored], "an image that an earlier step trained on"
            known = presence[index] & set(task.seen_classes(stored))
            counts.update(SHAPE_CLASSES[c] for c in known)
        logged = re.findall(r"8 exemplars: (.*)", trained.out)[step - 1]
        found = {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", logged)}
        assert found == {SHAPE_CLASSES[c]: counts[SHAPE_CLASSES[c]] for c in task.old_classes(step) if c}

    list_2 = run_dir / "exemplars_2.json"
    other = cli(*common, "--step", "2", "--memory", "6", "--random_seed", "7", "--fresh")
    assert other.code == 0, other.err
    assert f"{list_2}: was made from another memory, seed; it is made again" in other.out
    assert len(json.loads(list_2.read_text(encoding="utf-8"))["exemplars"]) == 6


def test_no_place_for_exemplars_is_told_before_step_0_is_trained(cli: Launch, tmp_path: Path) -> None:
    memory = ("--memory", "3", "--task", "15-5", "--step", "0", "1", "--logdir", tmp_path, "--name", "run")
    outcome = cli(*SMALL, "--batch_size", "1", "--fix_bn", *memory)
    assert outcome.code == 2
    assert "--batch_size 1 leaves no place for exemplars; use 2 or more" in outcome.last_error
    assert not [*tmp_path.rglob("*.pth")]


def test_classes_that_the_network_predicts(cli: Launch, tmp_path: Path) -> None:
    """The list says by which classes each image was chosen, and depends on the previous network and list."""
    common = (*SMALL, "--task", "10-5-5", "--overlap", "--lr", "0.001", "--logdir", tmp_path, "--name", "DKD")
    dkd = (*common, "--method", "DKD-M", "--memory", "8")
    trained = cli(*dkd, "--step", "all")
    assert trained.code == 0, trained.err
    run_dir = tmp_path / "10-5-5-shapes_DKD"
    contents = [json.loads((run_dir / f"exemplars_{step}.json").read_text("utf-8")) for step in (1, 2)]
    for old, content in zip((11, 16), contents, strict=True):
        assert len(content["exemplars"]) == 8
        assert all(set(classes) <= set(range(1, old)) for _, _, classes in content["exemplars"])
    assert [content["origin"]["network"] is None for content in contents] == [True, False]

    again = cli(*dkd, "--step", "2", "--fresh")
    assert again.code == 0 and f"exemplars: loaded from {run_dir / 'exemplars_2.json'}" in again.out
    retrained = cli(*dkd, "--step", "1", "2", "--lr", "0.002", "--fresh")
    assert retrained.code == 0 and "was made from another network; it is made again" in retrained.out
    (run_dir / "exemplars_1.json").unlink()
    outcome = cli(*dkd, "--step", "2", "--fresh")
    assert outcome.code == 2
    assert "exemplars_1.json: no exemplars of step 1" in outcome.last_error


def test_a_list_that_exists_gives_the_same_weights(cli: Launch, tmp_path: Path) -> None:
    """Choosing exemplars draws no random number that the new classifier would start from."""
    words = (*SMALL, "--task", "15-5", "--overlap", "--lr", "0.001", "--logdir", tmp_path, "--name", "STAR")
    star = (*words, "--method", "STAR-M", "--memory", "6")
    weights = []
    for step, more in (("all", ()), ("1", ("--fresh",))):
        outcome = cli(*star, "--step", step, *more)
        assert outcome.code == 0, outcome.err
        assert ("listing the classes" in outcome.out) == (step == "all")
        path = tmp_path / "15-5-shapes_STAR" / "15-5-shapes_STAR_1.pth"
        weights.append(torch.load(path, weights_only=True)["model_state"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
