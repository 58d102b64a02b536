"""Backup access, the commands by which the QEMU of Proxmox VE makes frozen views by itself.

`backup-access-setup` freezes devices that have a fleecing image attached, and names the nodes that show them as they
were; `backup-access-teardown` ends that. The dirty bitmap is QEMU's too: it bears the name of the target. From when on
it counts QEMU does not tell, so Fleece notes it in QEMU with a *mark*, an empty bitmap that records nothing:
`fleece-since-<target>-<disk>-<backup time>` on the node that has QEMU's bitmap. docs/hypervisor.md, "Proxmox VE".

    before the setup         the mark of the new backup is added                         marks: old, new
    end, snapshot finished   the old mark is removed, then teardown with success         new
    end, otherwise           teardown without success, then the new mark is removed      old

So, whenever a run is killed: of two marks without an access the older one is right, and of one the bitmap counts from
there or earlier. Too early a start only means more to be read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from core.errors import FormatError
from hypervisor import checked
from hypervisor.bitmaps import Bitmap, BitmapName, Finished
from hypervisor.block_graph import BlockNode, OurNode, block_nodes
from hypervisor.errors import QmpAnswerError, QmpCommandError
from hypervisor.qmp import Qmp

SETUP: Final = "backup-access-setup"
TEARDOWN: Final = "backup-access-teardown"
#: The bitmap that records while an access is up.
BACKGROUND: Final = "backup-access-background-bitmap"

_MARK: Final = re.compile(r"fleece-since-(?P<target>[0-9a-f]{8})-(?P<disk>[0-9a-f]{8})-(?P<id>0|[1-9][0-9]{0,11})")
_TARGET_ID: Final = re.compile(r"fleece-(?P<target>[0-9a-f]{8})")
#: Drives whose names need no quoting.
_DRIVE: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
#: Bytes a bit of a mark stands for, the most that QEMU allows: a mark needs no memory.
_MARK_GRANULARITY: Final = 1 << 31


def target_id(target: str) -> str:
    """What an access of `target` (8 hex digits), and its bitmap, is called in QEMU."""
    return f"fleece-{target}"


async def supported(qmp: Qmp) -> str:
    """Empty if this QEMU has backup access with fleecing, else why not, in words.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    if missing := [command for command in (SETUP, TEARDOWN, "query-proxmox-support") if command not in qmp.commands]:
        return f"it lacks {', '.join(missing)}"
    where = f"{qmp.where}, query-proxmox-support"
    flags = checked.of_type(await qmp.execute("query-proxmox-support"), dict, where)
    needed = ("backup-access-api", "backup-fleecing")
    lacking = [flag for flag in needed if not checked.optional(flags, flag, bool, where)]
    return f"it does not support {', '.join(lacking)}" if lacking else ""


@dataclass(frozen=True, slots=True)
class Accessed:
    """One device of an access."""

    node: str  #: shows it as it was
    size: int  #: bytes
    action: str  #: what became of the bitmap: `used`, `new`, ...; `not-used` where QEMU says nothing
    bitmap_node: str | None
    bitmap: str | None


async def set_up(qmp: Qmp, target: str, modes: Mapping[str, str]) -> dict[str, Accessed]:
    """Freeze the devices of `modes`, each with what is to become of its bitmap: `none`, `new` or `use`.

    Raises:
        QmpCommandError: QEMU refused; then nothing was done.
        QmpAnswerError: the answer is not about these devices.
        QmpError: as `Qmp.execute`.
    """
    devices = [{"device": device, "bitmap-mode": mode} for device, mode in modes.items()]
    where = f"{qmp.where}, {SETUP}"
    answer = await qmp.execute(SETUP, {"target-id": target_id(target), "devices": devices})
    found: dict[str, Accessed] = {}
    for entry in checked.objects(answer, where):
        device = checked.field(entry, "device", str, where)
        if device not in modes or device in found:
            raise QmpAnswerError("understand", where, f"the device {checked.printable(device)!r} was not asked for")
        found[device] = Accessed(
            node=checked.field(entry, "node-name", str, where),
            size=checked.field(entry, "size", int, where),
            action=checked.optional(entry, "bitmap-action", str, where) or "not-used",
            bitmap_node=checked.optional(entry, "bitmap-node-name", str, where),
            bitmap=checked.optional(entry, "bitmap-name", str, where),
        )
    if missing := sorted(set(modes) - set(found)):
        raise QmpAnswerError("understand", where, f"nothing about the device {missing[0]}")
    return found


async def tear_down(qmp: Qmp, target: str, *, success: bool) -> None:
    """End the access of `target`; without one nothing happens.

    Raises:
        QmpCommandError: QEMU refused: the access is another target's.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    await qmp.execute(TEARDOWN, {"target-id": target_id(target), "success": success})


async def log_lines(qmp: Qmp) -> list[str]:
    """What QEMU says of the use of bitmaps, for the log; empty where it does not say, or says nonsense."""
    if "query-pbs-bitmap-info" not in qmp.commands:
        return []
    where = f"{qmp.where}, query-pbs-bitmap-info"
    try:
        return [
            checked.printable(
                f"{entry.get('drive')}: bitmap {entry.get('action')}, {entry.get('dirty')} of "
                f"{entry.get('size')} B to be read"
            )
            for entry in checked.objects(await qmp.execute("query-pbs-bitmap-info"), where)
        ]
    except (QmpCommandError, FormatError):
        return []


# -- marks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    """What says from which backup QEMU's bitmap of a target counts."""

    node: str
    name: BitmapName  #: target, disk and backup time

    @property
    def bitmap(self) -> str:
        """What it is called in QEMU."""
        return f"fleece-since-{self.name.target}-{self.name.disk}-{self.name.id}"


def marks(nodes: Iterable[BlockNode], target: str | None = None) -> list[Mark]:
    """The marks of `target` (None: of any) on `nodes`, the oldest first."""
    found = []
    for node in nodes:
        for entry in node.bitmaps:
            match = _MARK.fullmatch(str(entry.get("name")))
            if match is not None and target in (None, match["target"]):
                found.append(Mark(node.name, BitmapName(match["target"], match["disk"], int(match["id"]))))
    return sorted(found, key=lambda mark: (mark.node, mark.name.target, mark.name.disk, mark.name.id))


def access_bitmaps(nodes: Iterable[BlockNode], target: str | None = None) -> list[tuple[str, str]]:
    """Nodes and names of QEMU's bitmaps for `target` (None: for any of ours)."""
    return [
        (node.name, str(entry["name"]))
        for node in nodes
        for entry in node.bitmaps
        if (match := _TARGET_ID.fullmatch(str(entry.get("name")))) is not None and target in (None, match["target"])
    ]


def targets(nodes: Iterable[BlockNode]) -> list[str]:
    """Of which targets there is a mark or a bitmap: an access of ours that is up has one of them."""
    nodes = list(nodes)
    named = {name.removeprefix("fleece-") for _, name in access_bitmaps(nodes)}
    return sorted(named | {mark.name.target for mark in marks(nodes)})


def add_mark(mark: Mark) -> Mapping[str, Any]:
    """The action of a transaction that adds it."""
    data = {"node": mark.node, "name": mark.bitmap, "granularity": _MARK_GRANULARITY, "disabled": True}
    return {"type": "block-dirty-bitmap-add", "data": {**data, "persistent": False}}


def remove_bitmap(node: str, name: str) -> Mapping[str, Any]:
    """The action of a transaction that removes a bitmap, or a mark by its name in QEMU."""
    return {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}}


@dataclass(frozen=True, slots=True)
class Marked:
    """The marks of one target in order, at most one on a disk, each with QEMU's bitmap."""

    bitmaps: Sequence[Bitmap]  #: QEMU's, under the names that the marks give them
    remove: Sequence[Mark]  #: what must go, so that it is like this


async def in_order(nodes: Iterable[BlockNode], target: str, finished: Finished) -> Marked:
    """What the marks of `target` say; an access that is up counts as torn down without success.

    Raises:
        FleeceError: what `finished` raises.
    """
    by_name = {node.name: node for node in nodes}
    by_place: dict[tuple[str, str], list[Mark]] = {}
    for mark in marks(by_name.values(), target):
        by_place.setdefault((mark.node, mark.name.disk), []).append(mark)
    kept, remove = [], []
    for group in by_place.values():
        right: Mark | None = group[0]
        if len(group) == 2 and await finished(group[1].name.id):
            # QEMU's bitmap counts from the older one: it has all that was written since the newer one.
            right = group[1]
        elif len(group) > 2:
            right = None
        bitmap = None if right is None else _bitmap(by_name[right.node], right)
        if bitmap is not None:
            kept.append(bitmap)
        remove += [mark for mark in group if bitmap is None or mark is not right]
    return Marked(kept, remove)


def _bitmap(node: BlockNode, mark: Mark) -> Bitmap | None:
    """QEMU's bitmap on `node` under the name of `mark`; None if there is none."""
    entries = {str(entry.get("name")): entry for entry in node.bitmaps}
    entry = entries.get(target_id(mark.name.target))
    if entry is None:
        return None
    bitmap = Bitmap.parse(node.name, mark.name, entry)
    background = entries.get(BACKGROUND)
    if background is None:
        return bitmap
    since = Bitmap.parse(node.name, mark.name, background)
    return replace(bitmap, recording=since.recording, count=bitmap.count + since.count)


async def forget(qmp: Qmp, target: str | None) -> int:
    """Remove marks and QEMU's bitmaps of `target` (None: of any of ours); returns the number of bitmaps.

    Raises:
        QmpCommandError: QEMU refused; some may be gone.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    nodes = (await block_nodes(qmp)).values()
    # Marks first: a bitmap without a mark is of no use.
    await qmp.transaction([remove_bitmap(mark.node, mark.bitmap) for mark in marks(nodes, target)])
    found = access_bitmaps(nodes, target)
    await qmp.transaction([remove_bitmap(node, name) for node, name in found])
    return len(found)


# -- fleecing images as drives ----------------------------------------------------------------------------------------


async def add_drive(qmp: Qmp, name: str, options: Mapping[str, str]) -> None:
    """Attach a drive that no device uses: the form of a fleecing image that QEMU looks for before Proxmox VE 9.

    There is no command for it but that for people.

    Raises:
        QmpCommandError: QEMU refused, in its own words.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    every = {"if": "none", "id": name, **options}
    words = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in every.items())
    quoted = "".join(f"\\{char}" if char in '\\"' else char for char in words)
    said = await _said(qmp, f'drive_add auto "{quoted}"')
    if said != "OK":
        raise QmpCommandError(qmp.where, "drive_add", "GenericError", said or "it says nothing")


async def remove_drive(qmp: Qmp, name: str) -> None:
    """Remove a drive of `add_drive`.

    Raises:
        QmpCommandError: QEMU refused, in its own words.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    if said := await _said(qmp, f"drive_del {name}"):
        raise QmpCommandError(qmp.where, "drive_del", "GenericError", said)


async def _said(qmp: Qmp, line: str) -> str:
    answer = await qmp.execute("human-monitor-command", {"command-line": line})
    return checked.printable(checked.of_type(answer, str, f"{qmp.where}, human-monitor-command").strip())


# -- what killed runs have left ---------------------------------------------------------------------------------------


def fleecing_nodes(nodes: Iterable[str], children: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The nodes over fleecing images of ours that QEMU's access looks for: `<device>-fleecing`."""
    return sorted(
        name
        for name in nodes
        if name.endswith("-fleecing")
        and (ours := OurNode.parse(children.get(name, {}).get("file", ""))) is not None
        and ours.kind == "f"
    )


async def fleecing_drives(qmp: Qmp, children: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The same as drives.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, query-block"
    roots = {
        checked.field(entry, "device", str, where): checked.field(inserted, "node-name", str, where)
        for entry in checked.objects(await qmp.execute("query-block"), where)
        if (inserted := checked.optional(entry, "inserted", dict, where)) is not None
    }
    own = fleecing_nodes(roots, {name: children.get(root, {}) for name, root in roots.items()})
    return [name for name in own if _DRIVE.fullmatch(name) is not None]
