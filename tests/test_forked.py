"""The stand-in of Python that tests give to programs: like Python's process, but without its start."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
from pathlib import Path

print(sys.argv[1:], os.environ["WORD"], Path.cwd(), sys.executable, input())
print("error", file=sys.stderr)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)
sys.exit(7)
"""


def start(interpreter: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [interpreter, "-u", "program.py", *words], cwd=folder, env={"WORD": "given"}, text=True, **streams
    )


def test_it_passes_on_what_a_process_has(interpreter: Path, tmp_path: Path) -> None:
    process = start(interpreter, tmp_path, "a", "b c")
    assert process.communicate("typed\n") == (
        f"['a', 'b c'] given {tmp_path} {interpreter} typed\n",
        "error\n",
    )
    assert process.returncode == 7


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_it_ends_with_its_process(interpreter: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    process = start(interpreter, tmp_path, "wait")
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write("typed\n")
    process.stdin.flush()
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait() == code
    assert process.stderr.read() == "error\n"  # to its end: the forked process, which has it too, has ended
