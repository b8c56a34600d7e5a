"""All published results in one table per data set, task and protocol, best first.

    python -m report.published [--dataset voc] [--task 15-1] [--protocol overlapped] [--backbone resnet101]
                               [--runs LOGDIR ...] [--markdown FILE]

``--backbone`` keeps backbones whose name contains the text. ``--runs`` adds the finished runs of these
folders, counted with background. ``--markdown`` makes docs/published.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from report.groups import arrange, task_title
from report.published import Published, has_own_order, table
from report.reading import canonical_task, find_runs, read_run
from report.tables import summary
from utils.command import run_command
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.option_types import Parser, path_option
from utils.tables import format_table, markdown_table, markdown_text

HEADERS = ["method", "backbone", "first", "later", "all", "remarks", "source"]
PAGE = """# Published results

What has been published for a task, method and backbone: {rows} results from papers and repositories. Each
data set, task and protocol has a table, the best result first.

| data set | tables |
| --- | --- |
{index}

## How to read the tables

- **first**, **later**, **all**: mIoU in percent after the last step, over the classes of step 0, of all later
  steps, and of all steps. They include the background unless a remark says otherwise.
- **remarks**: "background not said": the source does not tell whether the background counts. "The numbers do
  not agree with each other": no way of counting the background gives all three.
- **source**: a number of the [list of sources](#sources). Many quote methods of others: only sources of a
  method's own authors (a paper's rows for its own method, a README) are first-hand.
- **names**: -M: with exemplars; task 50 is elsewhere called 50-50. Cityscapes' "domain" tasks add cities
  instead of classes, and cannot be run here.

Compare only rows with the same backbone that count the background in the same way.

The same tables in a terminal, with your finished runs among the published ones:

```bash
python -m report.published --dataset voc --task 15-1 --protocol overlapped --backbone resnet101 --runs logs
```

`python -m report.published --markdown docs/published.md` makes this page from `report/published.csv`. Correct
numbers there, not here. Results of this program are in [results.md](results.md).
"""


def main(argv: list[str] | None = None) -> int:
    """Print or write the tables. Returns the exit code."""
    return run_command("report.published", lambda: _command(argv))


def _command(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m report.published", description="Published results, best first, one table per task."
    )
    for name, example in (("dataset", "voc"), ("task", "15-1"), ("protocol", "overlapped")):
        parser.add_argument(f"--{name}", metavar="NAME", help=f"only this {name}, e.g. {example}")
    parser.add_argument("--backbone", metavar="TEXT", help="only backbones whose name contains it, e.g. swin")
    parser.add_argument(
        "--runs", nargs="+", default=[], type=path_option, metavar="LOGDIR", help="add finished runs"
    )
    parser.add_argument("--markdown", type=path_option, metavar="FILE", help="write a page, print nothing")
    args = parser.parse_args(argv)
    rows = [row for row in (*table(), *measured(args.runs)) if _is_chosen(row, args)]
    if not rows:
        known = ", ".join(sorted({f"{row.dataset} {row.task} {row.protocol}" for row in table()}))
        raise UserError(f"no published result for this choice; there are: {known}")
    if args.markdown is not None:
        atomic_write_text(args.markdown, page(rows))
        print(f"page: {args.markdown}")
    else:
        print("\n\n".join(f"{title}\n{format_table(HEADERS, cells)}" for title, cells in tables(rows)))


def _is_chosen(row: Published, args: argparse.Namespace) -> bool:
    task = args.task and canonical_task(row.dataset, args.task)
    return (
        args.dataset in (None, row.dataset)
        and task in (None, row.task)
        and args.protocol in (None, row.protocol)
        and (args.backbone or "") in row.backbone
    )


def measured(folders: Sequence[Path]) -> list[Published]:
    """Finished runs as rows of the table, without those of another class order.

    Raises:
        UserError: a folder has no run, or a run cannot be read.
    """
    groups = arrange([read_run(run) for run in find_runs(folders)])
    found = []
    for group in groups:
        for line in summary(group):
            if line.complete and not has_own_order(line.method):
                first, later, over_all = (
                    None if number is None else 100 * number.mean for number in line.numbers.values()
                )
                runs = len(line.method.latest())
                found.append(
                    Published(
                        dataset=group.dataset,
                        task=group.task,
                        protocol=group.protocol or "",
                        backbone=group.backbone or "",
                        method=line.method.label,
                        miou_first=first,
                        miou_later=later,
                        miou_all=over_all,
                        background="with",
                        remark=f"measured, {runs} run{'' if runs == 1 else 's'}",
                        source="this program",
                    )
                )
    return found


def tables(rows: Iterable[Published]) -> Iterator[tuple[str, list[list[object]]]]:
    """Title and cells of every table, in the order of data set, task and protocol; best row first."""
    parts: dict[tuple[str, str, str], list[Published]] = {}
    for row in rows:
        parts.setdefault((row.dataset, row.task, row.protocol), []).append(row)
    for (dataset, task, protocol), members in sorted(parts.items()):
        ranked = sorted(members, key=lambda row: -1.0 if row.miou_all is None else row.miou_all, reverse=True)
        title = f"{dataset.upper()} {task_title(dataset, task)}, {protocol}"
        yield title, [_cells(row) for row in ranked]


def _cells(row: Published) -> list[object]:
    remarks = "; ".join(part for part in (row.remark, row.convention) if part)
    return [row.method, row.backbone, *row.means.values(), remarks, row.source]


def page(rows: Iterable[Published]) -> str:
    """The tables as a Markdown page, with an index, and with the sources as numbers of a list at the end."""
    rows = list(rows)
    sources = sorted({row.source for row in rows}, key=str.lower)
    index: dict[str, list[str]] = {}
    parts = []
    for title, cells in tables(rows):
        data_set, name = title.split(" ", 1)
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")  # as GitHub makes them
        index.setdefault(data_set, []).append(f"[{name}](#{anchor})")
        numbered = [[*others, sources.index(str(source)) + 1] for *others, source in cells]
        parts.append(f"## {title}\n\n{markdown_table(HEADERS, numbered)}\n")
    lines = "\n".join(f"| {data_set} | {' · '.join(links)} |" for data_set, links in index.items())
    listed = "\n".join(f"{number}. {markdown_text(source)}" for number, source in enumerate(sources, 1))
    return "\n".join([PAGE.format(rows=len(rows), index=lines), *parts, f"## Sources\n\n{listed}\n"])
