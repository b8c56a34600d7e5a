"""wandb's files as the tests read them: what an offline run would upload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, START, FULL, FIRST, LAST = 32768, 7, 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file, in LevelDB's log format; an unfinished last one is left out.

    A file begins with 7 bytes of its own. A part of a record is 4 bytes of checksum, 2 of length, 1 of kind,
    and its content; fewer than 7 bytes at the end of a block are filled.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, content = path.read_bytes(), START, b""
    while place + START <= len(data):
        if BLOCK - place % BLOCK < START:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + START : place + START + length]
        content = part if kind in (FULL, FIRST) else content + part
        place += START + length
        if kind in (FULL, LAST) and len(part) == length:
            yield Record.FromString(content)


def files(folder: Path) -> list[Path]:
    """The file of each start of a run, the oldest first."""
    return sorted(folder.glob("wandb/*run-*/*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, call by call; parts of one value are named NAME/PART."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]
