"""Inode numbers, and what the kernel knows of them.

Nodes of the tree have numbers below 2**63, made from their paths. An entry of a file archive has one that says where it
lies, so that it needs no table: bit 63, bit 62 for directories, 16 bits for the archive, 46 bits for the place (of a
directory its end, as in PBS; of all others the position of the ENTRY). An honest archive never shows one place twice.
All names of a hard link have the number of their file.
"""

import os
from typing import Final

from core.errors import FleeceError
from fusefs.archive_nodes import FileArchive
from fusefs.errors import StaleError
from fusefs.nodes import Folder, Link, Node
from fusefs.opened_archive import MAX_ARCHIVE, Spot
from pxar.listing import Row

#: Inode number of the mount's root.
ROOT_INODE: Final = 1

_ENTRY: Final = 1 << 63
_DIRECTORY: Final = 1 << 62
_PLACES: Final = MAX_ARCHIVE
_PLACE_BITS: Final = MAX_ARCHIVE.bit_length() - 1
_ARCHIVES: Final = 1 << 16


class InodeTable:
    """The nodes that the kernel knows, each with the number of times it was told about it."""

    def __init__(self, root: Folder | FileArchive) -> None:
        self._nodes: dict[int, Node] = {root.inode: root}
        self._counts: dict[int, int] = {root.inode: 1}

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, inode: int) -> Node:
        """The node that the kernel calls `inode`.

        Raises:
            StaleError: it is not known (any more).
        """
        node = self._nodes.get(inode)
        if node is None:
            raise StaleError("find", f"inode {inode}", "it is not known any more")
        return node

    def known(self, node: Node) -> Node:
        """The node that the kernel has for the path of `node`, or `node` itself.

        Raises:
            StaleError: its number belongs to another path (the chance is one in 2**63 for each pair).
        """
        other = self._nodes.get(node.inode, node)
        if other.path != node.path:
            raise StaleError("show", os.fsdecode(node.path), "its inode number is taken")
        if isinstance(node, Link) and isinstance(other, Link):
            other.target, other.mtime_ns = node.target, node.mtime_ns
        return other

    def remember(self, node: Node) -> None:
        """The kernel was told about `node` once more."""
        self._nodes.setdefault(node.inode, node)
        self._counts[node.inode] = self._counts.get(node.inode, 0) + 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel takes `count` tellings back; at none left the node goes."""
        left = self._counts.get(inode, 0) - count
        if left > 0 or inode == ROOT_INODE:
            self._counts[inode] = max(left, 1)
        else:
            self._counts.pop(inode, None)
            self._nodes.pop(inode, None)


class ArchiveEntries:
    """The entries of one archive that the kernel knows: their number, and the directories among them."""

    __slots__ = ("_count", "_directories", "_table", "archive", "base")

    def __init__(self, table: "EntryTable", archive: FileArchive, base: int) -> None:
        self._table = table
        self.archive: Final = archive
        self.base: Final = base  #: what inode numbers of its entries have in common
        self._count = 0
        #: Of each directory, by its end: the times the kernel was told, and in the low bits its position. The end alone
        #: would not do: a forged table could claim any position for it.
        self._directories: dict[int, int] = {}

    def inode(self, row: Row) -> int:
        """The number of the entry that has this row."""
        end = row[1]
        return self.base | _DIRECTORY | end if end else self.base | row[0]

    def remember(self, row: Row) -> None:
        """The kernel was told about this entry once more."""
        self._count += 1
        position, end = row[0], row[1]
        if end:
            self._directories[end] = self._directories.get(end, position) + _PLACES

    def spot(self, inode: int) -> Spot:
        """Where the entry lies that the kernel calls `inode`.

        Raises:
            StaleError: the kernel was not told about it.
        """
        place = inode & _PLACES - 1
        if not inode & _DIRECTORY:
            return Spot(place, 0)
        known = self._directories.get(place)
        if known is None:
            raise StaleError("find", f"inode {inode}", "it is not known any more")
        return Spot(known & _PLACES - 1, place)

    def forget(self, inode: int, count: int) -> None:
        """The kernel takes `count` tellings back."""
        self._count -= count
        if inode & _DIRECTORY:
            place = inode & _PLACES - 1
            left = self._directories.get(place, 0) - count * _PLACES
            if left < _PLACES:
                self._directories.pop(place, None)
            else:
                self._directories[place] = left
        if self._count <= 0:
            self._table.drop(self)


class EntryTable:
    """The archives with entries that the kernel knows."""

    def __init__(self) -> None:
        self._by_number: dict[int, ArchiveEntries] = {}
        self._by_archive: dict[FileArchive, ArchiveEntries] = {}
        #: Archives by their own inode number, the one used last at the end, and the number that each has, or had: while
        #: the kernel knows none of its entries somebody else may still go by their inode numbers.
        self._numbers: dict[int, int] = {}
        self._next = 0  #: the first number that no archive has had

    def __len__(self) -> int:
        return len(self._by_number)

    def of(self, archive: FileArchive) -> ArchiveEntries:
        """The entries of `archive`.

        Raises:
            FleeceError: too many archives are in use.
        """
        entries = self._by_archive.get(archive)
        if entries is None:
            number = self._number(archive)
            entries = ArchiveEntries(self, archive, _ENTRY | number << _PLACE_BITS)
            self._by_number[number] = self._by_archive[archive] = entries
        return entries

    def _number(self, archive: FileArchive) -> int:
        number = self._numbers.pop(archive.inode, None)
        if number is None or number in self._by_number:
            number = self._next
            if number < _ARCHIVES:
                self._next += 1
            else:
                unused = (inode for inode, number in self._numbers.items() if number not in self._by_number)
                inode = next(unused, None)
                if inode is None:
                    raise FleeceError("show", os.fsdecode(archive.path), f"{_ARCHIVES} archives are in use already")
                number = self._numbers.pop(inode)
        self._numbers[archive.inode] = number
        return number

    def find(self, inode: int) -> ArchiveEntries | None:
        """Whose entry `inode` is; None if it is no archive's entry.

        Raises:
            StaleError: that archive is not known any more.
        """
        if inode < _ENTRY:
            return None
        entries = self._by_number.get(inode >> _PLACE_BITS & _ARCHIVES - 1)
        if entries is None:
            raise StaleError("find", f"inode {inode}", "it is not known any more")
        return entries

    def drop(self, entries: ArchiveEntries) -> None:
        """The kernel knows none of these any more."""
        if self._by_archive.pop(entries.archive, None) is not None:
            del self._by_number[entries.base >> _PLACE_BITS & _ARCHIVES - 1]
