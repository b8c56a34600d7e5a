"""Names of a run's files: the published ones, and which step a file belongs to."""

from pathlib import Path

from runs.files import CHECKPOINT, EXEMPLARS, MANIFEST, RESULTS, run_folder, step_file, step_files


def test_published_name():
    path = step_file(run_folder(Path("logs/19-1"), "19-1", "voc", "FT"), CHECKPOINT, 0)
    assert path == Path("logs/19-1/19-1-voc_FT/19-1-voc_FT_0.pth")


def test_files_are_found_by_their_step(tmp_path: Path):
    folder = tmp_path / "15-5-voc_A+B_1"  # the name has signs that mean something in a pattern
    folder.mkdir()
    for step in (10, 9, 0):
        for kind in (RESULTS, CHECKPOINT, MANIFEST):
            step_file(folder, kind, step).touch()
    for name in ("results_x.json", "results_1.json.tmp", "15-5-voc_AAB_1_2.pth", "15-5-voc_A+B_1_old_3.pth"):
        (folder / name).touch()
    for kind in (RESULTS, CHECKPOINT, MANIFEST):
        assert list(step_files(folder, kind)) == [0, 9, 10]
    assert step_files(folder, MANIFEST)[9].name == "15-5-voc_A+B_1_9.json"
    assert step_files(folder, EXEMPLARS) == {}
