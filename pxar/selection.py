"""Which entries of an archive a restore takes: patterns over their paths.

Syntax of a pattern: docs/formats.md, "Exclude patterns"; here a plain one takes in and one with `!` leaves out. The
last pattern that matches an entry decides. An entry that none matches fares as its folder does, so a folder that is
taken comes with all that is in it. In a folder that a pattern left out only patterns behind that one take in again:
`*` and then `!cache/` leaves out what is in `cache` too, which `*` alone would match. (PBS's client restores it.)
"""

from collections.abc import Sequence
from typing import Final

from pxar.patterns import MatchList, MatchPattern

#: With one of these a part of a pattern may stand for more than one name, or for a slash.
_WIDE: Final = (b"**", b"[", b"\\")


#: The fate of an entry that is taken. Any other, from 0 on: it is not, and no pattern before this number takes in again
#: what is below it.
TAKEN: Final = -1


class Selection:
    """The patterns of one restore; without any everything is taken, and nobody needs to put paths together."""

    def __init__(self, patterns: Sequence[MatchPattern] = ()) -> None:
        self._patterns = tuple(patterns)
        self._list = MatchList(patterns)
        #: Of each plain pattern, what the folders on the way to its matches match; None: any folder may be on the way.
        self._ways: list[tuple[int, MatchList | None]] = []
        for number, pattern in enumerate(patterns):
            if not pattern.inverted:
                ways = MatchList()
                self._ways.append((number, ways if _add_way(pattern.text, ways) else None))
        #: How the root fares. Whoever only leaves out wants the rest.
        self.root: Final = 0 if self._ways else TAKEN

    def __bool__(self) -> bool:
        """Whether there is any pattern."""
        return bool(self._list)

    def fate(self, path: bytes, is_dir: bool | None, above: int) -> int:
        """How the entry at `path` (from the root, with a leading slash) fares, whose folder fares as `above`.

        `is_dir` None: unknown, which patterns for folders only do not match.
        """
        number = self._list.last(path, is_dir)
        if number < above or number < 0:
            return above
        return number + 1 if self._patterns[number].inverted else TAKEN

    def may_hold(self, path: bytes, fate: int) -> bool:
        """Whether something below the folder at `path`, which is not taken and fares as `fate`, may be."""
        return any(
            number >= fate and (ways is None or ways.decide(path, True) is not None) for number, ways in self._ways
        )


def _add_way(text: bytes, ways: MatchList) -> bool:
    """Add what matches the folders above what `text` matches; False if these can be any."""
    if not text.startswith(b"/"):
        return False
    way = b""
    for part in text[1:].split(b"/")[:-1]:
        if any(sign in part for sign in _WIDE):
            break
        way += b"/" + part
        ways.add(MatchPattern.parse(way))
    else:
        return not any(sign in text for sign in _WIDE) or _below(way, ways)
    return _below(way, ways)


def _below(way: bytes, ways: MatchList) -> bool:
    if not way:
        return False
    ways.add(MatchPattern.parse(way + b"/**"))
    return True
