"""Undoing what Fleece has added to a QEMU, from any state, by looking at QEMU alone.

The end of a backup, the undoing of a half-done set-up and the removal of what a killed run has left are one and the
same work, so there is one function for it. Its order is that of docs/hypervisor.md, "Clean-up": exports, NBD server,
frozen views (or QEMU's own backup access), then the guest is freed, then devices are set back and nodes deleted.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import trio

from core.errors import os_reason
from core.limits import in_io_thread
from hypervisor import access, checked
from hypervisor.block_graph import OurNode, block_nodes, children, device_roots, our_exports, put_aside
from hypervisor.errors import QmpCommandError, QmpTimeoutError, VmStateError
from hypervisor.libvirt_nodes import remove_orphans
from hypervisor.qmp import Qmp
from hypervisor.scratch import hanging, image_prefix, remove_image
from hypervisor.state import Run, RunState, left_state

#: Seconds for QEMU to let go of its exports.
_EXPORTS_TIMEOUT_S: Final = 30.0
#: Seconds a killed run's fleecing image may hang before clean-up gives up.
HANGING_TIMEOUT_S: Final = 30.0
HANGS: Final = "the scratch folder hangs, and so would the guest if its filters were removed now"
#: A bitmap that stands, while a backup runs, on disks that get none: see `stock.py`.
GUARD: Final = "fleece-guard"
#: Seconds for an unplugged device to go.
_UNPLUG_TIMEOUT_S: Final = 5.0


@dataclass(slots=True)
class Undone:
    """What `undo` has done and could not do; sentences for people."""

    actions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  #: left-overs that a later run has to remove
    kept: list[str] = field(default_factory=list)  #: harmless nodes that must stay because others stand on them
    images: bool = True  #: no fleecing image is open in QEMU any more
    #: QEMU holds on to an export, since its reader takes no answers: a command that waits for all requests, as every
    #: transaction does, would make QEMU stand still, and the guest with it.
    held: bool = False

    async def attempt(self, what: str, command: Awaitable[object]) -> bool:
        """Await `command`; a refusal becomes a problem."""
        try:
            await command
        except QmpCommandError as error:
            self.problems.append(f"could not {what}: {error.desc}")
            return False
        return True


class EndOfAccess(NamedTuple):
    """How QEMU's backup access is to end; of a killed run it is always without success."""

    target: str  #: 8 hex digits
    success: bool  #: the bitmaps count from its setup


async def undo(qmp: Qmp, *, server: bool, access_ends: EndOfAccess | None = None) -> Undone:
    """Remove every export and block node of ours and set the devices back; the caller holds the lock of this QEMU.

    `server` says that a run of ours started the NBD server, `access_ends` that it set up an access. Own NBD connections
    must be closed before. Bitmaps are left alone, but for those of an access. Cancelled, it can be run again.

    Raises:
        QmpError, QmpAnswerError: QEMU is gone, does not answer, or answers nonsense; refusals are in the result.
    """
    undone = Undone(images=False)
    if not await _remove_exports(qmp, undone, server):
        return undone
    if access.TEARDOWN in qmp.commands:
        await _end_access(qmp, undone, access_ends)
    # A view must go before the guest can be freed: QEMU refuses the other order.
    for node in await _ours(qmp, "s"):
        await undone.attempt(f"remove the frozen view {node}", _delete(qmp, node))
    below = await _free_guest(qmp, undone)
    await _set_devices_back(qmp, undone, below)
    await _remove_nodes(qmp, undone, below)
    await _remove_guards(qmp, undone)
    return undone


async def _remove_exports(qmp: Qmp, undone: Undone, server: bool) -> bool:
    """False if QEMU holds on to one: then nothing below may be touched, and the NBD server must not be stopped."""
    ours, others = await our_exports(qmp)
    for name in ours:
        # It may go by itself in between; what counts is that it is gone in the end.
        await Undone().attempt("", qmp.execute("block-export-del", {"id": name, "mode": "hard"}))
        undone.actions.append(f"removed the export {name}")
    if ours:
        try:
            await qmp.poll("query-block-exports", none_ours, timeout_s=_EXPORTS_TIMEOUT_S)
        except QmpTimeoutError:
            undone.problems.append(f"QEMU still holds the exports {', '.join(ours)}")
            undone.held = True
            return False
        _, others = await our_exports(qmp)
    if (server or ours) and not others:
        try:
            await qmp.execute("nbd-server-stop")
            undone.actions.append("stopped the NBD server")
        except QmpCommandError as error:
            if "not running" not in error.desc:
                undone.problems.append(f"could not stop the NBD server: {error.desc}")
    return True


async def _end_access(qmp: Qmp, undone: Undone, ends: EndOfAccess | None) -> None:
    """End a backup access of ours, and remove the nodes and drives that it has used."""
    nodes, graph = await block_nodes(qmp), await children(qmp)
    used, drives = access.fleecing_nodes(nodes, graph), await access.fleecing_drives(qmp, graph)
    if ends is not None:
        await undone.attempt("end QEMU's backup access", access.tear_down(qmp, ends.target, success=ends.success))
    elif used or drives:
        for target in access.targets(nodes.values()):
            # Refused where the access is another one's. If it was ours and goes on, the nodes cannot go.
            await Undone().attempt("", access.tear_down(qmp, target, success=False))
    for node in used:
        await undone.attempt(f"remove the block node {node}", qmp.execute("blockdev-del", {"node-name": node}))
    for drive in drives:
        await undone.attempt(f"remove the drive {drive}", access.remove_drive(qmp, drive))
    if (used or drives) and not undone.problems:
        undone.actions.append("ended QEMU's backup access")


def none_ours(answer: object) -> bool:
    """Whether `query-block-exports` lists no export of ours; False too for nonsense."""
    return isinstance(answer, list) and not any(
        isinstance(export, dict) and str(export.get("id")).startswith("fleece-") for export in answer
    )


async def _free_guest(qmp: Qmp, undone: Undone) -> Mapping[str, str]:
    """Lead the guest's writes past the copy-before-write filters; returns what each pass-through node stands on."""
    below, filtered = await _standing_on(qmp)
    if not filtered:
        return below
    attempt = Undone()
    if not await attempt.attempt("free the disks", _reopen(qmp, filtered)):
        for name, child in filtered.items():
            if not await undone.attempt(f"take the filter out of the way of {child}", _reopen(qmp, {name: child})):
                del below[name]
    undone.actions.append(f"freed {', '.join(sorted(below[name] for name in filtered if name in below))}")
    return below


async def _standing_on(qmp: Qmp) -> tuple[dict[str, str], dict[str, str]]:
    """What each pass-through node stands on, filters left out; and the same for those with a filter below them."""
    graph = await children(qmp)
    below: dict[str, str] = {}
    filtered: dict[str, str] = {}
    for node in await _ours(qmp, "p"):
        child = graph.get(str(node), {}).get("file")
        ours = OurNode.parse(child) if child is not None else None
        if ours is not None and ours.kind == "c":
            # Not the root of the set-up: somebody may have put another node between by now.
            child = graph.get(str(ours), {}).get("file")
            if child is not None:
                filtered[str(node)] = child
        if child is not None:
            below[str(node)] = child
    return below, filtered


async def _set_devices_back(qmp: Qmp, undone: Undone, below: Mapping[str, str]) -> None:
    """Only where the device's root is still ours: an overlay that was put on top must not be thrown away."""
    # The time is for refusals only: on slow storage every switch takes long, and none may be left out.
    deadline = trio.current_time() + _UNPLUG_TIMEOUT_S
    while True:
        refused: dict[str, str] = {}
        for device, root in await device_roots(qmp):
            if root not in below:
                continue
            if error := await _refused(qmp.qom_set(device, "drive", below[root])):
                refused[device] = error
            else:
                undone.actions.append(f"set {device} back to {below[root]}")
        if not refused or trio.current_time() > deadline:
            break
        # A device that is being unplugged is listed for a moment although it cannot be reached any more.
        await trio.sleep(0.1)
    undone.problems += [f"could not set {device} back: {error}" for device, error in refused.items()]


async def _remove_nodes(qmp: Qmp, undone: Undone, below: Mapping[str, str]) -> None:
    there = await _ours(qmp, "pcftk")
    used = {root for _, root in await device_roots(qmp)}
    for node in (node for node in there if node.kind == "p"):
        if str(node) in used:
            undone.problems.append(f"a device still uses {node}")
            continue
        if node_error := await _refused(_delete(qmp, node)):
            if str(node) in below:
                undone.kept.append(
                    f"the node {node} stays above {below[str(node)]}, where it does no harm: {node_error}"
                )
            else:
                undone.problems.append(f"could not remove {node}: {node_error}")
    for kind, what in (("c", "filter"), ("f", "fleecing image"), ("t", "TPM's state"), ("k", "helper")):
        for node in (node for node in there if node.kind == kind):
            await undone.attempt(f"remove the {what} {node}", _delete(qmp, node))
    left = await _ours(qmp, "pcfstk")
    undone.images = not any(node.kind == "f" for node in left)
    if there and not left:
        undone.actions.append("removed the block nodes")


async def _remove_guards(qmp: Qmp, undone: Undone) -> None:
    for node in (await block_nodes(qmp)).values():
        if any(bitmap.get("name") == GUARD for bitmap in node.bitmaps):
            removal = qmp.execute("block-dirty-bitmap-remove", {"node": node.name, "name": GUARD})
            await undone.attempt(f"remove the bitmap {GUARD} on {node.name}", removal)


async def _refused(command: Awaitable[object]) -> str:
    try:
        await command
    except QmpCommandError as error:
        return error.desc
    return ""


async def _ours(qmp: Qmp, kinds: str) -> list[OurNode]:
    nodes = (node.ours for node in (await block_nodes(qmp)).values())
    return sorted(node for node in nodes if node is not None and node.kind in kinds)


async def _delete(qmp: Qmp, node: OurNode) -> None:
    await qmp.execute("blockdev-del", {"node-name": str(node)})


async def _reopen(qmp: Qmp, files: Mapping[str, str]) -> None:
    options = [{"driver": "raw", "node-name": name, "file": child} for name, child in files.items()]
    await qmp.execute("blockdev-reopen", {"options": options})


@dataclass(frozen=True, slots=True)
class Left:
    """What a killed run has left in a QEMU and of its files, as `clean_killed` would find it."""

    things: Sequence[str]  #: in words, empty if there is nothing
    roots: Mapping[str, str]  #: the node on which a node stands that was put under a device, by the latter
    bitmaps_free: bool  #: a bitmap that is busy is so because of an export that clean-up removes


async def look_for_left(qmp: Qmp, run_dir: Path) -> Left:
    """What the next run would remove first; changes nothing.

    Raises:
        VmStateError: a run works on this QEMU now, so that nothing of it is left over; and as `clean_killed`.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    await _refuse_half_disks(qmp)
    state = await left_state(run_dir, qmp.peer)
    exports, _ = await our_exports(qmp)
    nodes = [str(node) for node in await _ours(qmp, "pcfstk")]
    images = [] if state is None else state.images
    there = await in_io_thread(lambda: [str(image) for image in images if image.exists()])
    below, _ = await _standing_on(qmp)
    if access.TEARDOWN in qmp.commands:
        graph = await children(qmp)
        used = [*access.fleecing_nodes(graph, graph), *await access.fleecing_drives(qmp, graph)]
        nodes += used
        below |= await _below_access(qmp, graph) if used else {}
    found = (("export", sorted(exports)), ("block node", nodes), ("fleecing image", there))
    things = [f"the {kind}{'s' if len(names) > 1 else ''} {', '.join(names)}" for kind, names in found if names]
    return Left(things, below, bool(exports))


async def _below_access(qmp: Qmp, graph: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What the filters that QEMU's access has put under devices stand on."""
    nodes = await block_nodes(qmp)
    roots = [root for _, root in await device_roots(qmp)]
    filters = [root for root in roots if root in nodes and nodes[root].driver == "copy-before-write"]
    return {root: graph[root]["file"] for root in filters if "file" in graph.get(root, {})}


async def clean_killed(qmp: Qmp, run: Run, scratch: Path | None) -> Undone:
    """Remove what killed runs have left in this QEMU and of its files; bitmaps are left alone.

    Raises:
        VmStateError: a rollback has ended in the middle: the VM must not have its disks back, nor be backed up.
        QmpError, QmpAnswerError: as `undo`.
    """
    await _refuse_half_disks(qmp)
    state = await run.load()
    if await hanging(state.images if state is not None else (), HANGING_TIMEOUT_S):
        return Undone(problems=[HANGS], images=False)
    resumed = state is not None and state.paused and await _resume(qmp)
    # Where nothing is written down, frozen views tell: they outlive the server that was started for them.
    undone = await undo(qmp, server=bool(await _ours(qmp, "s")) if state is None else state.nbd_server)
    if not undone.problems and state is not None:
        undone.actions += await remove_orphans(qmp, [disk.root for disk in state.disks])
    if resumed:
        undone.actions.insert(0, "let the guest go on that was paused")
    if undone.images:
        await remove_files(run, state, scratch, undone)
    return undone


async def _refuse_half_disks(qmp: Qmp) -> None:
    if aside := await put_aside(qmp):
        disks = checked.printable(", ".join(aside.values()), 500)
        raise VmStateError(
            "use the VM at", qmp.where,
            f"a rollback has ended in the middle: {disks} may hold a part of a snapshot only",
            "roll back again: fleece vm restore SNAPSHOT --rollback ...",
        )  # fmt: skip


async def _resume(qmp: Qmp) -> bool:
    """Let a guest go on that a killed run has paused, if the child that should have done it has not."""
    where = f"{qmp.where}, query-status"
    status = checked.field(checked.of_type(await qmp.execute("query-status"), dict, where), "status", str, where)
    if status == "paused":
        await qmp.execute("cont")
    return status == "paused"


async def remove_files(run: Run, state: RunState | None, scratch: Path | None, undone: Undone) -> None:
    """Remove the fleecing images of `run`'s QEMU, and its state unless a problem is left."""
    try:
        await in_io_thread(_remove_files, run, state, scratch, undone)
    except OSError as error:  # a scratch folder whose disk is gone cannot even be looked into
        undone.problems.append(f"could not remove all files of the run: {os_reason(error)}")


def _remove_files(run: Run, state: RunState | None, scratch: Path | None, undone: Undone) -> None:
    paths = set(state.images) if state is not None else set()
    prefix = image_prefix(run.peer)
    if scratch is not None and scratch.is_dir():
        paths |= set(scratch.glob(f"{prefix}*.raw"))
    for path in sorted(paths):
        if not path.name.startswith(prefix) or not path.exists():
            continue
        try:
            remove_image(path)
            undone.actions.append(f"removed the fleecing image {path}")
        except OSError as error:
            undone.problems.append(f"could not remove the fleecing image {path}: {os_reason(error)}")
    if not undone.problems:
        run.forget()
