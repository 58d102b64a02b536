"""`.fleece/usage-history`: how full a datastore was after the last garbage collection of each day.

A line each, oldest first: time (Unix seconds), bytes used on the file system, bytes of all chunks, in decimal digits
with a space between. `fleece datastore status` tells from it when the space will be used up.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from datastore.errors import StoreError
from datastore.files import Owner, make_folders, read_file, replace_file, store_errors, temporary_path

HISTORY_NAME: Final = ".fleece/usage-history"
#: Lines that are kept: a year and more, for of each day (UTC) only the last one is.
MAX_LINES: Final = 400
_DAY_S: Final = 86_400
#: Bytes of a history that are read; a full one has some 20 thousand.
_MAX_SIZE: Final = 1 << 16
_LINE: Final = re.compile(rb"([0-9]{1,12}) ([0-9]{1,18}) ([0-9]{1,18})")


@dataclass(frozen=True, slots=True, order=True)
class UsageSample:
    """How full a datastore was at one moment, just after a garbage collection."""

    time: int  #: Unix seconds
    used: int  #: bytes on the file system, those of others too
    chunk_bytes: int  #: of all chunks: in use, or pending


def read_history(base: Path) -> list[UsageSample]:
    """The history of the store in `base`, oldest first; empty without a file. Lines that are none are passed over.

    Raises:
        StoreError: unreadable.
    """
    path = base / HISTORY_NAME
    with store_errors("read", path):
        try:
            return _parse(read_file(path, limit=_MAX_SIZE))
        except FileNotFoundError:
            return []


def add_sample(base: Path, sample: UsageSample, owner: Owner) -> None:
    """Add `sample` to the history of the store in `base`, atomically; the caller excludes other collections.

    What cannot be read is replaced, and so are samples of the future: the clock was wrong then.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        before = [old for old in read_history(base) if old.time < sample.time]
    except StoreError:
        before = []
    if before and before[-1].time // _DAY_S == sample.time // _DAY_S:
        before.pop()
    kept = [*before, sample][-MAX_LINES:]
    text = "".join(f"{one.time} {one.used} {one.chunk_bytes}\n" for one in kept)
    with store_errors("write", base / HISTORY_NAME):
        make_folders(base, ".fleece/tmp", owner)
        temporary = temporary_path(base / ".fleece/tmp/usage-history.txt")
        replace_file(base / HISTORY_NAME, (text.encode(),), owner, temporary=temporary)


def _parse(data: bytes) -> list[UsageSample]:
    matches: Iterable[re.Match[bytes] | None] = map(_LINE.fullmatch, data.split(b"\n"))
    found = {int(match[1]): UsageSample(*map(int, match.groups())) for match in matches if match is not None}
    return sorted(found.values())
