"""Output and Ctrl-C of every program, in real processes."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import write_run
from small_checkpoint import save_untrained

from utils.command import run_command
from utils.errors import Fault, UserError

ROOT = Path(__file__).resolve().parents[2]
GUARD = 120  # seconds; only against hanging
NOT_OURS = ("build", "docs", "logs", "tests")


def programs() -> list[list[str]]:
    """The words after ``python`` of everything in the repository that can be started."""
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *(p for folder in ROOT.glob("[!.]*/") if folder.name not in NOT_OURS for p in folder.rglob("*.py")),
    ]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.name != "__main__.py" and '\nif __name__ == "__main__":' not in path.read_text("utf-8"):
            continue
        if parts[0] in ("run", "data"):
            found.append([str(path.relative_to(ROOT))])
        else:
            found.append(["-m", ".".join(parts).removesuffix(".__main__")])
    return sorted(found)


def start(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    def own_signals() -> None:  # tests that run in the background of a shell ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-u", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
        preexec_fn=own_signals,
    )


def interrupt(process: subprocess.Popen[str], when: Callable[[], object]) -> tuple[int, list[str]]:
    """Press Ctrl-C once something is so: the signal goes to all processes of the terminal."""
    end = time.monotonic() + GUARD
    while not when() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=GUARD)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, [line for line in err.replace("\r", "\n").splitlines() if line]


def test_every_program_goes_through_run_command() -> None:
    found = programs()
    assert len(found) >= 10
    for words in found:
        name = words[-1].removesuffix(".py").replace(".", "/") + ".py"
        path = ROOT / name
        files = [path] if path.is_file() else path.with_suffix("").glob("*.py")
        assert any("run_command(" in file.read_text("utf-8") for file in files), words


@pytest.mark.parametrize("words", programs(), ids=" ".join)
def test_ctrl_c_while_a_program_is_imported(words: list[str], tmp_path: Path) -> None:
    if words[-1] in ("scripts.experiment", "benchmarks.gpu_pack"):
        pytest.skip("imports nothing that takes long")
    reached = tmp_path / "reached"
    for package in ("torch", "matplotlib", "PIL"):
        # A file object would end right after the file appears: Python ignores an interrupt in a destructor.
        slow = f"import os, time\nos.close(os.open({str(reached)!r}, os.O_CREAT))\ntime.sleep({GUARD})\n"
        (tmp_path / f"{package}.py").write_text(slow)
    process = start(*words, PYTHONPATH=str(tmp_path))
    code, lines = interrupt(process, reached.is_file)
    # run.py imports torch after it has read the options, within its main function.
    assert (code, lines) == (130, ["run.py: interrupted" if words == ["run.py"] else "interrupted"])


@pytest.mark.parametrize("words", programs(), ids=" ".join)
def test_packages_that_are_not_installed_are_one_line(words: list[str]) -> None:
    """Without the environment, or without having activated it."""
    if words[-1] == "benchmarks.gpu_pack":
        pytest.skip("imports no package")
    done = subprocess.run(
        [sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, timeout=GUARD
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.search(r"error: the package \w+ is not installed for \S+; activate the environment", line)


def test_a_part_of_a_package_that_is_missing_keeps_its_traceback() -> None:
    def body() -> None:
        importlib.import_module("numpy.nosuchpart")

    with pytest.raises(ModuleNotFoundError):
        run_command("name", body)


def test_ctrl_c_while_data_is_drawn_and_checked(tmp_path: Path) -> None:
    process = start("data/make_shapes.py", "--out", tmp_path / "out", "--train", "100000")
    code, lines = interrupt(process, lambda: [*tmp_path.glob(".out-*/JPEGImages/*.jpg")])
    assert (code, lines) == (130, ["make_shapes.py: interrupted"])
    assert not [*tmp_path.iterdir()], "complete or not at all"


def test_ctrl_c_during_a_check_and_predictions(shapes_root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for kind, folder in (("images", "JPEGImages"), ("masks", "SegmentationClassAug")):
        file = sorted((shapes_root / folder).iterdir())[0]
        (data / kind / "train").mkdir(parents=True)
        (data / kind / "val").symlink_to("train")
        for number in range(800):
            (data / kind / "train" / f"{number}{file.suffix}").symlink_to(file)
    (data / "classes.txt").write_text("".join(f"{number}\n" for number in range(21)))
    options = ("--dataset", "folder", "--data_root", data, "--task", "15-5")
    process = start("run.py", "--check_data", *options)
    seen = b""

    def drawn_twice() -> bool:
        nonlocal seen
        seen += os.read(process.stderr.fileno(), 4096)  # of the progress bar
        return seen.count(b"\r") >= 2

    code, lines = interrupt(process, drawn_twice)
    assert code == 130 and lines[-1] == "run.py: interrupted", lines
    assert all("checking" in line for line in lines[:-1]), lines

    save_untrained(tmp_path / "step.pth")
    out = tmp_path / "masks"
    where = ("--ckpt", tmp_path / "step.pth", "--out", out)
    process = start("run.py", "--predict", data / "images" / "val", *where)
    code, lines = interrupt(process, lambda: [*out.rglob("*.png")])
    assert (code, lines) == (130, ["run.py: interrupted"])


def bash(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD,
        env={**os.environ, **environment},
    )


def test_a_report_is_written_whatever_becomes_of_its_output(tmp_path: Path) -> None:
    write_run(tmp_path, "MIB", 1, pictures=0)
    strange = tmp_path / os.fsdecode(b"15-5-voc_\xc3\xa9\xff")
    shutil.copytree(tmp_path / "15-5-voc_MIB_1", strange)
    page = tmp_path / "out" / "report.html"
    command = f"python -m report {tmp_path} --out {tmp_path}/out"
    done = bash(f"{command} | (exec <&-; sleep 0.1); exit ${{PIPESTATUS[0]}}")  # nobody reads
    assert (done.returncode, done.stderr) == (0, "")
    assert page.is_file()
    page.unlink()
    done = bash(command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and page.is_file(), done.stderr
    assert re.search(r"^15-5-voc_\?\? .* \? ", done.stdout, re.MULTILINE), "a name and a dash become ?"


@pytest.mark.parametrize(
    ("redirect", "out", "err"),
    [
        (">&-", "", ""),
        (">/dev/full", "", "stdout cannot be written (No space left on device); continuing without it\n"),
        ("| (exec <&-; sleep 0.1)", "", ""),
        ("2>/dev/full | cat", "?" * 50 + "\n", ""),
    ],
)
def test_printing_never_ends_a_program(redirect: str, out: str, err: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from utils.command import run_command\n"
        "def body():\n"
        "    time.sleep(0.3)\n"  # the reader is gone by then
        "    print('\\udcff' * 50)\n"
        "    if sys.argv[1:]: print('lost', file=sys.stderr, flush=True)\n"
        "    return 3\n"
        "sys.exit(run_command('program', body))\n"
    )
    word = "error" if redirect.startswith("2") else ""
    done = bash(f"python {program} {word} {redirect}; exit ${{PIPESTATUS[0]}}", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (3, out, err)


def test_the_table_is_shown_where_the_page_cannot_be_written(tmp_path: Path) -> None:
    write_run(tmp_path, "MIB", 1, pictures=0)
    (tmp_path / "out").write_text("a file")
    done = bash(f"python -m report {tmp_path} --out {tmp_path}/out")
    assert done.returncode == 2 and "15-5-voc_MIB_1" in done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("report: error:")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Callable[[], object]:
        def body() -> object:
            raise error

        return body

    assert run_command("name", lambda: 3) == 3
    assert run_command("name", lambda: ["rows"]) == 0
    assert run_command("name", fails(UserError("bad"))) == 2
    assert run_command("name", fails(Fault("lost"))) == 1
    assert run_command("name", fails(KeyboardInterrupt())) == 130
    said = ["name: error: bad", "name: fault: lost", "name: interrupted"]
    assert capsys.readouterr().err.splitlines() == said
