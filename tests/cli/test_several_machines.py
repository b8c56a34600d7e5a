"""The command of docs/long_runs.md for several machines: two launchers, as if each were on its own."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

from command import ROOT, SMALL

from argparser import parse_options

TEXT = (ROOT / "docs" / "long_runs.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"^```bash\n(torchrun .*?)^```$", TEXT, re.M | re.S)
WORDS = shlex.split(BLOCK.replace("\\\n", " "))


def test_the_documented_options_are_the_published_ones() -> None:
    opts = parse_options(WORDS[WORDS.index("run.py") + 1 :])
    machines, processes = (int(word.split("=")[1]) for word in WORDS[1:3])
    assert machines * processes * opts.batch_size == 24
    assert (opts.method, opts.steps, opts.epochs) == ("SATS", [0, 1, 2, 3, 4, 5], 30)


def test_two_launchers_train_one_run(tiny_data: Path, tmp_path: Path, interpreter: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        word.replace("host1:29500", f"127.0.0.1:{port}").replace("=4", "=1")
        for word in WORDS[1 : WORDS.index("run.py")]
    ]
    launcher.append("--local_addr=127.0.0.1")  # a container's own name may not resolve
    run = [
        *("--dataset", "shapes", "--data_root", str(tiny_data), *SMALL, "--task", "15-5", "--step", "0"),
        *("--lr", "0.01", "--logdir", str(tmp_path), "--name", "two"),
    ]
    processes = []
    for machine in range(2):
        with (tmp_path / f"output_{machine}").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [interpreter, "-m", "torch.distributed.run", *launcher, "run.py", *run],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its processes with it
    outputs = [(tmp_path / f"output_{machine}").read_text(encoding="utf-8") for machine in range(2)]
    assert codes == [0, 0], "\n".join(outputs)[-4000:]
    log = (tmp_path / "15-5-shapes_two" / "train.log").read_text(encoding="utf-8")
    assert "total batch 8" in log
    assert (tmp_path / "15-5-shapes_two" / "results_0.json").is_file()
