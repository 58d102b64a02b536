"""`.gc-status`: what the last garbage collection of a datastore found.

Layout: docs/formats.md, "Garbage collection". This module is its only description in code.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

from core.errors import FormatError
from datastore.files import Owner, make_folders, read_file, replace_file, store_errors, temporary_path

STATUS_NAME: Final = ".gc-status"
#: Bytes of a status file that are read; PBS's have some 400.
_MAX_STATUS: Final = 1 << 16
_CACHE: Final = ("cache_hits", "cache_misses")


@dataclass(slots=True)
class GcStatus:
    """The counters of one garbage collection, in the order of the file."""

    upid: str | None = None  #: of the task that collected
    index_file_count: int = 0  #: indexes that were read
    index_data_bytes: int = 0  #: sum of the sizes of all images and streams
    disk_bytes: int = 0  #: of chunks in use (and of corrupt ones set aside that are)
    disk_chunks: int = 0
    removed_bytes: int = 0
    removed_chunks: int = 0
    pending_bytes: int = 0  #: of chunks that nothing uses, but that are too young to go
    pending_chunks: int = 0
    removed_bad: int = 0  #: corrupt chunks that went
    still_bad: int = 0  #: corrupt chunks too young to go
    cache_hits: int = 0  #: digests that had been marked before
    cache_misses: int = 0  #: digests that were marked

    def add(self, other: "GcStatus") -> None:
        """Add the counters of `other`, a part of the same run."""
        for field in fields(self)[1:]:
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def dedup_factor(self) -> float:
        """How often the data in use would be stored without deduplication and compression; 1.0 of an empty store."""
        return self.index_data_bytes / self.disk_bytes if self.disk_bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """The object in PBS's order of fields."""
        document = {
            field.name.replace("_", "-"): getattr(self, field.name)
            for field in fields(self)
            if field.name not in _CACHE
        }
        return {**document, "cache-stats": {"hits": self.cache_hits, "misses": self.cache_misses}}

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """Read the text of a status file, PBS's or ours; unknown fields pass, `cache-stats` may be missing.

        Raises:
            FormatError: no JSON object, or a counter is missing or no count.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FormatError("read", where, f"it is no JSON ({error})") from error
        if not isinstance(document, dict):
            raise FormatError("read", where, "it is no JSON object")
        upid = document.get("upid")
        if upid is not None and not isinstance(upid, str):
            raise FormatError("read", where, "its upid is no text")
        values = {
            field.name: _count(document.get(field.name.replace("_", "-")), field.name, where)
            for field in fields(cls)[1:]
            if field.name not in _CACHE
        }
        cache = document.get("cache-stats")
        if isinstance(cache, dict):
            values |= {name: _count(cache.get(name.removeprefix("cache_")), name, where) for name in _CACHE}
        return cls(upid, **values)


def _count(value: object, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise FormatError("read", where, f"its {name.replace('_', '-')} is missing or no count")
    return value


def read_status(base: Path) -> GcStatus | None:
    """The status of the last collection of the store in `base`; None before the first one.

    Raises:
        FormatError: no status.
        StoreError: unreadable.
    """
    path = base / STATUS_NAME
    with store_errors("read", path):
        try:
            data = read_file(path, limit=_MAX_STATUS)
        except FileNotFoundError:
            return None
    return GcStatus.parse(data, where=str(path))


def write_status(base: Path, status: GcStatus, owner: Owner) -> None:
    """Replace the status of the store in `base`, one line of JSON, mode 0644.

    Raises:
        StoreError: it cannot be written.
    """
    text = json.dumps(status.to_json(), separators=(",", ":"))
    with store_errors("write", base / STATUS_NAME):
        make_folders(base, ".fleece/tmp", owner)
        temporary = temporary_path(base / ".fleece/tmp/gc-status.json")
        replace_file(base / STATUS_NAME, (text.encode(),), owner, temporary=temporary)
