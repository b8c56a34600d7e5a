"""Learn the classes of a task step by step.

One process:        python run.py --dataset voc --task 15-5 --overlap --step 0 1 --lr 0.01 0.001 --method MIB
Several processes:  torchrun --nproc_per_node=2 run.py ...           (NCCL on CUDA, Gloo on the CPU)
                    python -m torch.distributed.launch --nproc_per_node=2 run.py ...
All steps:          --step all
A checkpoint:       --test [--ckpt FILE]
The data set:       --check_data

``--batch_size`` is per process. Exit code 0: done; 1: a fault of the program or the machine; 2: bad input,
with one line that says what to change.
"""

from __future__ import annotations

import sys

from argparser import Options, parse_options
from utils import distributed
from utils.errors import DataError, UserError


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for and return the exit code."""
    rank = distributed.launch_rank()
    try:
        opts = parse_options(argv)
        return run(opts)
    except UserError as error:
        # Every process meets the same wrong option, only one meets the broken file that it reads.
        if rank == 0 or isinstance(error, DataError):
            print(f"run.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.stop()


def run(opts: Options) -> int:
    """Check the data, or train or test every step that the options name."""
    # Imported here so that --help and a wrong option answer at once.
    if opts.check_data:
        from dataset.check import check_data

        return check_data(opts)
    from session import Session

    world = distributed.start(opts.where_to_sim, opts.local_rank)
    session = Session(opts, world)
    for step, lr in zip(opts.steps, opts.lrs, strict=True):
        if opts.test:
            session.test(step)
        else:
            session.train(step, lr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
