"""Real Gloo processes, started as torchrun starts them (rank, size and address in the environment)."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from forked import BOUND, ROOT, Fork, environments, free_port

from metrics.stream_metrics import StreamSegMetrics
from run import main
from utils import distributed
from utils.errors import UserError

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


def run_processes(size, code, folder=None, first_only=False, **environment):
    """Run the code in each of ``size`` processes; returns [(exit code, output)] by rank.

    ``first_only``: only that of the first, whose end is that of the others too.
    """
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary) / "script.py"
        script.write_text(textwrap.dedent(code))
        outputs = [Path(temporary) / f"output-{rank}" for rank in range(size)]
        places = [each | environment for each in environments(max(size, 2))[:size]]
        processes = [
            Fork([str(script)], place, output, folder=folder or ROOT)
            for place, output in zip(places, outputs, strict=True)
        ]
        try:
            codes = [process.wait() for process in (processes[:1] if first_only else processes)]
        finally:
            for process in processes:
                process.kill()
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=False)]


COLLECTIVES = """
import os
import re
import torch
from utils import distributed as d
world = d.start("CPU")
size = world.size
assert (world.backend, world.device.type, world.is_main) == ("gloo", "cpu", world.rank == 0)
everyone = sum(range(1, size + 1))
whole = torch.full((3,), world.rank + 1, dtype=torch.long)
assert d.all_reduce_sum(whole) is whole and whole.tolist() == [everyone] * 3
number = torch.tensor(0.5 * (world.rank + 1), dtype=torch.float64)
assert d.all_reduce_sum(number).item() == 0.5 * everyone
strided = torch.zeros(2, 3)
strided.t()[:] = world.rank + 1
d.all_reduce_sum(strided.t())
assert (strided == everyone).all()
assert d.gather_objects({"rank": world.rank}) == [{"rank": r} for r in range(size)]
assert d.broadcast_object([world.rank, "text"]) == [0, "text"]
assert d.any_rank(world.rank == size - 1) is True
assert d.any_rank(False) is False
d.barrier()
"""

CONFUSION = """
from run import main
from metrics.stream_metrics import StreamSegMetrics
data = torch.load("data.pt", weights_only=True)
bounds = [0, 6, 7, 7][:size] + [7]  # uneven, and the third process has no image at all
share = slice(bounds[world.rank], bounds[world.rank + 1])
metrics = StreamSegMetrics(21, world.device)
for _ in range(2):
    metrics.reset()
    for image, mask in zip(data["preds"][share], data["targets"][share]):
        metrics.update(image[None], mask[None])
    metrics.synchronise()
    metrics.synchronise()
assert torch.equal(metrics.confusion_matrix, data["expected"])
d.stop()
d.stop()
print("threads", torch.get_num_threads(), flush=True)
# Once in some dozen runs on a busy machine a thread of PyTorch's met the interpreter's end and aborted it
# (torch 2.14.1). How programs end is what tests/faults/test_ends.py is about.
os._exit(0)
"""


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_objects_and_confusion_of_uneven_shares(size, tmp_path):
    generator = torch.Generator().manual_seed(3)
    preds = torch.randint(21, (7, 9, 11), generator=generator)
    targets = torch.randint(22, (7, 9, 11), generator=generator)
    targets[targets == 21] = 255
    alone = StreamSegMetrics(21)
    alone.update(preds, targets)
    data = {"preds": preds, "targets": targets.to(torch.uint8), "expected": alone.confusion_matrix}
    torch.save(data, tmp_path / "data.pt")
    for returncode, output in run_processes(size, COLLECTIVES + CONFUSION, folder=tmp_path):
        assert returncode == 0, output
        assert output.endswith("threads 1\n")  # as OMP_NUM_THREADS says


@pytest.mark.parametrize(
    ("end", "said", "timeout"),
    [("os._exit(9)", "by peer", 1800), ("signal.pause()", "Timed out waiting", 10)],
)
def test_lost_and_silent_ranks_end_in_an_error(end, said, timeout, tmp_path):
    code = f"""
    import os, pathlib, signal, time, torch
    from utils import distributed as d
    pathlib.Path("ready" + os.environ["RANK"]).touch()
    while not all(pathlib.Path(f"ready{{rank}}").exists() for rank in range(2)):
        time.sleep(0.01)  # the timeout is meant for what comes now, not for Python's start
    world = d.start("CPU", timeout_s={timeout})
    d.barrier()  # else the first may still be on its way to the other
    if world.rank == 1:
        {end}
    d.all_reduce_sum(torch.ones(1))
    """
    # The first ends by itself: the silent one is ended afterwards.
    ((returncode, output),) = run_processes(2, code, folder=tmp_path, first_only=True)
    assert returncode == 1, output
    assert said in output


def test_missing_rank_is_a_user_error():
    code = """
    from utils import distributed as d
    from utils.errors import UserError
    try:
        d.start("CPU", timeout_s=3)
    except UserError as error:
        print(error)
    """
    ((returncode, output),) = run_processes(1, code, LOCAL_WORLD_SIZE="1")
    assert returncode == 0, output
    assert "rank 0 of 2 finds no process group at 127.0.0.1" in output


@pytest.mark.parametrize(("environment", "threads"), [({"OMP_NUM_THREADS": "1"}, 1), ({}, 3)])
def test_torchrun_starts_it(tmp_path, interpreter, environment, threads):
    """Without a number from the user torchrun says 1, on any number of cores."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch\n"
        "from utils import distributed as d\n"
        "d.available_cores = lambda: 6\n"
        "world = d.start('CPU')\n"
        "total = d.all_reduce_sum(torch.ones(()))\n"
        "line = f'total {int(total)} {torch.get_num_threads()}\\n'\n"
        "os.write(1, line.encode())\n"  # in one piece: both processes share the pipe
        "d.stop()\n"
    )
    # What the user has not set is read from the launcher's /proc, which a forked one has not of its own.
    python = interpreter if environment else sys.executable
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    base = {name: value for name, value in os.environ.items() if name not in (*LAUNCH, "OMP_NUM_THREADS")}
    done = subprocess.run(
        command, env={**base, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"total 2 {threads}\n") == 2


@pytest.mark.parametrize("where", [None, "CPU", "CPU_windows"])
def test_one_process_needs_no_group(where):
    world = distributed.start(where)
    try:
        assert (world.rank, world.local_rank, world.size, world.backend) == (0, 0, 1, None)
        assert world.is_main
        assert not torch.distributed.is_initialized()
        tensor = torch.arange(3)
        assert distributed.all_reduce_sum(tensor) is tensor
        assert distributed.gather_objects("a") == ["a"]
        assert distributed.broadcast_object("a") == "a"
        assert distributed.any_rank(True) and not distributed.any_rank(False)
        distributed.barrier()
    finally:
        distributed.stop()


def test_one_process_of_torchrun_needs_no_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.start("CPU").backend is None


def test_launch_rank(monkeypatch):
    assert distributed.launch_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert distributed.launch_rank() == 3


@pytest.mark.parametrize(
    ("where", "environment", "gpus", "message"),
    [
        ("GPU", {}, 0, "--where_to_sim GPU: unknown"),
        ("GPU_server", {}, 0, "no CUDA device.*--where_to_sim CPU"),
        ("CPU_windows", {"RANK": "0", "WORLD_SIZE": "2"}, 0, "one process, but 2"),
        ("GPU_windows", {"RANK": "0", "WORLD_SIZE": "2"}, 1, "one process, but 2"),
        (None, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1, "2 processes .* 1 GPU; .*=1"),
        (None, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 2, "4 processes .* 2 GPUs; .*=2"),
        ("CPU", {"RANK": "zero"}, 0, "RANK='zero' is not a number"),
        ("CPU", {"WORLD_SIZE": "2"}, 0, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_bad_launches(monkeypatch, where, environment, gpus, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message) as caught:
        distributed.start(where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("environment", "expected"), [({}, [4]), ({"OMP_NUM_THREADS": "1"}, [])])
def test_processes_share_the_cores_unless_the_user_sets_threads(monkeypatch, environment, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}  # two machines, two processes each
    for name, value in (launch | environment).items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(distributed, "available_cores", lambda: 9)
    with pytest.raises(UserError, match="MASTER_ADDR"):  # no group is wanted here
        distributed.start("CPU")
    assert calls == expected


@pytest.mark.parametrize(("cores", "expected"), [(2, [2]), (16, [])])
def test_one_process_takes_what_its_container_has(monkeypatch, cores, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(distributed, "available_cores", lambda: cores)
    distributed.start("CPU")
    assert calls == expected


def test_all_processes_agree_on_bfloat16():
    code = """
    from utils import distributed as d
    d.fast_bfloat16 = lambda device: os.environ["RANK"] != "1"
    print("bfloat16", d.start("CPU").bfloat16, flush=True)
    d.stop()
    os._exit(0)  # as above
    """
    for returncode, output in run_processes(2, f"import os\n{textwrap.dedent(code)}"):
        assert returncode == 0, output
        assert output.endswith("bfloat16 False\n")


WRONG_PLACES = [
    ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "GLOO_SOCKET_IFNAME='nosuch0' names no network .* unset it"),
    ({"GLOO_SOCKET_IFNAME": "lo,nosuch0"}, "GLOO_SOCKET_IFNAME='lo,nosuch0' names no network"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not a port; give a free one of 1 to 65535"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a port"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT='0' is not a port"),
    ({"MASTER_ADDR": "no such host"}, "MASTER_ADDR='no such host' is not the address of a machine"),
    ({"MASTER_ADDR": "a" * 64}, "MASTER_ADDR='a+' is not the address of a machine"),
    ({"RANK": "2"}, "RANK is 2 but WORLD_SIZE 2"),
    ({"WORLD_SIZE": "²"}, "WORLD_SIZE='²' is not a number"),
]


@pytest.mark.parametrize(("environment", "told"), WRONG_PLACES)
def test_a_wrong_rendezvous_address_is_reported_at_once(monkeypatch, capsys, environment, told):
    """By the first process of each machine, in one line and with exit code 2; the others say nothing."""
    monkeypatch.setattr(distributed, "_NAME_LOOKUPS", 1)
    for rank, lines in ((0, 1), (1, 0)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        for name, value in ({"RANK": str(rank), "LOCAL_RANK": str(rank)} | place | environment).items():
            monkeypatch.setenv(name, value)
        assert main(["--where_to_sim", "CPU", "--timeout", "3"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == lines
        assert lines == 0 or re.match(f"run.py: error: .*{told}", said)


def test_the_first_process_of_another_machine_tells_of_its_own_environment(monkeypatch, capsys):
    environment = {"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "GLOO_SOCKET_IFNAME": "nosuch0"}
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | environment).items():
        monkeypatch.setenv(name, value)
    assert main(["--where_to_sim", "CPU"]) == 2
    assert "GLOO_SOCKET_IFNAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        *[("eth", True), ("=eth0", True), ("eth0:5000", True), ("ib,eth1", True), ("^lo", True)],
        *[("ib", False), ("=eth", False), ("^lo,eth", False), ("^=lo,eth0,eth1", False)],
    ],
)
def test_interfaces_by_the_rule_of_nccl(monkeypatch, value, taken):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "eth1")])
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    distributed._check_interfaces("gloo")  # which does not read it
    if taken:
        distributed._check_interfaces("nccl")
        return
    with pytest.raises(UserError, match=r"NCCL_SOCKET_IFNAME.* has lo, eth0, eth1"):
        distributed._check_interfaces("nccl")


def test_a_network_without_an_address_is_bad_input(monkeypatch):
    """As Gloo tells it; the network is there, so that no look at the names finds it out."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    text = (
        "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth7"
    )
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME='eth7'"), distributed._interface_errors():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), distributed._interface_errors():
        raise RuntimeError("shapes differ")


def test_torchrun_with_a_wrong_interface_names_it(tmp_path, interpreter):
    run = subprocess.run(
        [
            *(interpreter, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"),
            *(f"--master_port={free_port()}", "run.py", "--where_to_sim", "CPU", "--logdir", str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "nosuch0"},
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    told = [line for line in run.stderr.splitlines() if line.startswith("run.py: ")]
    assert len(told) == 1 and told[0].startswith("run.py: error: environment variable GLOO_SOCKET_IFNAME=")
    assert re.search(r"exitcode\s*: 2\b", run.stderr)  # torchrun's own is 1 whatever its processes' are
