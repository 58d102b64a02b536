"""Dirty bitmaps: their names, which one an incremental backup may use, why not, and how one is handed over.

Every backup adds a new bitmap before its instant T and disables the old one after T, so that a write in between is
recorded in both. When the snapshot is finished the old one goes (success); otherwise the new one is merged into the
old, which goes on recording (failure). docs/hypervisor.md, "Dirty bitmaps".

Only bitmaps whose name is `fleece-<target>-<disk>-<id>` with the target of the backup are ever touched.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, TypeAlias

from core.units import format_size
from hypervisor import checked
from hypervisor.block_graph import BlockNode, block_nodes, nodes_below
from hypervisor.discovery import Disk
from hypervisor.errors import QmpCommandError
from hypervisor.qmp import Qmp

#: Bytes one bit stands for: a chunk of a disk image.
GRANULARITY: Final = 4 * 1024**2

_NAME: Final = re.compile(r"fleece-(?P<target>[0-9a-f]{8})-(?P<disk>[0-9a-f]{8})-(?P<id>0|[1-9][0-9]{0,11})")


#: Targets of which one disk has bitmaps; each costs the guest a little time for every write, and QEMU memory.
MAX_TARGETS: Final = 16


class BitmapMode(Enum):
    """Whether a VM has dirty bitmaps, and whether they outlive its QEMU."""

    PERSISTENT = "persistent"  #: kept in the image where it is qcow2 version 3; elsewhere as TRANSIENT
    TRANSIENT = "transient"  #: lost when QEMU ends
    NONE = "none"  #: every backup reads everything


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What the previous snapshot has of one disk."""

    ctime: int  #: backup time of the snapshot, Unix seconds
    size: int  #: bytes of the disk then


#: Gives for an archive (`drive-scsi0.img`) what an incremental backup may count on, or in words why it may not.
BaseOf: TypeAlias = Callable[[str], BaseInfo | str]
#: Whether there is a finished snapshot of that backup time in the target; raises a `FleeceError` if it cannot tell.
Finished: TypeAlias = Callable[[int], Awaitable[bool]]


def target_id(*identity: str) -> str:
    """The 8 hex digits that stand for a target; `identity` is repository, namespace and group."""
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()[:8]


def disk_id(archive: str) -> str:
    """The 8 hex digits that stand for a disk in a bitmap's name."""
    return hashlib.sha256(archive.encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class BitmapName:
    """A name that Fleece gives: for which target and disk, and the backup it counts from."""

    target: str
    disk: str
    id: int  #: backup time, Unix seconds

    @classmethod
    def parse(cls, name: str) -> "BitmapName | None":
        """None if it is not a name of ours."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match["target"], match["disk"], int(match["id"]))

    def __str__(self) -> str:
        return f"fleece-{self.target}-{self.disk}-{self.id}"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A bitmap of ours as QEMU describes it."""

    node: str
    name: BitmapName
    count: int  #: dirty bytes, in whole granules
    granularity: int
    recording: bool
    busy: bool  #: exported, or used by a job
    inconsistent: bool  #: QEMU died without saving it; it can only be removed

    @classmethod
    def parse(cls, node: str, name: BitmapName, entry: Mapping[str, Any]) -> "Bitmap":
        """The bitmap that QEMU describes as `entry` of the block node `node`.

        Raises:
            QmpAnswerError: it describes none.
        """
        where = f"node {node}, dirty bitmap"
        fields = dict(entry)
        return cls(
            node,
            name,
            checked.field(fields, "count", int, where),
            checked.field(fields, "granularity", int, where),
            checked.field(fields, "recording", bool, where),
            checked.field(fields, "busy", bool, where),
            bool(checked.optional(fields, "inconsistent", bool, where)),
        )


def recording(bitmap: Bitmap, count: int) -> Bitmap:
    """`bitmap` recording `count` dirty bytes."""
    return replace(bitmap, count=count, recording=True)


def our_bitmaps(nodes: Iterable[BlockNode], target: str | None) -> list[Bitmap]:
    """The bitmaps of `target` (None: of any) on `nodes`."""
    found = []
    for node in nodes:
        for entry in node.bitmaps:
            name = BitmapName.parse(str(entry.get("name")))
            if name is not None and target in (None, name.target):
                found.append(Bitmap.parse(node.name, name, entry))
    return found


# -- what an interrupted run has left ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settlement:
    """How the bitmaps of one disk are brought into order."""

    actions: Sequence[Mapping[str, Any]]  #: for one transaction
    kept: BitmapName | None  #: the bitmap that is there and recording afterwards
    count: int = 0  #: dirty bytes of `kept` afterwards, at most
    lost: str = ""  #: why none is left, in words


def settle(bitmaps: Sequence[Bitmap], finished: bool | None) -> Settlement:
    """Bring the bitmaps of one disk on one node into order, to one recording one or none.

    `bitmaps` have the same node, target and disk. `finished` says whether the backup that added the newest of them is a
    finished snapshot; None if it does not matter (`undecided` tells). Busy ones are left alone.
    """
    free = sorted((bitmap for bitmap in bitmaps if not bitmap.busy), key=lambda bitmap: bitmap.name.id)
    broken = [bitmap for bitmap in free if bitmap.inconsistent]
    whole = [bitmap for bitmap in free if not bitmap.inconsistent]
    actions = [_remove(bitmap) for bitmap in broken]
    if len(whole) == 2 and whole[1].recording and finished is not None:
        old, new = whole
        if finished:
            return Settlement([*actions, _remove(old)], new.name, new.count)
        return Settlement([*actions, _enable(old), _merge(old, new), _remove(new)], old.name, old.count + new.count)
    if len(whole) == 1 and whole[0].recording:
        return Settlement(actions, whole[0].name, whole[0].count)
    actions += [_remove(bitmap) for bitmap in whole]
    if whole:
        # A disabled one alone: its partner had the writes since.
        return Settlement(actions, None, lost="an interrupted backup left no usable bitmap")
    return Settlement(actions, None, lost="bitmap inconsistent after a crash of QEMU" if broken else "")


def undecided(bitmaps: Sequence[Bitmap]) -> int | None:
    """The backup time on which `settle` depends; None if it does not."""
    whole = sorted((b for b in bitmaps if not b.busy and not b.inconsistent), key=lambda bitmap: bitmap.name.id)
    return whole[1].name.id if len(whole) == 2 and whole[1].recording else None


def by_disk(bitmaps: Iterable[Bitmap]) -> dict[tuple[str, str], list[Bitmap]]:
    """`bitmaps` of one target by node and disk."""
    groups: dict[tuple[str, str], list[Bitmap]] = {}
    for bitmap in bitmaps:
        groups.setdefault((bitmap.node, bitmap.name.disk), []).append(bitmap)
    return groups


async def settle_interrupted(qmp: Qmp, target: str, finished: Finished) -> dict[tuple[str, str], str]:
    """Finish what an interrupted backup to `target` has left; nodes and exports must be cleaned up before.

    Returns why a node's disk has no bitmap now, by node and disk. If `finished` raises, no bitmap was touched.

    Raises:
        FleeceError: what `finished` raises.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    groups = by_disk(our_bitmaps((await block_nodes(qmp)).values(), target))
    answers = {
        number: await finished(number)
        for number in {undecided(bitmaps) for bitmaps in groups.values()}
        if number is not None
    }
    lost = {}
    actions: list[Mapping[str, Any]] = []
    for place, bitmaps in groups.items():
        number = undecided(bitmaps)
        settlement = settle(bitmaps, None if number is None else answers[number])
        actions += settlement.actions
        if settlement.lost:
            lost[place] = settlement.lost
    await qmp.transaction(actions)
    return lost


async def hand_over(
    qmp: Qmp, names: Iterable[tuple[str, BitmapName | None, BitmapName]], *, success: bool
) -> list[str]:
    """End of a backup: the success or the failure branch for every disk (node, old bitmap or None, new bitmap).

    One transaction for all; if QEMU refuses it, one per disk. Nodes that are gone count as done. Returns what could not
    be done, in words.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`, but for commands that are refused.
    """
    nodes = await block_nodes(qmp)
    per_disk: list[tuple[str, list[Mapping[str, Any]]]] = []
    for name, old, new in names:
        if name not in nodes:
            continue
        mine = {bitmap.name: bitmap for bitmap in our_bitmaps([nodes[name]], new.target)}
        chosen = [mine[bitmap] for bitmap in (old, new) if bitmap in mine]
        if new not in mine:
            continue  # not added yet, so the old one was not touched either
        first = [] if success else [_remove(mine[new])]
        actions = first if old is None else list(settle(chosen, success).actions)
        if actions:
            per_disk.append((name, actions))
    try:
        await qmp.transaction([action for _, actions in per_disk for action in actions])
        return []
    except QmpCommandError as error:
        if len(per_disk) == 1:
            return [f"the dirty bitmap on {per_disk[0][0]} was not handed over: {error.desc}"]
    problems = []
    for name, actions in per_disk:
        try:
            await qmp.transaction(actions)
        except QmpCommandError as error:
            problems.append(f"the dirty bitmap on {name} was not handed over: {error.desc}")
    return problems


# -- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """The bitmap an incremental backup of one disk uses, or why everything is read."""

    bitmap: BitmapName | None
    base: int | None  #: backup time of the snapshot it counts from
    reason: str  #: in words; empty if incremental
    remove: Sequence[Bitmap] = ()  #: useless ones on the disk's root


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the choice for every disk of a VM depends on."""

    target: str
    mode: BitmapMode
    disks: Sequence[Disk]
    bitmaps: Sequence[Bitmap]  #: all of the target, on any node, settled
    lost: Mapping[tuple[str, str], str]  #: from `settle_interrupted`
    started: float | None  #: Unix seconds at which QEMU started, None if not known
    base_of: BaseOf
    finished: Finished
    unsure: Mapping[str, str] = field(default_factory=dict)  #: nodes whose bitmaps do not tell all, and why
    graph: Mapping[str, Mapping[str, str]] | None = None  #: the children of every block node, None if not known
    migrated: bool = False  #: this QEMU was started to take over a running VM


async def choose(disk: Disk, situation: Situation) -> Choice:
    """The bitmap for the next backup of `disk`.

    Raises:
        FleeceError: what `situation.finished` raises.
    """
    here = [bitmap for bitmap in situation.bitmaps if bitmap.node == disk.node]
    useless = tuple(bitmap for bitmap in here if not bitmap.busy)
    if situation.mode is BitmapMode.NONE or disk.written_past:
        return Choice(None, None, disk.written_past or "dirty bitmaps are switched off", useless)
    base = situation.base_of(disk.name)
    if isinstance(base, str):
        return Choice(None, None, base, useless)
    mine = [bitmap for bitmap in here if bitmap.name.disk == disk_id(disk.name)]
    if not mine:
        return Choice(None, None, _missing(disk, base, here, situation), useless)
    reason = await _unusable(disk, base, mine, situation)
    if reason:
        return Choice(None, None, reason, useless)
    return Choice(mine[0].name, base.ctime, "", tuple(bitmap for bitmap in useless if bitmap is not mine[0]))


def _missing(disk: Disk, base: BaseInfo, here: Sequence[Bitmap], situation: Situation) -> str:
    """Why the root of `disk` has no bitmap for it."""
    identity = disk_id(disk.name)
    names = {disk_id(other.name): other.device for other in situation.disks}
    roots = {other.node: other.device for other in situation.disks}
    if (disk.node, identity) in situation.lost:
        return situation.lost[disk.node, identity]
    for bitmap in here:
        if bitmap.name.disk in names:
            return f"disk moved from {names[bitmap.name.disk]}"
        return "the disk had another name at the previous backup"
    for bitmap in situation.bitmaps:
        if bitmap.name.disk == identity:
            if bitmap.node in roots:
                return f"another disk: the former one is now {roots[bitmap.node]}"
            if situation.graph is None or bitmap.node in nodes_below(situation.graph, disk.node):
                return "the disk has a new top image since the previous backup (external snapshot)"
            return "the disk has another image since the previous backup (mirrored or streamed)"
    # A backup time has whole seconds: within that second nobody knows which came first.
    if situation.started is not None and situation.started >= base.ctime + 1:
        if situation.migrated:
            return "VM migrated since the previous backup, without its dirty bitmaps"
        return "VM restarted since the previous backup"
    if any(bitmap.name.id == base.ctime for bitmap in situation.bitmaps):
        # The previous backup has left one on every disk, and those of others are still there.
        return "the disk was plugged in again, or has another image, since the previous backup"
    return "no dirty bitmap yet"


async def _unusable(disk: Disk, base: BaseInfo, mine: Sequence[Bitmap], situation: Situation) -> str:
    """Why the bitmaps `mine`, made for `disk` on its root, are of no use; empty if the only one is."""
    bitmap = mine[0]
    if any(other.inconsistent for other in mine):
        return "bitmap inconsistent after a crash of QEMU"
    if any(other.busy for other in mine):
        return "the bitmap is in use by another operation of QEMU"
    if len(mine) > 1 or not bitmap.recording:
        return "an interrupted backup left no usable bitmap"
    if any(other.name == bitmap.name and other.node != bitmap.node for other in situation.bitmaps):
        # libvirt gives an overlay the bitmaps of the image below, but empty: what they had stays behind.
        return "the disk has a new top image since the previous backup (external snapshot)"
    if bitmap.granularity != GRANULARITY:
        return f"the bitmap has a granularity of {format_size(bitmap.granularity)}"
    kept_in_image = {entry.get("name") for entry in disk.bitmaps if entry.get("persistent")}
    if str(bitmap.name) in kept_in_image and not disk.persistent_bitmaps_possible:
        return "the disk has internal snapshots now, which a dirty bitmap in the image would keep from being loaded"
    if bitmap.name.id < base.ctime:
        return "a newer snapshot was made without the dirty bitmap"
    if bitmap.name.id > base.ctime:
        kept = await situation.finished(bitmap.name.id)
        return "previous snapshot failed verification" if kept else "previous snapshot gone"
    if disk.size != base.size:
        before, now = format_size(base.size), format_size(disk.size)
        return f"size changed from {before} to {now}" if before != now else f"size changed by {disk.size - base.size} B"
    return situation.unsure.get(disk.node, "")


def too_many(others: Sequence[Bitmap]) -> list[Bitmap]:
    """Those bitmaps of other targets on one disk that must go for a new one to have room, the oldest ones."""
    free = sorted((one for one in others if not one.busy), key=lambda one: one.name.id)
    return free[: max(0, len({one.name.target for one in others}) + 1 - MAX_TARGETS)]


# -- actions of a transaction -----------------------------------------------------------------------------------------


def add(node: str, name: BitmapName, *, persistent: bool) -> Mapping[str, Any]:
    """The action that adds a recording bitmap."""
    return _action("add", node, name, granularity=GRANULARITY, persistent=persistent)


def disable(node: str, name: BitmapName) -> Mapping[str, Any]:
    """The action after which the bitmap records nothing more."""
    return _action("disable", node, name)


def _remove(bitmap: Bitmap) -> Mapping[str, Any]:
    return _action("remove", bitmap.node, bitmap.name)


def _enable(bitmap: Bitmap) -> Mapping[str, Any]:
    return _action("enable", bitmap.node, bitmap.name)


def _merge(into: Bitmap, source: Bitmap) -> Mapping[str, Any]:
    data = {"node": into.node, "target": str(into.name), "bitmaps": [str(source.name)]}
    return {"type": "block-dirty-bitmap-merge", "data": data}


def _action(verb: str, node: str, name: BitmapName, **more: object) -> Mapping[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": str(name), **more}}


async def remove(qmp: Qmp, bitmaps: Sequence[Bitmap]) -> list[str]:
    """Remove `bitmaps` one by one; returns what QEMU refused, in words.

    Raises:
        QmpError: as `Qmp.execute`, but for commands that are refused.
    """
    problems = []
    for bitmap in bitmaps:
        try:
            await qmp.transaction([_remove(bitmap)])
        except QmpCommandError as error:
            problems.append(f"the dirty bitmap {bitmap.name} on {bitmap.node} stays: {error.desc}")
    return problems
