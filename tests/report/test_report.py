"""The report of finished, unfinished and damaged runs, with several seeds."""

import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image
from report_runs import exchange_classes, write_run

from report import comparison, figures, find_runs, main
from report.command import _common
from report.groups import Group, arrange, task_title
from report.page import _class_colours, write_report
from report.published import of_group, of_method
from report.reading import read_run
from report.tables import summary
from runs.options import deciding, write_run_options
from utils.errors import UserError
from utils.palette import palette


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, one with two seeds, joint training, and a run in step 1."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        write_run(folder, "MIB", seed)
    write_run(folder, "SDR", 1)
    write_run(folder, "ILT", 1, done=(0,), going_on=1)
    write_run(folder, "joint", 1, task="offline", done=(0,))
    return folder


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert main([str(runs), "--out", str(out)]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written(report: Path) -> None:
    stem = "voc_15-5_overlapped_deeplab-resnet101"
    figures = {path.stem.removeprefix(f"{stem}_") for path in report.glob(f"{stem}_*.png")}
    confusions = {f"confusion_{label}" for label in ("MIB", "SDR", "ILT", "joint")}
    assert (
        figures == {"bars", "forgetting", "classes", "losses", "cost", "picture_0", "picture_1"} | confusions
    )
    assert {path.name for path in report.glob("*.csv")} == {"steps.csv", "classes.csv", f"{stem}_summary.csv"}
    for path in report.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
    markdown = (report / "report.md").read_text()
    linked = re.findall(r"\]\((.*?)\)", markdown)
    assert len(linked) == len(figures) and all((report / name).is_file() for name in linked)


def test_seeds_are_averaged_and_shown_with_the_published_number(runs: Path, report: Path) -> None:
    results = [json.loads((runs / f"15-5-voc_MIB_{seed}/results_1.json").read_text()) for seed in (1, 2)]
    ours = [100 * content["miou_all"] for content in results]
    lines = [row for row in rows(next(report.glob("*_summary.csv"))) if row["method"] == "MIB"]
    assert {"MiB paper table", "PLOP author thesis"} <= {row["source"] for row in lines}
    for row in lines:
        assert row["runs"] == "2" and row["after step"] == "1"
        assert float(row["mIoU all mean"]) == pytest.approx(statistics.mean(ours))
        assert float(row["mIoU all std"]) == pytest.approx(statistics.stdev(ours))
    paper = next(row for row in lines if row["source"] == "MiB paper table")
    assert (paper["published first"], paper["published all"]) == ("75.5", "69.0")
    # The paper's means exclude the background, so the means compared with them do too.
    bare = [
        100 * statistics.mean(iou for name, iou in content["class_iou"].items() if name != "background")
        for content in results
    ]
    assert float(paper["mIoU all counted as published"]) == pytest.approx(statistics.mean(bare))
    difference = statistics.mean(bare) - 69.0
    assert float(paper["difference all"]) == pytest.approx(difference)
    assert paper["verdict"] == ("reproduced" if abs(difference) <= 1 else "not reproduced")
    thesis = next(row for row in lines if row["source"] == "PLOP author thesis")
    assert float(thesis["mIoU all counted as published"]) == pytest.approx(statistics.mean(ours))


def test_first_and_later_are_those_of_the_papers(tmp_path: Path) -> None:
    """After the last of several steps, first are the classes of step 0 and later those of all later steps."""
    folder = write_run(tmp_path, "MIB", 1, task="15-1", done=range(6), pictures=0)
    (group,) = arrange([read_run(folder)])
    assert group.task == "15-5s"  # the name of the published tables
    iou = list(json.loads((folder / "results_5.json").read_text())["class_iou"].values())
    (line,) = summary(group)
    means = {key: number.mean for key, number in line.numbers.items() if number is not None}
    expected = {"first": iou[:16], "later": iou[16:], "all": iou}
    assert means == pytest.approx({key: statistics.mean(values) for key, values in expected.items()})
    # Only runs with results of the last step are averaged, so that all columns are over the same runs.
    write_run(tmp_path, "MIB", 2, task="15-1", done=range(3), pictures=0)
    (group,) = arrange([read_run(path) for path in find_runs([tmp_path])])
    (line,) = summary(group)
    assert line.numbers["all"] is not None and line.numbers["all"].count == 1
    assert len(line.method.runs) == 2


def test_a_run_with_another_class_order_is_split_by_its_own(tmp_path: Path) -> None:
    """Classes 3 and 18 change places; published numbers are of the usual order."""
    plain = write_run(tmp_path, "MIB", 1, pictures=0)
    other = write_run(tmp_path, "MIB", 2, pictures=0, class_order_seed=5)
    change = {"class 3": "class 18", "class 18": "class 3"}
    for path in other.glob("results_*.json"):
        content = json.loads(path.read_text())
        for part in ("class_iou", "class_accuracy", "class_pixels", "indices", "forgetting"):
            content[part] = {change.get(name, name): value for name, value in content[part].items()}
        path.write_text(json.dumps(content))
    exchange_classes(other)
    (group,) = arrange([read_run(plain), read_run(other)])
    assert len(group.methods) == 2
    for method in group.methods:
        (run,) = method.runs
        iou = list(run.results[1]["class_iou"].values())
        assert group.means(run)["first"] == pytest.approx(statistics.mean(iou[:16]))
        assert group.means(run)["later"] == pytest.approx(statistics.mean(iou[16:]))
        assert bool(of_method(group, method)) == (run.folder == plain)


def test_runs_over_class_orders_are_taken_together(tmp_path: Path) -> None:
    """Two orders, one with two seeds: the mean over orders of the means over seeds."""
    for name, seed, order, miou in (("MIB", 1, None, 0.2), ("MIB", 2, None, 0.4), ("MIB", 3, 7, 0.6)):
        given = {} if order is None else {"class_order_seed": order}
        folder = write_run(tmp_path, name, seed, pictures=0, **given)
        if order is not None:
            exchange_classes(folder)
        names = json.loads((folder / "results_1.json").read_text())["class_iou"]
        _change(folder, 1, class_iou=dict.fromkeys(names, miou))
    write_run(tmp_path, "FT", 1, pictures=0)  # of one order
    assert main([str(tmp_path)]) == 0
    (row,) = rows(tmp_path / "report" / "voc_15-5_overlapped_deeplab-resnet101_orders.csv")
    assert (row["method"], row["orders"]) == ("MIB", "2")
    for key in ("first", "later", "all"):
        assert float(row[f"mIoU {key} mean"]) == pytest.approx(45)  # of 30 and 60
        assert float(row[f"mIoU {key} std"]) == pytest.approx(statistics.stdev([30, 60]))
    assert "Over class orders" in (tmp_path / "report" / "report.html").read_text()


def test_forgetting_is_against_the_step_that_learnt_the_class(runs: Path, report: Path) -> None:
    folder = runs / "15-5-voc_SDR_1"
    first, last = (json.loads((folder / f"results_{step}.json").read_text()) for step in (0, 1))
    forgotten = {
        row["class"]: float(row["forgotten"])
        for row in rows(report / "classes.csv")
        if row["run"] == folder.name and row["forgotten"]
    }
    expected = {
        name: 100 * (first["class_iou"][name] - last["class_iou"][name]) for name in first["class_iou"]
    }
    assert forgotten == pytest.approx(expected)


def test_joint_training_is_split_as_the_task_is(runs: Path) -> None:
    (group,) = arrange([read_run(path) for path in find_runs([runs])])
    iou = list(json.loads((runs / "offline-voc_joint_1/results_0.json").read_text())["class_iou"].values())
    line = next(line for line in summary(group) if line.method.joint)
    assert line.numbers["first"] is not None and line.numbers["later"] is not None
    assert line.numbers["first"].mean == pytest.approx(statistics.mean(iou[:16]))
    assert line.numbers["later"].mean == pytest.approx(statistics.mean(iou[16:]))
    assert {compared.row.method for compared in line.published} == {"joint"}


def test_joint_training_beside_several_class_orders_is_not_split(tmp_path: Path) -> None:
    write_run(tmp_path, "FT", 1, pictures=0)
    other = write_run(tmp_path, "FT", 2, pictures=0, class_order_seed=5)
    exchange_classes(other)
    path = other / "results_1.json"
    content = path.read_text()
    for old, new in (("class 3", "class -"), ("class 18", "class 3"), ("class -", "class 18")):
        content = content.replace(f'"{old}"', f'"{new}"')
    path.write_text(content)
    write_run(tmp_path, "joint", 1, task="offline", done=(0,), pictures=0)
    (group,) = arrange([read_run(path) for path in find_runs([tmp_path])])
    line = next(line for line in summary(group) if line.method.joint)
    assert line.numbers["first"] is None and line.numbers["later"] is None and line.numbers["all"] is not None


def test_joint_training_of_other_classes_is_a_table_of_its_own(tmp_path: Path) -> None:
    """A task file may call it joint, too."""
    for name, task in (("MIB", "15-5"), ("all", "offline"), ("few", "offline"), ("alone", "offline")):
        write_run(tmp_path, name, 1, task=task, done=(0,), pictures=0)
    few, alone = (read_run(tmp_path / f"offline-voc_{name}_1") for name in ("few", "alone"))
    write_run_options(few.folder, {**few.options, "task": "joint"}, [[0, 15, 8, 12]])
    write_run_options(alone.folder, {**alone.options, "backbone": "resnet50"}, alone.steps)
    groups = arrange([read_run(folder) for folder in find_runs([tmp_path])])
    assert {group.title: [method.label for method in group.methods] for group in groups} == {
        "VOC · 15-5 · overlapped · deeplab-resnet101": ["MIB", "all"],
        "VOC · all classes at once · deeplab-resnet50": ["alone"],
        "VOC · joint · deeplab-resnet101": ["few"],
    }
    assert len({group.slug for group in groups}) == 3


def test_an_unfinished_run_shows_its_progress(runs: Path, report: Path) -> None:
    state = read_run(runs / "15-5-voc_ILT_1").state()
    assert re.fullmatch(r"step 1, epoch 2 of 4, iteration 80, \d+ (s|min) ago", state)
    assert "step 1, epoch 2 of 4, iteration 80" in (report / "report.html").read_text()
    assert read_run(runs / "15-5-voc_SDR_1").state() == "finished"


def test_a_run_that_has_just_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, "MIB", 1, done=(), going_on=0)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{folder}: no results yet"
    write_run(tmp_path, "FT", 1, pictures=0)
    assert comparison(find_runs([tmp_path])).splitlines()[4:] == [f"{folder}: no results yet"]
    assert "no results yet" in (tmp_path / "report" / "report.html").read_text()


def test_a_run_with_results_alone(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder written before histories existed: task and name are taken from the folder's name."""
    folder = tmp_path / "15-5-voc_SDR_1"
    folder.mkdir()
    for path in (runs / folder.name).glob("results_*.json"):
        shutil.copy(path, folder)
    run = read_run(folder)
    assert (run.dataset, run.task, run.name, run.protocol, run.backbone) == (
        "voc",
        "15-5",
        "SDR_1",
        None,
        None,
    )
    assert main([str(folder)]) == 0
    assert f"report: {folder / 'report' / 'report.html'}" in capsys.readouterr().out
    assert {path.stem for path in (folder / "report").glob("*.png")} == {
        f"voc_15-5_{name}" for name in ("bars", "forgetting", "classes")
    }


def test_options_are_read_from_a_checkpoint_if_there_is_no_other_source(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "SDR", 3)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    (folder / f"{folder.name}_1.json").write_text(json.dumps({"epoch": 4, "manifest": facts}))
    run = read_run(folder)
    assert (run.protocol, run.backbone, run.options["random_seed"]) == ("overlapped", "deeplab-resnet101", 3)


def test_a_first_step_of_another_run_is_taken_over(tmp_path: Path) -> None:
    base = write_run(tmp_path, "FT", 1)
    later = write_run(tmp_path, "MIB", 1, done=(1,), step_ckpt="elsewhere/15-5-voc_FT_1/15-5-voc_FT_1_0.pth")
    run = read_run(later)
    assert run.taken_over == {0: base.name} and sorted(run.results) == [0, 1]
    learnt = json.loads((base / "results_0.json").read_text())["class_iou"]["class 3"]
    now = json.loads((later / "results_1.json").read_text())["class_iou"]["class 3"]
    assert run.forgetting("class 3") == pytest.approx(learnt - now)


def test_a_run_of_an_earlier_version_lacks_later_options(tmp_path: Path) -> None:
    options: list[dict[str, object]] = [{}, {"accumulate": 1, "compile": True}, {"accumulate": 4}]
    folders = [write_run(tmp_path, "FT", seed, pictures=0, **given) for seed, given in enumerate(options)]
    (group,) = arrange([read_run(folder) for folder in folders])
    assert sorted([run.name for run in method.runs] for method in group.methods) == [
        ["FT_0", "FT_1"],
        ["FT_2"],
    ]


def test_methods_of_one_name_are_distinguished_by_their_options(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "MIB", 1, loss_kd=10.0)]
    other = write_run(tmp_path / "other", "MIB", 2, loss_kd=100.0)
    (group,) = arrange([read_run(path) for path in [*folders, other]])
    assert {method.label for method in group.methods} == {"MIB (loss_kd=10.0)", "MIB (loss_kd=100.0)"}


def test_the_page_is_self_contained(report: Path) -> None:
    page = (report / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    write_run(tmp_path, "<b>&", 1, pictures=0)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_the_table_on_the_screen(runs: Path) -> None:
    text = comparison(find_runs([runs]))
    assert len(text.splitlines()) == 2 + 2 + 2 + 2 + 1 + 1
    assert re.search(r"15-5-voc_SDR_1 +1 ", text)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("report: error: ")
        assert captured.out.count("\n") in (0, 4)  # the table, whole or not at all
        return captured.err

    assert "LOGDIR" in error("--out", "x")
    assert "contains no results" in error(str(tmp_path))
    assert "no such folder" in error(str(tmp_path / "missing"))
    folder = write_run(tmp_path, "MIB", 1)
    (tmp_path / "file").write_text("")
    assert "is a file" in error(str(tmp_path / "file"))
    assert "file: is a file; give a folder with --out" in error(str(folder), "--out", str(tmp_path / "file"))
    assert "choose another --out" in error(str(folder), "--out", str(tmp_path / "file" / "report"))
    (folder / "samples" / "0_input.png").write_bytes(b"no picture")
    assert "0_input.png" in error(str(folder))
    (folder / "confusion_1.csv").write_text("a,b\nc,d\n")
    assert "confusion_1.csv" in error(str(folder))
    (folder / "results_1.json").write_text("{}")
    assert "results_1.json" in error(str(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read (Expecting property name"),
        ("{}", "lacks the options and steps of a run"),
        ("[]", "lacks the options and steps of a run"),
        ('{"options": "x", "steps": []}', "lacks the options and steps of a run"),
        ('{"options": {}, "steps": [3]}', "lacks the options and steps of a run"),
        ('{"options": {}, "steps": [["a"]]}', "lacks the options and steps of a run"),
    ],
)
def test_a_damaged_run_json_is_refused_before_the_table(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path, "MIB", 1, pictures=0)
    (folder / "run.json").write_text(content)
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"report: error: {folder / 'run.json'}: {said}")
    assert captured.err.endswith("; remove it\n")


def test_folders_without_a_common_parent_need_out(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [Path("/a/logs"), Path("/b/logs")]
    with pytest.raises(UserError, match="give --out"):
        _common(folders)
    assert _common([*folders[:1], Path("/a/other")]) == Path("/a").resolve()


# ── seeds and methods ────────────────────────────────────────────────────────────────────────────────


def methods(*folders: Path) -> dict[str, list[str]]:
    """Folder names of every method's runs, by label."""
    (group,) = arrange([read_run(folder) for folder in folders])
    return {method.label: [run.folder.name for run in method.runs] for method in group.methods}


def test_seeds_at_different_steps_are_one_method(tmp_path: Path) -> None:
    """Step 0 has other options, so that the options of the last start differ between these seeds."""
    first, later = {"epochs": 30}, {"epochs": 10, "loss_kd": 5.0}
    done = write_run(tmp_path, "MIB", 1, pictures=0, by_step={0: first, 1: later})
    begun = write_run(tmp_path, "MIB", 2, pictures=0, done=(0,), by_step={0: first})
    assert read_run(done).options["epochs"] != read_run(begun).options["epochs"]
    assert methods(begun, done) == {"MIB": ["15-5-voc_MIB_2", "15-5-voc_MIB_1"]}
    other = write_run(tmp_path, "MIB", 3, pictures=0, by_step={0: {"epochs": 20}, 1: later})
    assert methods(done, begun, other) == {
        "MIB (epochs=30 in step 0)": ["15-5-voc_MIB_1", "15-5-voc_MIB_2"],
        "MIB (epochs=20 in step 0)": ["15-5-voc_MIB_3"],
    }
    page = write_report([read_run(done)], tmp_path / "out").read_text()
    assert "epochs = 30 (step 0), 10 (step 1)" in page and "loss_kd = " in page


def test_methods_that_share_a_first_step_are_not_seeds_of_one_another(tmp_path: Path) -> None:
    alike = {0: {"method": "FT"}}
    one = write_run(tmp_path, "EWC", 1, pictures=0, done=(0,), by_step=alike)
    two = write_run(tmp_path, "RW", 2, pictures=0, done=(0,), by_step=alike)
    assert methods(one, two) == {"EWC": ["15-5-voc_EWC_1"], "RW": ["15-5-voc_RW_2"]}
    # Finished with the same options, they are one method: the name alone does not make another.
    for step in (0, 1):
        alike[step] = {"method": "FT"}
    one = write_run(tmp_path, "EWC", 1, pictures=0, by_step=alike)
    two = write_run(tmp_path, "RW", 2, pictures=0, by_step=alike)
    assert methods(one, two) == {"FT": ["15-5-voc_EWC_1", "15-5-voc_RW_2"]}


def test_first_steps_of_another_run_count(tmp_path: Path) -> None:
    folders = []
    for seed, epochs in ((1, 30), (2, 30), (3, 5)):
        base = write_run(tmp_path, "FT", seed, pictures=0, done=(0,), by_step={0: {"epochs": epochs}})
        path = str(base / f"{base.name}_0.pth")
        given: dict[str, object] = {"step_ckpt": path}
        folders.append(write_run(tmp_path, "MIB", seed, pictures=0, done=(1,), by_step={1: {}}, **given))
    assert sorted(len(names) for names in methods(*folders).values()) == [1, 2]


def test_a_later_command_without_step_ckpt_keeps_the_first_steps_of_another_run(tmp_path: Path) -> None:
    base = write_run(tmp_path, "FT", 1, task="10-5-5", dataset="shapes", done=(0,), pictures=0)
    first = {"step_ckpt": str(base / f"{base.name}_0.pth")}
    steps = {1: first, 2: {"lr": 0.005}}
    write_run(tmp_path, "MIB", 1, task="10-5-5", dataset="shapes", done=(1, 2), pictures=0, by_step=steps)
    run = read_run(tmp_path / "10-5-5-shapes_MIB_1")
    assert run.base == base and run.taken_over == {0: base.name} and [*run.results] == [0, 1, 2]


def test_sample_images_of_a_first_step_of_another_run(tmp_path: Path) -> None:
    base = write_run(tmp_path, "FT", 1, done=(0,))
    folder = write_run(tmp_path, "MIB", 1, done=(1,), step_ckpt=str(base / f"{base.name}_0.pth"))
    theirs, mine = (path / "samples" for path in (base, folder))
    shutil.copy(theirs / "0_input.png", mine)  # sample 1 is another photo
    samples = read_run(folder).samples
    assert samples[0].keys() == {"input", "truth", "step0", "step1"}
    assert samples[0]["step0"] == theirs / "0_step0.png" and samples[0]["truth"] == mine / "0_truth.png"
    assert samples[1].keys() == {"input", "truth", "step1"}


def test_the_best_method_comes_first_and_keeps_its_colour(tmp_path: Path) -> None:
    def group() -> Group:
        (found,) = arrange([read_run(path) for path in find_runs([tmp_path])])
        return found

    for method, miou in (("FT", 0.1), ("MIB", 0.3), ("PLOP", 0.2)):
        folder = write_run(tmp_path, method, 1, pictures=0)
        names = json.loads((folder / "results_1.json").read_text())["class_iou"]
        _change(folder, 1, class_iou=dict.fromkeys(names, miou))
    write_run(tmp_path, "joint", 1, task="offline", done=(0,), pictures=0)
    write_run(tmp_path, "ILT", 1, done=(0,), pictures=0)
    before = group()
    assert [method.label for method in before.methods] == ["MIB", "PLOP", "FT", "ILT", "joint"]
    _change(tmp_path / "15-5-voc_FT_1", 1, class_iou=dict.fromkeys(names, 0.5))
    assert [method.label for method in group().methods] == ["FT", "MIB", "PLOP", "ILT", "joint"]
    assert figures.styles(group()) == figures.styles(before)


def test_a_run_that_diverges_leaves_the_others_readable(tmp_path: Path) -> None:
    for method in ("FT", "SDR"):
        folder = write_run(tmp_path, method, 1, pictures=0)
    path = folder / "history_1.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    wild = next(line for line in lines if "losses" in line)
    wild["losses"] = dict.fromkeys(wild["losses"], 3e11)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = arrange([read_run(path) for path in find_runs([tmp_path])])
    figure, terms = figures.total_losses(group), figures.loss_terms(read_run(folder))
    assert figure is not None and terms is not None
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "symlog"]
    assert [axes.get_yscale() for axes in terms.axes] == ["linear", "symlog", "linear", "linear"]


def test_few_images_are_listed_and_many_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("report.command.write_report", lambda runs, out: out / "report.html")
    folder = write_run(tmp_path, "MIB", 1, pictures=0)
    shown = [folder / f"predictions_{step}.png" for step in range(2)]
    for path in shown:
        path.touch()
    assert main([str(tmp_path)]) == 0
    assert [f"image: {path}" for path in shown] == capsys.readouterr().out.splitlines()[-3:-1]
    for step in range(2, 30):
        (folder / f"predictions_{step}.png").touch()
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "image:" not in out and "images: 30," in out


def test_many_methods_have_their_images_in_bands(tmp_path: Path) -> None:
    labels = [f"M{number}" for number in range(figures.BESIDE + 1)]
    for label in labels:
        write_run(tmp_path, label, 1, pictures=1)
    (group,) = arrange([read_run(path) for path in find_runs([tmp_path])])
    figure = figures.sample_images(group, 0)
    assert figure is not None and len(figure.subfigs) == 2
    titles = [[axes.get_title() for axes in band.axes if axes.get_title()] for band in figure.subfigs]
    assert all({"input", "truth"} <= set(band) for band in titles)
    shown = [title for band in titles for title in band if title not in ("input", "truth")]
    assert shown == [method.label for method in group.methods]
    # Predictions after two steps for each method, and input and truth in each band.
    assert sum(bool(axes.images) for axes in figure.axes) == 2 * len(labels) + 4


def test_other_data_are_another_method(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "MIB", seed, pictures=0, **{name: value})
        for seed, (name, value) in enumerate(
            [("data_root", "data"), ("data_root", "./data/"), ("data_root", "subset"), ("splits_dir", "few")]
        )
    ]
    assert methods(*folders) == {
        "MIB (data_root=data, no splits_dir)": ["15-5-voc_MIB_0", "15-5-voc_MIB_1"],
        "MIB (data_root=subset, no splits_dir)": ["15-5-voc_MIB_2"],
        "MIB (data_root=data, splits_dir=few)": ["15-5-voc_MIB_3"],
    }
    assert "data_root" in deciding({}) and "num_workers" not in deciding({"num_workers": 3})


def test_a_repeated_seed_is_not_averaged(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / place, "MIB", seed, pictures=0) for place in ("a", "b") for seed in (1, 2)
    ]
    assert sorted(methods(*folders)) == ["MIB (a)", "MIB (b)"]
    again = write_run(tmp_path / "c", "MIB", 1, pictures=0, name="MIBagain_1")
    assert methods(*folders[:2], again) == {
        "MIB": ["15-5-voc_MIB_1", "15-5-voc_MIB_2"],
        "MIBagain": ["15-5-voc_MIB_1"],
    }
    same = [write_run(tmp_path / "d", "FT", number, pictures=0, random_seed=42) for number in (1, 2)]
    assert sorted(methods(*same)) == ["FT (15-5-voc_FT_1)", "FT (15-5-voc_FT_2)"]


def test_a_run_reached_by_two_paths_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "logs", "MIB", 1, pictures=0)
    monkeypatch.chdir(tmp_path)
    assert find_runs([Path("logs"), folder, tmp_path / "logs" / ".." / "logs"]) == [
        Path("logs/15-5-voc_MIB_1")
    ]


def test_results_evaluated_otherwise_are_not_averaged(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "MIB", seed, pictures=0) for seed in (1, 2, 3, 4)]
    otherwise = {"test_flip": True}, {"test_flip": False}, {"crop_size": 512}
    for folder, evaluation in zip(folders[1:], otherwise, strict=True):
        path = folder / "results_1.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "evaluation": evaluation}))
    assert methods(*folders) == {  # False is the default, typed or not
        "MIB": ["15-5-voc_MIB_1", "15-5-voc_MIB_3"],
        "MIB [test_flip=True]": ["15-5-voc_MIB_2"],
        "MIB [crop_size=512]": ["15-5-voc_MIB_4"],  # the default, but not that of the training
    }


@pytest.mark.parametrize(
    ("dataset", "task", "title"),
    [
        ("voc", "15-5s", "15-1 (15-5s)"),
        ("voc", "15-5s_b", "15-1_b (15-5s_b)"),
        ("voc", "10-10s", "10-10-1 (10-10s)"),
        ("voc", "10-1", "10-1"),
        ("ade", "100-10", "100-10"),
        ("folder", "3-2s", "3-2s"),
    ],
)
def test_tasks_are_titled_by_their_usual_names(dataset: str, task: str, title: str) -> None:
    assert task_title(dataset, task) == title


# ── files and figures ────────────────────────────────────────────────────────────────────────────────


def test_files_of_the_previous_report_are_removed(tmp_path: Path) -> None:
    out, folders = tmp_path / "out", [write_run(tmp_path / "logs", name, 1) for name in ("MIB", "SDR")]
    write_report([read_run(folder) for folder in folders], out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    stem = "voc_15-5_overlapped_deeplab-resnet101_confusion"
    assert {f"{stem}_MIB.png", f"{stem}_SDR.png", "run_15-5-voc_MIB_1_losses.png"} <= first.keys()
    (out / "mine.png").write_text("of the user")
    outside = tmp_path / "steps.csv"
    outside.write_text("of the user")
    with (out / "report_files.txt").open("a") as file:
        file.write("../steps.csv\nnotes.txt\n")
    (out / "notes.txt").write_text("of the user")
    write_report([read_run(folders[1])], out)
    left = {path.name for path in out.iterdir()}
    gone = {f"{stem}_MIB.png", "run_15-5-voc_MIB_1_losses.png"}
    assert left == first.keys() - gone | {"mine.png", "notes.txt"} and outside.is_file()
    assert (out / f"{stem}_SDR.png").read_bytes() == first[f"{stem}_SDR.png"]
    assert set((out / "report_files.txt").read_text().split()) == left - {
        "mine.png",
        "notes.txt",
        "report_files.txt",
    }


def test_runs_of_one_folder_name_have_separate_figures(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place, "MIB", 1, pictures=0) for place in ("a", "b")]
    write_report([read_run(folder) for folder in folders], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("run_*.png"))) == 2


def test_colours_of_classes_are_those_of_the_data_sets_ids(tmp_path: Path) -> None:
    """19-1b adds class 5 last: network index 20 is dataset class 5, index 5 is class 6."""
    folder = write_run(tmp_path, "MIB", 1, task="19-1b", pictures=0)
    (group,) = arrange([read_run(folder)])
    colours, known = dict(_class_colours(group)), palette()
    assert colours["class 20"] == "#" + bytes(known[5]).hex()
    assert colours["class 5"] == "#" + bytes(known[6]).hex()
    assert colours["class 4"] == "#" + bytes(known[4]).hex() and len(colours) == 20


def _change(folder: Path, step: int, **numbers: object) -> None:
    path = folder / f"results_{step}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **numbers}))


def test_curves_stay_within_0_and_100(tmp_path: Path) -> None:
    for seed, miou in ((1, 0.0), (2, 0.3)):
        folder = write_run(tmp_path, "MIB", seed, task="15-1", done=range(3), pictures=0)
        for step in range(3):
            names = json.loads((folder / f"results_{step}.json").read_text())["class_iou"]
            _change(folder, step, class_iou=dict.fromkeys(names, miou))
    (group,) = arrange([read_run(path) for path in find_runs([tmp_path])])
    figure = figures.curves(group)
    assert figure is not None
    for axes, steps in zip(figure.axes, ([0, 1, 2], [1, 2], [0, 1, 2]), strict=True):
        (band,) = axes.collections
        assert band.get_paths()[0].vertices[:, 1].min() == 0.0  # not 15 − 21
        assert axes.lines[0].get_xdata().tolist() == steps  # step 0 has no later classes
        assert axes.lines[0].get_ydata().tolist() == pytest.approx([15.0] * len(steps))
    assert figure.legends[0].handlelength >= 3


def test_a_task_of_two_steps_has_bars(tmp_path: Path, runs: Path) -> None:
    (group,) = arrange([read_run(path) for path in find_runs([runs])])
    figure = figures.bars(group)
    assert figure is not None
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert sorted(labels) == ["MIB", "SDR", "joint"]  # ILT has no results of step 1 yet
    lines = {line.method.label: line for line in summary(group)}
    for axes, key in zip(figure.axes, ("first", "later", "all"), strict=True):
        widths = [patch.get_width() for patch in axes.patches]
        means = [number.mean for name in labels if (number := lines[name].numbers[key]) is not None]
        assert widths == pytest.approx([100 * mean for mean in means])


def test_what_was_never_learnt_is_not_shown_as_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "MIB", 1, pictures=0)
    iou = json.loads((folder / "results_0.json").read_text())["class_iou"]
    _change(folder, 0, class_iou={**iou, "class 3": 0.005, "class 4": 0.5})
    later = json.loads((folder / "results_1.json").read_text())["class_iou"]
    _change(folder, 1, class_iou={**later, "class 3": 0.0, "class 4": 0.5})
    (group,) = arrange([read_run(folder)])
    figure = figures.forgetting_map(group)
    assert figure is not None
    axes, bar = figure.axes
    shown = axes.get_images()[0].get_array()
    assert bool(shown.mask[0, 3]) and shown[0, 4] == 0.0
    (cell,) = axes.patches
    assert cell.get_hatch() and (cell.get_x(), cell.get_y()) == (2.5, -0.5)
    assert "never learnt" in figure.legends[0].get_texts()[0].get_text()
    assert "points" in bar.get_ylabel()
    low, high = axes.get_images()[0].get_clim()
    values = shown.compressed()
    assert low <= min(values) and max(values) <= high < max(values) + 5


# ── published results ────────────────────────────────────────────────────────────────────────────────


def test_published_numbers_are_of_the_same_backbone_and_protocol_only(tmp_path: Path) -> None:
    for backbone, found in (("resnet101", True), ("mobilenet_v2", False)):
        folder = write_run(tmp_path / backbone, "SDR", 1, backbone=backbone, pictures=0)
        (group,) = arrange([read_run(folder)])
        assert bool(of_group(group)) is found
        assert (69.9 in [row.miou_all for row in of_method(group, group.methods[0])]) is found


def test_a_memory_makes_the_published_method_another(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "SSUL", 1, memory=100, pictures=0)
    (group,) = arrange([read_run(folder)])
    assert {row.method for row in of_method(group, group.methods[0])} == {"SSUL-M"}
