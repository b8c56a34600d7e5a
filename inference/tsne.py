"""t-SNE plot of a network's features, coloured by class.

    python -m inference.tsne --ckpt FILE [--images 200 --per_class 100 --layer pre_logits --out FILE.png]

Features are sampled at random positions of the run's evaluation images, up to ``--per_class`` of each class.
PCA reduces them to 50 dimensions, t-SNE (van der Maaten and Hinton, "Visualizing data using t-SNE", JMLR
2008) to two. Writes the plot as PNG and a CSV file with one line per point. Options of ``run.py``
(``--data_root``, ``--where_to_sim``, ...) are accepted and override the checkpoint's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from argparser import Options, parse_options
from dataset.incremental import Substitute
from dataset.loaders import choose_samples
from dataset.step_data import DataSpec, EvaluationData, evaluation_data
from inference.load import TrainedNetwork, model_from_checkpoint
from inference.multiscale import pad_to
from train import Precision, to_device
from utils import distributed
from utils.command import run_command
from utils.distributed import World
from utils.drawing import drawable, new_figure, render
from utils.errors import UserError
from utils.files import atomic_write, atomic_write_text
from utils.hub import local_file
from utils.labels import VOID
from utils.logger import progress, setup_logging
from utils.option_types import Parser, path_option, positive_int, seed
from utils.palette import palette
from utils.tables import csv_text

LAYERS = ("pre_logits", "body")
Array = np.ndarray[Any, np.dtype[Any]]

_PER_IMAGE = 20  # most positions of a class in one image, so that points show classes rather than objects
_PCA = 50  # input dimensions of t-SNE, as its authors advise
_REMEDY = "free some space or choose another --out"
_LEGEND_LINES = 38

log = logging.getLogger(__name__)


@dataclass
class Features:
    """Features at labelled positions.

    Attributes:
        vectors: N×D, float32.
        classes: N network indices.
        places: N×3: index in the list of evaluation images, row and column on the feature map.
    """

    vectors: Array
    classes: Array
    places: Array


@dataclass
class Reservoir:
    """A uniform sample of bounded size of the positions of each class, from a stream of images.

    Every position gets a random key; the positions with the smallest keys are kept.
    """

    size: int
    rng: np.random.Generator
    kept: dict[int, list[tuple[float, Array, tuple[int, int, int]]]] = field(default_factory=dict)

    def add(self, image: int, features: Tensor, labels: Tensor) -> None:
        """Sample from the positions of an image.

        Args:
            image: its index in the list of evaluation images.
            features: D×h×w, float32.
            labels: h×w, network indices; 255 is void.
        """
        for class_index in np.unique(labels.numpy()).tolist():
            if class_index == VOID:
                continue
            places = torch.nonzero(labels == class_index).numpy()
            chosen = self.rng.permutation(len(places))[:_PER_IMAGE]
            for (row, column), key in zip(places[chosen].tolist(), self.rng.random(len(chosen)), strict=True):
                vector = features[:, row, column].numpy().copy()
                self.kept.setdefault(class_index, []).append((float(key), vector, (image, row, column)))
            self.kept[class_index] = sorted(self.kept[class_index], key=lambda entry: entry[0])[: self.size]

    def content(self) -> Features:
        """The sampled features, sorted by class."""
        entries = [(c, *entry[1:]) for c in sorted(self.kept) for entry in self.kept[c]]
        classes, vectors, places = zip(*entries, strict=True) if entries else ((), (), ())
        return Features(np.array(vectors, np.float32), np.array(classes, int), np.array(places, int))


def collect(
    network: TrainedNetwork, data: EvaluationData, world: World, args: argparse.Namespace
) -> Features:
    """Features of a layer on evaluation images, at up to ``args.per_class`` positions of each class.

    A position has the label of the pixel at its centre; void positions are skipped. ``args`` has ``images``,
    ``per_class``, ``layer`` and ``seed``.
    """
    reservoir = Reservoir(args.per_class, np.random.default_rng(args.seed))
    chosen = choose_samples(len(data.test), args.images, args.seed)
    for image, features, labels in progress(
        _forward(network, data, world, chosen, args.layer),
        total=len(chosen),
        desc="images",
        world=world,
        interval=10 * network.opts.print_interval,
    ):
        small = F.interpolate(labels[None, None].float(), size=features.shape[1:], mode="nearest-exact")
        reservoir.add(image, features, small[0, 0].long())
    return reservoir.content()


@torch.no_grad()
def _forward(
    network: TrainedNetwork, data: EvaluationData, world: World, chosen: Sequence[int], layer: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index in the list, features D×h×w and labels H×W of each chosen image."""
    precision = Precision.of(network.opts, world.device)
    if world.is_main:
        precision.log_choice("opt_level" in network.opts.typed)
    model = precision.place(network.model)
    model.intermediates = frozenset({layer})
    for image in chosen:
        sample = data.test[image]
        pixels, labels, *_ = sample.sample if isinstance(sample, Substitute) else sample
        images = pad_to(to_device(pixels[None], world.device))  # as in evaluation; the padding is void
        below, right = (new - own for new, own in zip(images.shape[-2:], labels.shape, strict=True))
        with precision.network():
            _, found = model(images)
        yield image, found[layer][0].float().cpu(), F.pad(labels, (0, right, 0, below), value=VOID)


def embed(vectors: Array, seed: int) -> Array:
    """t-SNE of N×D features to N×2, after PCA if D is above 50. Deterministic for a given seed."""
    count, width = vectors.shape
    with threadpool_limits(1):  # with several threads the order of sums varies
        if min(count, width) > _PCA:
            vectors = PCA(_PCA, random_state=seed).fit_transform(vectors)
        perplexity = min(30.0, (count - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
        return np.asarray(tsne.fit_transform(vectors))


def draw(
    points: Array, classes: Array, names: Sequence[str], ids: Sequence[int], *, old: int, title: str = ""
) -> Figure:
    """Scatter plot with a legend of the classes.

    Args:
        points: N×2.
        classes: N network indices.
        names: by network index.
        ids: dataset class id by network index, for the colours.
        old: number of classes of earlier steps (circles); the step's new classes are triangles.
        title: above the plot.
    """
    shown = sorted(set(classes.tolist()))
    columns = -(-(len(shown) + 2) // _LEGEND_LINES)
    figure = new_figure(8 + 1.9 * columns, 7.5, dpi=120)
    axes = figure.add_subplot()
    axes.set_title(drawable(title), fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    colours = palette() / 255
    groups = [("classes", "o", 20, shown)]
    if old:
        new = [index for index in shown if index >= old]
        groups = [("old classes", "o", 20, [i for i in shown if i < old]), ("new classes", "^", 26, new)]
    handles = []
    for heading, marker, size, members in groups:
        handles.append(Line2D([], [], linestyle="", label=heading))
        for index in members:
            xy, colour = points[classes == index], colours[ids[index]]
            look = {"color": colour, "edgecolors": "white", "linewidths": 0.3}
            axes.scatter(xy[:, 0], xy[:, 1], s=size, marker=marker, **look)
            name = drawable(names[index])
            handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=name))
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        ncols=-(-len(handles) // _LEGEND_LINES),
        fontsize=9,
        frameon=False,
        handletextpad=0.3,
    )
    for text in legend.get_texts():
        if text.get_text() in {heading for heading, *_ in groups}:
            text.set_fontweight("bold")
    return figure


def write(path: Path, figure: Figure, rows: Sequence[Sequence[object]]) -> Path:
    """Write the plot, and the points as CSV in the same folder; returns the path of the CSV file.

    Raises:
        UserError: a file cannot be written.
    """
    image = render(figure)
    titles = ["x", "y", "class_id", "class_name", "new", "image", "row", "column"]
    with atomic_write(path, _REMEDY) as file:
        image.save(file, "png")
    atomic_write_text(path.with_suffix(".csv"), csv_text([titles, *rows]), _REMEDY)
    return path.with_suffix(".csv")


def run(args: argparse.Namespace, opts: Options) -> None:
    """Collect features, embed and plot them.

    Raises:
        UserError: the checkpoint or the data set cannot be used, or the results cannot be written.
    """
    world = distributed.start(opts.where_to_sim, opts.local_rank, opts.timeout)
    if world.size > 1:
        raise UserError("t-SNE runs in one process; start python -m inference.tsne without a launcher")
    setup_logging(world, None, debug=opts.debug)
    network = model_from_checkpoint(opts.ckpt, opts)
    data = evaluation_data(DataSpec.of(network.opts), network.step)
    features = collect(network, data, world, args)
    if len(features.classes) < 4:
        raise UserError(f"only {len(features.classes)} labelled positions were found; give more --images")
    log.info("t-SNE of %d positions with %d features", *features.vectors.shape)
    points = embed(features.vectors, args.seed)
    old = len(network.task.old_classes(network.step))
    rows = []
    for (x, y), index, (image, row, column) in zip(
        points.tolist(), features.classes.tolist(), features.places.tolist(), strict=True
    ):
        name = data.test.dataset.images[data.test.entries[image].index].name
        is_new = int(index >= old)
        class_id = network.class_ids[index]
        rows.append([f"{x:.4f}", f"{y:.4f}", class_id, data.class_names[index], is_new, name, row, column])
    title = f"{opts.ckpt.stem}: {args.layer}"
    figure = draw(points, features.classes, data.class_names, network.class_ids, old=old, title=title)
    own = local_file(opts.ckpt) == opts.ckpt  # of the hub: into this folder, not into the cache
    path = args.out or (opts.ckpt.parent if own else Path()) / f"{opts.ckpt.stem}_tsne.png"
    log.info("%s and %s", path, write(path, figure, rows))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """Parse this program's options, and the rest as options of ``run.py``.

    Raises:
        UserError: an option is wrong, one of another mode of ``run.py``, or ``--ckpt`` is missing.
    """
    parser = Parser(
        prog="python -m inference.tsne",
        description="t-SNE plot of a checkpoint's features.",
        epilog="Also takes options of run.py: --ckpt FILE (required), --data_root, --where_to_sim, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=positive_int, default=200, help="evaluation images (%(default)s)")
    parser.add_argument(
        "--per_class", type=positive_int, default=100, help="positions per class (%(default)s)"
    )
    parser.add_argument(
        "--layer", choices=LAYERS, default=LAYERS[0], help="pre_logits: before the classifier"
    )
    parser.add_argument("--seed", type=seed, default=0, help="random seed (%(default)s)")
    parser.add_argument("--out", type=path_option, help="PNG file to write (<checkpoint>_tsne.png)")
    args, rest = parser.parse_known_args(argv)
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the plot is a PNG file; give a name that ends in .png")
    for mode in ("--check_data", "--test", "--predict"):
        if any(word.partition("=")[0] == mode for word in rest):
            raise UserError(f"{mode}: t-SNE only draws a plot; drop it, or start run.py instead")
    opts = parse_options(rest)
    if opts.ckpt is None:
        raise UserError("--ckpt FILE is required: the checkpoint whose features are plotted")
    return args, opts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("inference.tsne", lambda: run(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
