"""The goodbye table: the search tree of names that closes every directory of a file archive.

Layout: docs/formats.md, "File archives". A complete binary tree by hash of the name, level by level in one array: the
children of slot `i` are `2i + 1` and `2i + 2`.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, islice
from struct import Struct, pack
from typing import Final

from core.buffers import Buffer
from pxar.format import GOODBYE, GOODBYE_TAIL_MARKER, HEADER, HEADER_SIZE

#: SipHash keys, first 16 bytes of SHA-1("PROXMOX ARCHIVE FORMAT") as two big-endian numbers.
KEYS: Final = (0x83AC3F1CFBB450DB, 0xAA4F1B6879369FBD)
ROW: Final = Struct("<QQQ")  #: hash, distance back from the table's header, size
ROW_SIZE: Final = ROW.size

#: Names of one directory that may have one hash. With 64 bits even two are rare; a forged table may have millions.
MAX_EQUAL: Final = 64
#: Permutations up to this length are kept.
_USUAL: Final = 256
_U64: Final = Struct("<Q")
_KEY: Final = Struct("<QQ").pack(*KEYS)
_MASK: Final = (1 << 64) - 1


def siphash24(name: Buffer) -> int:
    """SipHash-2-4 of `name`, in Python: the oracle, and the fallback where siphashc is not installed."""
    data = bytes(name)
    v0, v1 = KEYS[0] ^ 0x736F6D6570736575, KEYS[1] ^ 0x646F72616E646F6D
    v2, v3 = KEYS[0] ^ 0x6C7967656E657261, KEYS[1] ^ 0x7465646279746573
    # The last word has the rest of the bytes, and the length modulo 256 as its highest byte.
    data += bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for start in range(0, len(data), 8):
        word = int.from_bytes(data[start : start + 8], "little")
        v3 ^= word
        v0, v1, v2, v3 = _round(*_round(v0, v1, v2, v3))
        v0 ^= word
    v2 ^= 0xFF
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


def _round(v0: int, v1: int, v2: int, v3: int) -> tuple[int, int, int, int]:
    v0 = (v0 + v1) & _MASK
    v1 = _rotated(v1, 13) ^ v0
    v0 = _rotated(v0, 32)
    v2 = (v2 + v3) & _MASK
    v3 = _rotated(v3, 16) ^ v2
    v0 = (v0 + v3) & _MASK
    v3 = _rotated(v3, 21) ^ v0
    v2 = (v2 + v1) & _MASK
    v1 = _rotated(v1, 17) ^ v2
    v2 = _rotated(v2, 32)
    return v0, v1, v2, v3


def _rotated(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & _MASK


try:
    from siphashc import siphash as _siphash
except ImportError:  # neither a wheel nor a compiler where it was installed

    def _siphash(key: str | bytes, plaintext: str | bytes) -> int:
        return siphash24(plaintext)  # type: ignore[arg-type]


def hash_name(name: bytes) -> int:
    """What a name is found by: its SipHash-2-4, 64 bits."""
    return _siphash(_KEY, name)


def permutation(count: int) -> Iterator[int]:
    """For each slot of a table with `count` children the index of its row in hash order.

    In a full tree of `depth + 1` levels, slot `j` of level `d` has `(2j + 1) * 2**(depth - d) - 1` rows before it, and
    every second one of those is on the deepest level. A complete tree lacks the last of the deepest level, so as many
    are taken off as are missing before the slot.
    """
    depth = count.bit_length() - 1
    for level in range(depth + 1):
        step = 1 << depth - level
        deepest = count + 1 - (1 << depth)  # slots that the deepest level has
        full = range(step - 1, 2 << depth, 2 * step)
        if level == depth:
            yield from islice(full, deepest)
        else:
            yield from (rank - max(0, (rank + 1) // 2 - deepest) for rank in full)


def build_table(records: Buffer, position: int, entry_position: int) -> bytes:
    """The whole GOODBYE item that stands at `position` of the archive.

    `records` are `ROW`s in any order: hash of the name, position of the child's FILENAME, size of the child.
    `entry_position` is that of the directory's ENTRY, for the root 0 in both versions.
    """
    count = len(records) // ROW_SIZE
    size = HEADER_SIZE + ROW_SIZE * (count + 1)
    rows = sorted(ROW.iter_unpack(records))
    order = _usual_permutation(count) if count <= _USUAL else permutation(count)
    placed = [(key, position - start, length) for key, start, length in map(rows.__getitem__, order)]
    tail = (GOODBYE_TAIL_MARKER, position - entry_position, size)
    return HEADER.pack(GOODBYE, size) + pack(f"<{3 * count + 3}Q", *chain.from_iterable(placed), *tail)


@lru_cache
def _usual_permutation(count: int) -> tuple[int, ...]:
    return tuple(permutation(count))


def find(table: Buffer, wanted: int, limit: int = MAX_EQUAL) -> list[int]:
    """Slots of the rows whose hash is `wanted`, `limit` + 1 at most; `table` has the rows without the tail.

    Rows with equal hashes may lie on both sides of each other, so all below a hit are looked at.
    """
    end = len(table)
    found: list[int] = []
    pending = [0]
    unpack = _U64.unpack_from
    while pending and len(found) <= limit:
        slot = pending.pop()
        offset = slot * ROW_SIZE
        while offset < end:
            (value,) = unpack(table, offset)
            if wanted == value:
                found.append(slot)
                if len(found) > limit:
                    break
                pending.append(2 * slot + 2)
                slot = 2 * slot + 1
            else:
                slot = 2 * slot + (1 if wanted < value else 2)
            offset = slot * ROW_SIZE
    return found
