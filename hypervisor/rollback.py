"""The disks of a running VM, to be written to: the guest is stopped, and its devices are led elsewhere meanwhile.

    before      device -> the disk's node
    meanwhile   device -> fleece-p<n> -> fleece-n<n> (nothing)         the disk's node <- fleece-o<n> <- NBD, writable
    after       device -> the disk's node, and the machine is reset

All writes go through QEMU, so that its caches know of them, and every dirty bitmap of the disk counts them. If it ends
in the middle the guest stays stopped and its devices stay where they have nothing: it never runs on half a disk. Then
only another rollback goes on; it finds everything in QEMU. docs/vm-restore.md, "Rollback".
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from core.disks import Extent
from core.errors import FleeceError
from hypervisor import checked
from hypervisor.bitmaps import GRANULARITY, Bitmap, Finished, disk_id
from hypervisor.block_graph import block_nodes, device_roots, our_exports
from hypervisor.block_graph import put_aside as nodes_put_aside
from hypervisor.discovery import Disk, capabilities, check_vm
from hypervisor.errors import QmpCommandError, QmpLostError, QmpTimeoutError, RollbackError, VmStateError
from hypervisor.flavours import DiskSelection, FlavourName
from hypervisor.leftovers import clean_killed, none_ours
from hypervisor.live_source import read_dirty_map
from hypervisor.nbd_client import NbdAddress, open_nbd
from hypervisor.qmp import Qmp, connect
from hypervisor.server_in_qemu import start_server
from hypervisor.state import WRITING, DiskState, Run, RunState, clean_dead, exclusive, half_disks
from hypervisor.targets import NbdTarget
from hypervisor.vm import flavour_of

#: Seconds for QEMU to let go of an export.
_EXPORTS_TIMEOUT_S: Final = 30.0
#: Seconds for a stopped machine to be reset.
_RESET_TIMEOUT_S: Final = 30.0
#: Seconds to wait for the QMP socket at the end, while another client has it.
_RECONNECT_TIMEOUT_S: Final = 90.0
#: Seconds for the whole end.
_END_TIMEOUT_S: Final = 240.0
#: `RunState.phase` before the first write.
_PREPARING: Final = "rollback"
#: Run states of a guest that does not run and whose disks nobody else has.
_STANDING: Final = frozenset({"paused", "prelaunch", "shutdown", "guest-panicked", "internal-error"})


@dataclass(slots=True)
class RolledDisk:
    """One disk that is written to."""

    disk: Disk
    number: int  #: of its nodes and export
    base: int | None = None  #: backup time of the snapshot that its bitmap counts from; None without one
    bitmap: str | None = None  #: its name
    reason: str = ""  #: why there is none, in words
    changed: Sequence[Extent] = ()  #: what the bitmap says

    def __str__(self) -> str:
        return self.disk.name


@dataclass(slots=True)
class Rollback:
    """What `put_aside` gives."""

    disks: Sequence[RolledDisk]
    run: Run
    state: RunState
    running: bool  #: the guest ran before: it is to go on when all is done
    again: bool  #: an earlier rollback had ended in the middle
    runs: bool = False  #: it goes on, in the end
    touched: bool = False  #: something may have been written: from then on there is no way back
    warnings: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def target(self, disk: RolledDisk) -> AsyncIterator[NbdTarget]:
        """The disk, to be written to while the block runs; durable when it ends."""
        async with open_nbd(_address(self.run, f"disk{disk.number}"), writable=True) as pool:
            if self.state.phase != WRITING:
                self.state.phase = WRITING
                await self.run.save(self.state)
            self.touched = True
            target = NbdTarget(pool, reads_zero=False)
            yield target
            await target.flush()


@asynccontextmanager
async def put_aside(
    qmp_path: str | os.PathLike[str],
    *,
    target: str,
    finished: Finished,
    run_dir: Path,
    selection: DiskSelection,
    check: Callable[[Sequence[Disk]], Sequence[Disk]],
    flavour: FlavourName | None = None,
    on_step: Callable[[str], None] = lambda _step: None,
    on_warning: Callable[[str], None] = lambda _warning: None,
) -> AsyncIterator[Rollback]:
    """Stop the VM and put its disks aside, to be written to while the block runs; then reset it and let it go on.

    If the block fails or is cancelled before anything was written, the VM goes on as if nothing had been. After that it
    stays stopped, its devices without their disks, and the error says so.

    Args:
        qmp_path: QMP socket; connected to at the beginning and at the end only.
        target: `bitmaps.target_id` of repository, namespace and group, for the dirty bitmaps.
        finished: as of `vm.frozen_view`.
        run_dir: as of `vm.frozen_view`.
        selection: which disks, and their names.
        check: given the disks that were found, returns those to be written to, or raises.
        flavour: as of `vm.frozen_view`; dirty bitmaps are used of STOCK only.
        on_step: called with a few words before each change.
        on_warning: called at the beginning with what was left of other VMs; other warnings are in `Rollback`.

    Raises:
        VmStateError: a backup runs on this QEMU, or the VM's state allows none of this.
        VmUnsupportedError, DiskNameError: as `discovery.survey` and `capabilities`.
        RollbackError: QEMU refused a step.
        QmpError, QmpAnswerError: QEMU cannot be talked to.
        FleeceError: what `check` and `finished` raise.
    """
    path = os.fspath(qmp_path)
    async with AsyncExitStack() as stack:
        for line in half_disks(await clean_dead(run_dir)):
            on_warning(line)
        async with connect(path) as qmp:
            run = stack.enter_context(exclusive(run_dir, qmp.peer))
            await capabilities(qmp, what="roll back")
            state = RunState(path, _PREPARING, target, 0, os.getpid())
            back = await _found(qmp, run, state, finished, selection, check, flavour)
            state.disks = [
                DiskState(one.number, one.disk.name, one.disk.qom_path, one.disk.node, "", one.bitmap, None)
                for one in back.disks
            ]
            if back.again:
                state.phase = WRITING
            # Killed before anything is put aside, whoever cleans up lets the guest go on.
            state.paused = back.running
            await run.save(state)
            ending = _Ending(path, back, on_step)
            stack.push_async_exit(ending)  # armed before the first change
            await _set_up(qmp, back, on_step)
        yield back


async def _found(
    qmp: Qmp,
    run: Run,
    state: RunState,
    finished: Finished,
    selection: DiskSelection,
    check: Callable[[Sequence[Disk]], Sequence[Disk]],
    flavour: FlavourName | None,
) -> Rollback:
    """The disks, and what their bitmaps are; of an earlier rollback that has not ended what it had put aside."""
    aside = await nodes_put_aside(qmp)
    kind = await flavour_of(qmp, flavour)
    before = await run.load() if aside else None
    if aside:
        await _end_server(qmp, ours=before is None or before.nbd_server)
    else:
        undone = await clean_killed(qmp, run, None)
        if undone.problems:
            raise VmStateError("remove what a killed run has left in the VM at", qmp.where, "; ".join(undone.problems))
    settled = await kind.settle(qmp, state.target, finished)
    roots = {f"fleece-p{number}": node for number, node in aside.items()}
    disks = list(check((await kind.survey(qmp, selection, instead=roots)).disks))
    if missing := set(aside.values()) - {disk.node for disk in disks}:
        also = checked.printable(", ".join(sorted(missing)), 500)
        raise VmStateError(
            "roll back the VM at", qmp.where, f"the rollback before has not ended, and had {also} too",
            "roll back all the disks that it was to",
        )  # fmt: skip
    await check_vm(qmp, disks, what="roll back")
    nodes = await block_nodes(qmp)
    taken = {ours.number for node in nodes.values() if (ours := node.ours) is not None}
    numbers = (number for number in range(len(disks) + len(taken) + 1) if number not in taken)
    by_node = {node: number for number, node in aside.items()}
    rolled = [RolledDisk(disk, by_node[disk.node] if disk.node in by_node else next(numbers)) for disk in disks]
    for one in rolled:
        _choose(one, settled.bitmaps if kind.name is FlavourName.STOCK else (), settled.unsure)
    status = await _status(qmp)
    if status != "running" and status not in _STANDING:
        raise VmStateError("roll back the VM at", qmp.where, f"its state is {status}")
    # What the rollback before has stopped goes on; that it was running is taken for granted if nothing says otherwise.
    running = status == "running" or (bool(aside) and (before is None or before.paused))
    return Rollback(rolled, run, state, running=running, again=bool(aside))


def _choose(one: RolledDisk, bitmaps: Sequence[Bitmap], unsure: Mapping[str, str]) -> None:
    disk = one.disk
    mine = [bitmap for bitmap in bitmaps if bitmap.node == disk.node and bitmap.name.disk == disk_id(disk.name)]
    if disk.written_past or disk.node in unsure:
        one.reason = disk.written_past or unsure[disk.node]
    elif len(mine) != 1 or not mine[0].recording or mine[0].busy or mine[0].inconsistent:
        one.reason = "no dirty bitmap tells what has changed"
    elif any(bitmap.name == mine[0].name and bitmap.node != disk.node for bitmap in bitmaps):
        # libvirt gives an overlay the bitmaps of the image below, but empty: what they had stays behind.
        one.reason = "the disk has a new top image since the backup that its dirty bitmap counts from"
    elif mine[0].granularity != GRANULARITY:
        one.reason = "its dirty bitmap has another granularity"
    else:
        one.base, one.bitmap = mine[0].name.id, str(mine[0].name)


async def _status(qmp: Qmp) -> str:
    where = f"{qmp.where}, query-status"
    return checked.field(checked.of_type(await qmp.execute("query-status"), dict, where), "status", str, where)


def _address(run: Run, export: str) -> NbdAddress:
    return NbdAddress.unix(run.socket, export)


def _pass_through(one: RolledDisk, below: str) -> dict[str, object]:
    return {"driver": "raw", "node-name": f"fleece-p{one.number}", "file": below, "size": one.disk.size}


# -- the way there ----------------------------------------------------------------------------------------------------


async def _set_up(qmp: Qmp, back: Rollback, on_step: Callable[[str], None]) -> None:
    try:
        on_step("stop the guest")
        await qmp.execute("stop")
        on_step("put its disks aside")
        await _lead_elsewhere(qmp, back)
        on_step("start the NBD server")
        await start_server(qmp, back.run, back.state, disks=len(back.disks), fault=RollbackError)
        for one in back.disks:
            if one.bitmap is not None:
                await _read_map(qmp, back, one)
        for one in back.disks:
            await _export(qmp, one, "e", f"fleece-o{one.number}", f"disk{one.number}", writable=True)
    except QmpCommandError as error:
        raise RollbackError("put the disks aside of the VM at", qmp.where, str(error)) from error


async def _lead_elsewhere(qmp: Qmp, back: Rollback) -> None:
    there = await block_nodes(qmp)
    roots = dict(await device_roots(qmp))
    for one in back.disks:
        node, passing = one.disk.node, f"fleece-p{one.number}"
        # That it is there tells the next rollback, and every backup, what is going on: first come, last to go.
        wanted: list[dict[str, object]] = [{"driver": "raw", "node-name": f"fleece-o{one.number}", "file": node}]
        size = one.disk.size
        wanted.append({"driver": "null-co", "node-name": f"fleece-n{one.number}", "size": size, "read-zeroes": True})
        wanted.append(_pass_through(one, node))
        for options in wanted:
            if options["node-name"] not in there:  # else by the rollback before
                await qmp.execute("blockdev-add", options)
        if roots.get(one.disk.qom_path) != passing:
            await qmp.qom_set(one.disk.qom_path, "drive", passing)
    aside = [_pass_through(one, f"fleece-n{one.number}") for one in back.disks]
    await qmp.execute("blockdev-reopen", {"options": aside})


async def _read_map(qmp: Qmp, back: Rollback, one: RolledDisk) -> None:
    bitmap = {"node": one.disk.node, "name": one.bitmap}
    await _export(qmp, one, "m", f"fleece-o{one.number}", f"map{one.number}", writable=False, bitmaps=[bitmap])
    address = _address(back.run, f"map{one.number}")
    one.changed = await read_dirty_map(address, one.bitmap or "", one.disk.size, one.disk.device)
    # An exported bitmap is busy, and would not count the writes that are to come.
    await _end_exports(qmp)


async def _export(qmp: Qmp, one: RolledDisk, kind: str, node: str, name: str, **options: object) -> None:
    export = {"type": "nbd", "id": f"fleece-{kind}{one.number}", "node-name": node, "name": name, **options}
    await qmp.execute("block-export-add", export)


# -- the way back -----------------------------------------------------------------------------------------------------


#: How a VM is left that was not rolled back to the end, by how far it came.
_GONE: Final = (
    "the VM's QEMU has ended, and the disks hold a part of the snapshot only: restore them before it is started again"
)
_HALF: Final = (
    "the VM stays stopped, and its devices are without their disks, which hold a part of the snapshot only: "
    "roll it back again, to this or another snapshot, before it is let go on"
)
_WHOLE: Final = (
    "the disks are those of the snapshot, but the VM stays stopped, since it was not reset: roll it back again, or end "
    "its QEMU and start it"
)
_AS_BEFORE: Final = (
    "nothing was written, but the VM stays stopped, and its devices may be without their disks: roll it back again, or "
    "end its QEMU and start it, before it is let go on"
)


class _Ending:
    """The end of a rollback, as an exit callback."""

    def __init__(self, path: str, back: Rollback, on_step: Callable[[str], None]) -> None:
        self._path, self._back, self._on_step = path, back, on_step
        self._is_back = False  #: the devices have their disks again

    async def __call__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        back = self._back
        put_back = error is None or (not back.touched and not back.again)
        problem = ""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _END_TIMEOUT_S) as scope:
            try:
                async with connect(self._path, timeout_s=_RECONNECT_TIMEOUT_S) as qmp:
                    if qmp.peer != back.run.peer:
                        raise RollbackError("go on with the VM at", self._path, "another QEMU answers there now")
                    await self._end(qmp, put_back=put_back, reset=error is None)
            except FleeceError as failed:
                problem = str(failed)
        if scope.cancelled_caught:
            problem = f"it was not done within {_END_TIMEOUT_S:.0f} s"
        if put_back and not problem:
            return False
        text = self._left(whole=error is None)
        if problem and text is not _GONE:
            text = f"{problem}; {text}"
        if isinstance(error, Exception):
            error.add_note(text)
            return False
        raise RollbackError("roll back the VM at", self._path, text) from error

    def _left(self, *, whole: bool) -> str:
        """How the VM is left, in words."""
        back = self._back
        untouched = not back.touched and not back.again
        if not back.run.peer.alive():
            return "the VM's QEMU has ended" if untouched or (whole and self._is_back) else _GONE
        if untouched:
            return _AS_BEFORE
        return _WHOLE if whole and self._is_back else _HALF

    async def _end(self, qmp: Qmp, *, put_back: bool, reset: bool) -> None:
        back = self._back
        await _end_server(qmp, ours=back.state.nbd_server)
        if not put_back:
            return
        self._on_step("put the disks back")
        await self._put_back(qmp)
        self._is_back = True
        try:
            goes_on = await self._reset(qmp) if reset else True
            if not goes_on:
                back.run.forget()  # else the next one would let it go on
            # Last: as long as they are there, nobody lets a machine go on that remembers other disks.
            await self._remove(qmp, "o")
            if goes_on and back.running:
                self._on_step("let the guest go on")
                await qmp.execute("cont")
                back.runs = True
        except QmpLostError:
            if not reset:
                raise
            back.warnings.append("the VM's QEMU ended when the machine was reset (-no-reboot): start it again")
        back.run.forget()

    async def _put_back(self, qmp: Qmp) -> None:
        back = self._back
        roots = {node: path for path, node in await device_roots(qmp)}
        mine = [one for one in back.disks if f"fleece-p{one.number}" in roots]
        there = await block_nodes(qmp)
        passing = [one for one in back.disks if f"fleece-p{one.number}" in there]
        if passing:
            await qmp.execute("blockdev-reopen", {"options": [_pass_through(one, one.disk.node) for one in passing]})
        for one in mine:
            await qmp.qom_set(one.disk.qom_path, "drive", one.disk.node)
        await self._remove(qmp, "pn")

    async def _remove(self, qmp: Qmp, letters: str) -> None:
        there = await block_nodes(qmp)
        for one in self._back.disks:
            for letter in letters:
                if f"fleece-{letter}{one.number}" in there:
                    await qmp.execute("blockdev-del", {"node-name": f"fleece-{letter}{one.number}"})

    async def _reset(self, qmp: Qmp) -> bool:
        """Reset the machine; False, with a warning, if it is not to go on: what it remembers of its disks is wrong."""
        self._on_step("reset the machine")
        await qmp.execute("system_reset")
        try:
            await qmp.poll("query-status", _was_reset, timeout_s=_RESET_TIMEOUT_S)
        except QmpTimeoutError:
            self._back.warnings.append(
                "the disks are rolled back, but QEMU did not reset the machine (-no-reboot with -no-shutdown): "
                "it stays stopped; end its QEMU and start it again"
            )
            return False
        return True


def _was_reset(answer: object) -> bool:
    return isinstance(answer, dict) and answer.get("status") == "prelaunch"


async def _end_server(qmp: Qmp, *, ours: bool) -> None:
    """Remove the exports of ours, and stop the server if it is `ours`.

    Raises:
        VmStateError: QEMU does not let go of them.
    """
    await _end_exports(qmp)
    if ours and not (await our_exports(qmp))[1]:
        with contextlib.suppress(QmpCommandError):  # it may not have been started yet
            await qmp.execute("nbd-server-stop")


async def _end_exports(qmp: Qmp) -> None:
    """Remove the exports of ours.

    Raises:
        VmStateError: QEMU does not let go of them.
    """
    ours, _ = await our_exports(qmp)
    for name in ours:
        with contextlib.suppress(QmpCommandError):  # it may go by itself
            await qmp.execute("block-export-del", {"id": name, "mode": "hard"})
    try:
        await qmp.poll("query-block-exports", none_ours, timeout_s=_EXPORTS_TIMEOUT_S)
    except QmpTimeoutError as error:
        raise VmStateError("end the exports of the VM at", qmp.where, "QEMU holds on to them") from error
