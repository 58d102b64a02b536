"""Patterns as conditions in SQL: what every name fulfils that a pattern may match, and few others.

The condition only narrows down; `MatchPattern` decides. SQLite's GLOB counts characters of UTF-8 where patterns count
bytes, so what is not ASCII becomes a star.
"""

from typing import Final, NamedTuple

from pxar.patterns import LastName, MatchPattern

#: Stars in a GLOB, and members of a class in it; what has more is made coarser.
_MAX_STARS: Final = 6
_MAX_CLASS: Final = 64
_MAX_GLOB: Final = 4096


class Condition(NamedTuple):
    """A condition about the column `c.name`, and its values."""

    sql: str
    values: tuple[bytes, ...]


def condition_of(wanted: LastName) -> Condition | None:
    """What names look like whose end, or whole, is `wanted`; None if that says nothing about them."""
    parts = wanted.parts
    literal = _literal(parts)
    if wanted.whole and len(literal) == len(parts):
        return Condition("c.name=CAST(? AS TEXT)", (literal,))
    sql, values = [], []
    if wanted.whole and literal:
        sql.append("c.name>=CAST(? AS TEXT)")
        values.append(literal)
        if (beyond := _beyond(literal)) is not None:
            sql.append("c.name<CAST(? AS TEXT)")
            values.append(beyond)
    glob = _glob(parts, whole=wanted.whole)
    if glob.strip(b"*"):
        sql.append("c.name GLOB CAST(? AS TEXT)")
        values.append(glob)
    return Condition(" AND ".join(sql), tuple(values)) if sql else None


def directories_above(pattern: MatchPattern) -> MatchPattern | None:
    """Of a pattern `a/**` the pattern `a`: below what that matches lies everything that it matches itself."""
    text = pattern.text
    while text.endswith(b"/**"):
        text = text[:-3]
    if not text or text == pattern.text or text.endswith((b"\\", b"/")):
        return None
    above = MatchPattern.parse(text)
    return None if above.last_name is None else above


def _literal(parts: tuple[frozenset[int] | None, ...]) -> bytes:
    """The bytes it begins with."""
    found = bytearray()
    for part in parts:
        if part is None or len(part) != 1:
            break
        found += bytes(part)
    return bytes(found)


def _beyond(prefix: bytes) -> bytes | None:
    """The first text behind all that begin with `prefix`."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else None


def _glob(parts: tuple[frozenset[int] | None, ...], *, whole: bool) -> bytes:
    pieces = [] if whole else [b"*"]
    pieces += [_piece(part) for part in parts]
    joined: list[bytes] = []
    for piece in pieces:
        if piece != b"*" or joined[-1:] != [b"*"]:
            joined.append(piece)
    if joined.count(b"*") > _MAX_STARS or sum(map(len, joined)) > _MAX_GLOB:
        # What stands before the first star, and behind the last.
        first = joined.index(b"*") if b"*" in joined else len(joined)
        last = len(joined) - joined[::-1].index(b"*") if b"*" in joined else len(joined)
        joined = [*joined[:first], b"*", *joined[last:]]
    glob = b"".join(joined)
    return glob if len(glob) <= _MAX_GLOB else b"*"


def _piece(part: frozenset[int] | None) -> bytes:
    if not part or max(part) >= 0x80 or len(part) > _MAX_CLASS:
        return b"*"
    if len(part) == 1:
        byte = bytes(part)
        return b"[%b]" % byte if byte in b"*?[" else byte
    # In a class ] comes first, ^ not first, and - last.
    members = bytes(sorted(part - frozenset(b"]^-")))
    first, *last = (byte if byte[0] in part else b"" for byte in (b"]", b"^", b"-"))
    return b"[%b%b%b%b]" % (first, members, *last)
