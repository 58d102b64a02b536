"""Sizes, rates and durations as people write and read them."""

import re
from typing import Final

from core.errors import UsageError

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
TIB: Final = 1024**4

_NUMBER = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
_UNITS: Final = {
    "": 1,
    "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": TIB, "tib": TIB, "tb": 1000**4,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes meant by `text`: a number and an optional unit, `4M` and `4MiB` binary, `4MB` decimal.

    Raises:
        UsageError: not of that form.
    """
    match = _NUMBER.fullmatch(text.strip())
    factor = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise UsageError("understand the size", repr(text), "it is not a number with a unit", "write 64M, 4GiB or 10MB")
    return round(float(match["number"]) * factor)


def format_size(size: float) -> str:
    """`size` bytes with a binary unit and at most four digits: `4096 B`, `1.50 GiB`."""
    if abs(size) < 10 * KIB:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= KIB
        if abs(size) < 1000 or unit == "TiB":
            break
    digits = 2 if abs(size) < 10 else 1 if abs(size) < 100 else 0
    return f"{size:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """`seconds` in the two units that matter: `0.42 s`, `12 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"
