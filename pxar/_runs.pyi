from typing import Any

from pxar.filesystem import Scanned

def compare(
    names: list[bytes],
    scanned: list[Scanned | int],
    index: int,
    positions: list[int],
    turn: int,
    data: bytes,
    base: int,
    cache: list[Any],
    start: int,
    end: int,
    /,
) -> tuple[int, int, int, int]: ...
def encode(
    entries: list[Any], first: int, base: int, position: int, earliest: int, /
) -> tuple[int, bytes, bytes, int]: ...
