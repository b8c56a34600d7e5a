"""TensorBoard's files as the tests read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event


def events(folder: Path) -> list[Event]:
    """Events of a folder's files, the oldest first.

    A record is 8 bytes of length, 4 of checksum, the event, and 4 of checksum.
    """
    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def values(folder: Path) -> Iterator[tuple[int, Any]]:
    """Place on the curve and value of everything that was written."""
    for event in events(folder):
        for value in event.summary.value:
            yield event.step, value
