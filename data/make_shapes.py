"""Draw the generated data set of `--dataset shapes`.

    python data/make_shapes.py --out data/shapes [--train 600 --val 150 --size 128 --seed 0]

The folder has VOC's layout; pass it, or its parent folder, as `--data_root`. Takes seconds.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

import utils.command  # first: it handles Ctrl-C during the other imports
from dataset.shapes import ShapesConfig, make_shapes
from utils.option_types import Parser, path_option, positive_int, seed, whole


def main() -> int:
    """Run the command; returns the exit code."""
    return utils.command.run_command("make_shapes.py", _draw)


def _draw() -> None:
    defaults = ShapesConfig()
    parser = Parser(
        prog="python data/make_shapes.py", description="Draw the generated data set of --dataset shapes."
    )
    parser.add_argument("--out", type=path_option, required=True, help="folder to create")
    parser.add_argument(
        "--train", type=positive_int, default=defaults.train, help="training images (%(default)s)"
    )
    parser.add_argument(
        "--val", type=positive_int, default=defaults.val, help="validation images (%(default)s)"
    )
    parser.add_argument(
        "--size",
        type=whole(16, 16384),
        default=defaults.size,
        help="side in pixels (%(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=defaults.seed, help="random seed (%(default)s)")
    start = time.perf_counter()
    args = parser.parse_args()
    make_shapes(args.out, ShapesConfig(args.train, args.val, args.size, args.seed), os.cpu_count() or 1)
    seconds = time.perf_counter() - start
    print(f"{args.out}: {args.train} training and {args.val} validation images, {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
