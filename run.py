"""Train, test and predict: continual semantic segmentation.

One process:        python run.py --dataset voc --task 15-5 --overlap --step 0 1 --lr 0.01 0.001 --method MIB
Several processes:  torchrun --nproc_per_node=2 run.py ...           (NCCL on CUDA, Gloo on the CPU)
                    python -m torch.distributed.launch --nproc_per_node=2 run.py ...
All steps:          --step all
Test a checkpoint:  --test [--ckpt FILE]
Predict images:     --predict PATH --out DIR --ckpt FILE
Check the data:     --check_data

``--batch_size`` is per process. Exit codes: 0: done; 1: fault of the program or the machine; 2: bad input,
with one line that names the remedy; 75: stopped by a signal (SIGTERM, SIGUSR1, Ctrl-C) after saving, the same
command resumes; 130: Ctrl-C with nothing to save, or a second Ctrl-C (docs/long_runs.md).
"""

from __future__ import annotations

import sys
import traceback

import utils.command  # first: handles Ctrl-C during the other imports
from argparser import Options, parse_options
from utils import distributed
from utils.errors import DataError, UserError
from utils.hub import local_file
from utils.signals import EXIT_STOPPED, Stopped


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run it and return the exit code."""
    rank = distributed.launch_rank()
    others_lost = True  # the default also holds for unexpected exceptions
    try:
        opts = parse_options(argv)
        try:
            code = run(opts)
        except SystemExit as error:  # whose exit code could be 0
            file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"{file}, line {line}: ends the program; raise an error instead") from error
        others_lost = False
        return code
    except UserError as error:
        # Every process raises the error of a wrong option, but only one that of a broken file that it reads,
        # and perhaps that of a method that ends it.
        others_lost = isinstance(error, DataError) or isinstance(error.__cause__, SystemExit)
        if distributed.prints_shared_errors() or others_lost:
            print(f"run.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        others_lost = False
        if rank == 0:
            print(f"run.py: {stopped}", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except RuntimeError as error:
        fault = distributed.as_fault(error)
        if fault is None:
            raise
        print(f"run.py: fault: rank {rank}: {fault}", file=sys.stderr, flush=True)
        return 1
    finally:
        distributed.stop(others_lost)


def run(opts: Options) -> int:
    """Check the data, predict images, or train or test the steps."""
    # Imported here so that --help and wrong options respond at once.
    if opts.check_data:
        from dataset.check import check_data

        return check_data(opts)
    for path in (opts.ckpt, opts.step_ckpt, opts.pretrained_path):
        if path is not None:
            local_file(path)  # the hub's files are downloaded before anything is loaded or written
    world = distributed.start(opts.where_to_sim, opts.local_rank, opts.timeout)
    if opts.predict is not None:
        from inference.images import predict

        return predict(opts, world)
    from session import Session

    with Session(opts, world) as session:
        for step, lr in zip(opts.steps, opts.lrs, strict=True):
            if opts.test:
                session.test(step)
            else:
                session.train(step, lr)
    return 0


if __name__ == "__main__":
    sys.exit(utils.command.run_command("run.py", main))
