"""Which entries of an archive a restore takes: patterns over their paths.

Syntax of a pattern: docs/formats.md, "Exclude patterns"; here a plain one takes in and one with `!` leaves out. The
last pattern that matches an entry decides. An entry that none matches fares as its folder does, so a folder that is
taken comes with all that is in it.
"""

from collections.abc import Sequence
from typing import Final

from pxar.patterns import MatchList, MatchPattern

#: With one of these a part of a pattern may stand for more than one name, or for a slash.
_WIDE: Final = (b"**", b"[", b"\\")


class Selection:
    """The patterns of one restore; without any everything is taken, and nobody needs to put paths together."""

    def __init__(self, patterns: Sequence[MatchPattern] = ()) -> None:
        self._list = MatchList(patterns)
        taking = [pattern.text for pattern in patterns if not pattern.inverted]
        #: How the root fares. Whoever only leaves out wants the rest.
        self.root: Final = not taking
        #: What the folders on the way to a match match; None: any folder may be on the way.
        self._on_the_way: MatchList | None = MatchList()
        for text in taking:
            if self._on_the_way is not None and not _add_way(text, self._on_the_way):
                self._on_the_way = None

    def __bool__(self) -> bool:
        """Whether there is any pattern."""
        return bool(self._list)

    def takes(self, path: bytes, is_dir: bool | None, above: bool) -> bool:
        """Whether the entry at `path` (from the root, with a leading slash) is taken; `above`: its folder is.

        `is_dir` None: unknown, which patterns for folders only do not match.
        """
        decision = self._list.decide(path, is_dir)
        return above if decision is None else decision

    def may_hold(self, path: bytes) -> bool:
        """Whether something below the folder at `path`, which is not taken, may be."""
        return self._on_the_way is None or self._on_the_way.decide(path, True) is not None


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
