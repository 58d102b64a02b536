"""Marks by which it is noticed that a disk was made smaller and larger again since its dirty bitmap began.

QEMU cuts every bitmap to the new size when a disk becomes smaller. If it becomes as large as before afterwards, what
was cut off reads as zeros and no bitmap says so. So beside each bitmap of Fleece stands a second one that records
nothing and has one dirty bit, the disk's last: once that is cut off it is gone for good.

A bit can only be set by a write. The guest's disk is not ours to write to, so a `null-co` node of the same size is
written to, and its bitmap merged into the mark. docs/hypervisor.md, "Dirty bitmaps".
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hypervisor import checked
from hypervisor.bitmaps import our_bitmaps
from hypervisor.block_graph import BlockNode, block_nodes
from hypervisor.errors import QmpCommandError
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_client import open_nbd
from hypervisor.qmp import Qmp

#: What a disk has lost whose mark is cut off, or is not there although a bitmap is.
CUT: Final = "the disk was made smaller and larger again since the previous backup"
MISSING: Final = "the mark is missing by which a smaller disk is noticed"

_PREFIX: Final = "fleece-size-"
#: Bits of a mark at most: 1 MiB of memory, and one bit is 512 bytes of a disk of 4 GiB, 128 KiB of one of 1 TiB.
_MAX_BITS: Final = 1 << 23
_SECTOR: Final = 512
_MAX_GRANULARITY: Final = 1 << 31
#: Bitmap of the `null-co` node.
_TAIL: Final = "tail"


@dataclass(frozen=True, slots=True)
class Marked:
    """A disk whose size is to be marked."""

    number: int  #: of its nodes and exports
    device: str  #: for people
    node: str
    size: int  #: bytes
    persistent: bool


def mark_name(target: str) -> str:
    """The mark's name; there is one for each target, since their bitmaps begin at different times."""
    return _PREFIX + target


def granularity(size: int) -> int:
    """Bytes of one bit of the mark on a disk of `size` bytes: a power of two."""
    bit = _SECTOR
    while bit < _MAX_GRANULARITY and size > bit * _MAX_BITS:
        bit *= 2
    return bit


def unsure(nodes: Iterable[BlockNode], target: str) -> dict[str, str]:
    """Nodes with bitmaps of `target` that cannot be trusted, and why.

    Raises:
        QmpAnswerError: QEMU describes a bitmap with nonsense.
    """
    found = {}
    for node in nodes:
        if not our_bitmaps([node], target):
            continue
        mark = _mark(node, target)
        if mark is None or mark["recording"] or mark.get("inconsistent"):
            found[node.name] = MISSING
        elif not checked.field(dict(mark), "count", int, f"node {node.name}, {mark_name(target)}"):
            found[node.name] = CUT
    return found


def _mark(node: BlockNode, target: str) -> Mapping[str, Any] | None:
    return next((entry for entry in node.bitmaps if entry.get("name") == mark_name(target)), None)


async def remove_marks(qmp: Qmp, target: str | None, names: Sequence[str] | None = None) -> list[str]:
    """Remove the marks of `target` (None: of all) on the nodes `names` (None: all); returns what was refused, in words.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`, but for commands that are refused.
    """
    problems = []
    for node in (await block_nodes(qmp)).values():
        if names is not None and node.name not in names:
            continue
        for entry in node.bitmaps:
            name = str(entry.get("name"))
            if name == mark_name(target) if target is not None else name.startswith(_PREFIX):
                try:
                    await qmp.execute("block-dirty-bitmap-remove", {"node": node.name, "name": name})
                except QmpCommandError as error:
                    problems.append(f"the mark {name} on {node.name} stays: {error.desc}")
    return problems


async def add_marks(qmp: Qmp, target: str, disks: Sequence[Marked], address: Callable[[str], NbdAddress]) -> list[str]:
    """Mark the sizes of `disks`, which have no mark of `target`; returns what did not work, in words.

    QEMU's NBD server must run; `address` tells where an export of it is. Clean-up knows the nodes and exports.

    Raises:
        NbdTargetError: QEMU does not take the write.
        QmpError, QmpAnswerError: as `Qmp.execute`, but for commands that are refused.
    """
    problems = []
    for disk in disks:
        try:
            await _add(qmp, target, disk, address)
        except QmpCommandError as error:
            problems.append(f"the next backup reads all of {disk.device}: its size cannot be marked: {error.desc}")
    return problems


async def _add(qmp: Qmp, target: str, disk: Marked, address: Callable[[str], NbdAddress]) -> None:
    helper = f"fleece-k{disk.number}"
    bit = granularity(disk.size)
    await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": helper, "size": disk.size})
    await qmp.execute("block-dirty-bitmap-add", {"node": helper, "name": _TAIL, "granularity": bit})
    await qmp.execute(
        "block-export-add", {"type": "nbd", "id": helper, "node-name": helper, "name": helper, "writable": True}
    )
    async with open_nbd(address(helper), connections=1, writable=True) as pool:
        await pool.write(disk.size - _SECTOR, bytes(_SECTOR))
    await qmp.execute("block-export-del", {"id": helper, "mode": "hard"})
    name = mark_name(target)
    merge = {"node": disk.node, "target": name, "bitmaps": [{"node": helper, "name": _TAIL}]}
    for persistent in (True, False) if disk.persistent else (False,):
        data = {"node": disk.node, "name": name, "granularity": bit, "disabled": True, "persistent": persistent}
        add = {"type": "block-dirty-bitmap-add", "data": data}
        with contextlib.suppress(QmpCommandError) if persistent else contextlib.nullcontext():
            await qmp.transaction([add, {"type": "block-dirty-bitmap-merge", "data": merge}])
            break


async def remove_helpers(qmp: Qmp, disks: Sequence[Marked]) -> None:
    """Remove the nodes that `add_marks` has written to, when QEMU has let go of their exports.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    there = await block_nodes(qmp)
    for disk in disks:
        helper = f"fleece-k{disk.number}"
        if helper in there:
            await qmp.execute("blockdev-del", {"node-name": helper})
