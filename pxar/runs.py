"""Runs of unchanged files: the two inner loops of change detection, once per file of a tree.

`_runs.c` does both; here is the readable form, the oracle of its tests and the fallback. `FLEECE_PXAR_RUNS=python`
forces that one. Each stops in front of what is not the usual case; the caller does that by itself and goes on.
"""

import os
from struct import Struct
from typing import Any, Final

from pxar.filesystem import Scanned
from pxar.format import ENTRY_V1_SIZE, FILENAME, HEADER, HEADER_SIZE, MAX_METADATA, PAIR_SIZE, PAYLOAD_REF, name_fault
from pxar.goodbye import ROW, hash_name

try:
    from pxar import _runs
except ImportError:  # no compiler where it was installed
    _runs = None  # type: ignore[assignment]

#: Names up to this many bytes are compared in place.
_MAX_COMPARED: Final = 255
#: Bytes of entries that are enough for one call.
_ENOUGH: Final = 256 << 10
_TYPE: Final = 0o170000
_FILE: Final = 0o100000
_LARGEST: Final = (1 << 63) - 1
_REFERENCE_HEAD: Final = HEADER.pack(PAYLOAD_REF, PAIR_SIZE)
_PAIR: Final = Struct("<QQ")


def compare_in_python(
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
) -> tuple[int, int, int, int]:
    """Take files as long as they stand in the old archive as they are now, one behind the other.

    Args:
        names, scanned, index: entries of the new folder, and the first of them to look at.
        positions, turn: of the entries of the old folder in the archive, and the one that is expected.
        data, base: bytes of the old archive, and the position of the first.
        cache: gets `(name, metadata, size, offset of the payload - start, None)` for each file.
        start, end: of the old payloads that the cache refers to.

    Returns:
        Index and turn of the first that was not taken; the new end; and if that one is unchanged too, but its payload
        lies elsewhere, its offset, else -1.
    """
    pair, room = _PAIR.unpack_from, len(data) - _PAIR.size
    while index < len(names) and turn < len(positions):
        found, name = scanned[index], names[index]
        if isinstance(found, int):
            break
        mode, meta, size, _, _, nlink, _, _, warning = found
        if nlink != 1 or mode & _TYPE != _FILE or warning or len(name) > _MAX_COMPARED:
            break
        wanted = b"%b%b\0%b%b" % (HEADER.pack(FILENAME, HEADER_SIZE + len(name) + 1), name, meta, _REFERENCE_HEAD)
        place = positions[turn] - base
        if place < 0 or not data.startswith(wanted, place):
            break
        place += len(wanted)
        if place > room:
            break
        offset, before = pair(data, place)
        if before != size or offset + HEADER_SIZE + size > _LARGEST:
            break
        if offset != end:
            return index, turn, end, offset
        end += HEADER_SIZE + size
        cache.append((name, meta, size, offset - start, None))
        index += 1
        turn += 1
    return index, turn, end, -1


def encode_in_python(
    entries: list[Any], first: int, base: int, position: int, earliest: int
) -> tuple[int, bytes, bytes, int]:
    """Entries of unchanged files from `entries[first]` on, as `compare` made them; the archive is at `position`.

    Payloads lie at `base` and behind, not before `earliest`.

    Returns:
        How many, the bytes for the archive, a `goodbye.ROW` for each, and the end of the last payload.
    """
    items, rows = bytearray(), bytearray()
    index = first
    while index < len(entries) and len(items) < _ENOUGH:
        entry = entries[index]
        if entry.__class__ is not tuple or entry[4] is not None:
            break
        name, meta, size, place, _ = entry
        offset = base + place
        if name_fault(name) or name[:1] == b"." or not ENTRY_V1_SIZE <= len(meta) <= MAX_METADATA:
            break
        if offset < earliest or offset + HEADER_SIZE + size > _LARGEST:
            break
        head = HEADER.pack(FILENAME, HEADER_SIZE + len(name) + 1)
        item = b"%b%b\0%b%b%b" % (head, name, meta, _REFERENCE_HEAD, _PAIR.pack(offset, size))
        rows += ROW.pack(hash_name(name), position + len(items), len(item))
        items += item
        earliest = offset + HEADER_SIZE + size
        index += 1
    return index - first, bytes(items), bytes(rows), earliest


if _runs is not None and os.environ.get("FLEECE_PXAR_RUNS") != "python":
    compare, encode = _runs.compare, _runs.encode
else:
    compare, encode = compare_in_python, encode_in_python
