#!/usr/bin/env python3
"""What ``scripts/slurm/requeue.slurm`` needs of Slurm: srun that signals its tasks, scontrol that requeues.

Called as ``srun`` or ``scontrol`` through links of these names. STAND_IN is a folder: ``requeued`` appears
there when the job asks to be requeued, ``tasks.txt`` holds what the tasks print. STAND_IN_PATTERN: when a
task has printed it, SIGUSR1 goes to every task, as Slurm's
``--signal=USR1@180`` sends it; only at the first start.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN"])


def srun(words: list[str]) -> int:
    command = words[next(i for i, word in enumerate(words) if not word.startswith("-")) :]
    output = FOLDER / "tasks.txt"
    with output.open("ab") as file:
        tasks = [
            subprocess.Popen(
                command,
                env={**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for task in range(int(os.environ["SLURM_NTASKS"]))
        ]
    told = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    while any(task.poll() is None for task in tasks):
        if not told and re.search(os.environ["STAND_IN_PATTERN"], output.read_text(errors="replace")):
            told = True
            for task in tasks:
                task.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    return max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks))


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1")
    elif words[0] == "requeue":
        (FOLDER / "requeued").write_text(words[1])
    else:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))
