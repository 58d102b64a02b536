"""Fleecing: a frozen view of the disks of a running VM, set up in QEMU and taken down again.

What all flavours share: the state that is written down before each step, the exports, reading the old bitmaps, and the
order of the end. `stock.StockFleecing` and `proxmox.ProxmoxFleecing` are the two that change a QEMU. The steps, their
order and the reasons: docs/hypervisor.md, "A backup step by step". What has gone wrong at any step is undone by looking
at QEMU alone (`leftovers.py`).
"""

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import trio

from core.disks import Extent, ReadPlan
from core.errors import os_reason
from core.limits import in_io_thread
from hypervisor.bitmaps import BitmapName, Choice
from hypervisor.block_graph import block_nodes
from hypervisor.discovery import Capabilities, Disk
from hypervisor.errors import FleecingError, QmpCommandError, QmpConnectError, QmpError, QmpTimeoutError
from hypervisor.flavours import Order, Standstill
from hypervisor.guest_agent import frozen
from hypervisor.leftovers import HANGS, Undone, none_ours, remove_files
from hypervisor.live_source import read_dirty_map
from hypervisor.nbd_client import NbdAddress, NbdSourceError
from hypervisor.pause import Pause, Paused, paused
from hypervisor.qmp import Qmp, connect
from hypervisor.scratch import Scratch, hanging
from hypervisor.server_in_qemu import start_server
from hypervisor.state import DiskState, Run, RunState

T = TypeVar("T")

#: Seconds for the whole end of a backup: a hanging fleecing image holds QEMU up to 45 s, exports 30 s.
TEARDOWN_TIMEOUT_S: Final = 240.0
#: Seconds to wait for the QMP socket at the end of a backup, while another client has it.
_RECONNECT_TIMEOUT_S: Final = 90.0
#: Seconds to wait for a hanging fleecing image.
_HANGING_TIMEOUT_S: Final = 120.0
#: Seconds for QEMU to let go of the map exports.
_MAP_TIMEOUT_S: Final = 30.0

#: Called with a few words before each step that changes QEMU.
OnStep = Callable[[str], None]


@dataclass(slots=True)
class FleecedDisk:
    """One disk of a backup."""

    disk: Disk
    choice: Choice  #: the old bitmap, or why everything is read
    number: int  #: of its nodes and exports
    new: BitmapName | None  #: the bitmap that starts with this backup, None without one
    image: Path  #: the fleecing image
    export: str  #: name of its export for reading
    view: str  #: the node that shows the disk as it was; empty as long as QEMU has not named it
    changed: list[Extent] | None = None  #: what the old bitmap says, None for a full read
    persistent: bool = False  #: the new bitmap is kept in the image

    @property
    def plan(self) -> ReadPlan:
        """What is read, and why."""
        return ReadPlan(self.choice.base, self.choice.reason)

    @property
    def state(self) -> DiskState:
        """What is written down of it."""
        old = self.choice.bitmap
        return DiskState(
            self.number,
            self.disk.name,
            self.disk.qom_path,
            self.disk.node,
            str(self.image),
            None if old is None else str(old),
            None if self.new is None else str(self.new),
        )


def run_state(order: Order, disks: Sequence[FleecedDisk]) -> RunState:
    """What is written down of a run before its first step."""
    own = os.getpid()
    return RunState(order.qmp_path, "begin", order.target, order.new_id, own, disks=[disk.state for disk in disks])


class DirtyMap(NamedTuple):
    """A bitmap that says what to read of a disk."""

    disk: FleecedDisk
    node: str  #: the block node that has it
    name: str


@dataclass(slots=True, kw_only=True)
class Fleecing(ABC):
    """One backup's changes to one QEMU: made by `set_up`, undone by `tear_down`, which is armed before it."""

    qmp_path: str
    run: Run
    able: Capabilities
    scratch: Scratch
    state: RunState
    disks: Sequence[FleecedDisk]
    standstill: Standstill
    cbw_timeout_s: int
    at_instant: Callable[[Qmp], Awaitable[None]] | None
    on_step: OnStep
    instant: float = 0.0  #: Unix seconds of T
    frozen_s: float = 0.0  #: seconds from freeze sent to thaw answered
    warnings: list[str] = field(default_factory=list)

    def address(self, disk: FleecedDisk) -> NbdAddress:
        """Where the data export of `disk` is."""
        return NbdAddress.unix(self.run.socket, disk.export)

    @contextlib.contextmanager
    def telling_of_a_crash(self) -> Iterator[None]:
        """An NBD error of the block means something else when QEMU has ended: then the error says that.

        Raises:
            FleecingError: QEMU has ended.
        """
        try:
            yield
        except NbdSourceError as error:
            if self.run.peer.alive():
                raise
            raise FleecingError("read the disks of the VM at", self.qmp_path, "its QEMU has ended") from error

    # -- set-up -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def set_up(self, qmp: Qmp) -> None:
        """Make the views. After an error or cancellation `tear_down` undoes whatever was done.

        Raises:
            FleecingError: QEMU refused a step, or the state cannot be written down.
            VmStateError: another backup is under way.
            SourceError: a map cannot be read.
            QmpError, QmpAnswerError: as `Qmp.execute`.
        """

    def distrust(self, archive: str) -> None:  # noqa: B027 - mostly there is nothing to be done
        """The snapshot that the bitmap of `archive` counts from is of no use: without success it is not used again."""

    @abstractmethod
    async def _undo(self, qmp: Qmp, undone: Undone, *, success: bool) -> None:
        """Undo everything in QEMU and hand the bitmaps over; what could not be done goes to `undone`."""

    async def _step(self, phase: str, *, nbd_server: bool = False) -> None:
        self.state.phase = phase
        self.state.nbd_server |= nbd_server
        await self.run.save(self.state)
        self.on_step(phase)

    async def _add_image(
        self, qmp: Qmp, disk: FleecedDisk, name: str, options: Callable[[str], Mapping[str, object]]
    ) -> None:
        """Make the fleecing image of `disk` and the node `name` over it; `options` are the node's, by file name."""
        path = await self.scratch.create(disk.image.name, disk.disk.size)
        try:
            await qmp.execute("blockdev-add", options(str(path)))
        except QmpCommandError as refused:
            # Another user, a container, a security module: it may take an open file all the same.
            await self._add_open_image(qmp, path, options, refused)
        node = (await block_nodes(qmp)).get(name)
        if node is None or node.size != disk.disk.size:
            size = "missing" if node is None else f"{node.size} B"
            raise FleecingError("make a fleecing image for", disk.disk.device, f"it is {size}, not {disk.disk.size} B")

    async def _add_open_image(
        self, qmp: Qmp, path: Path, options: Callable[[str], Mapping[str, object]], refused: QmpCommandError
    ) -> None:
        descriptor = await in_io_thread(lambda: os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
        try:
            filename = await qmp.add_fd(descriptor)
            try:
                await qmp.execute("blockdev-add", options(filename))
            finally:
                with trio.CancelScope(shield=True), contextlib.suppress(QmpError):
                    await qmp.remove_fd_set(filename)
        except QmpCommandError as error:
            raise FleecingError(
                "give QEMU the fleecing image",
                str(path),
                refused.desc,
                "choose a scratch folder that QEMU's user may read and write",
            ) from error
        finally:
            os.close(descriptor)

    async def _set_instant(self, qmp: Qmp, switch: Callable[[], Awaitable[T]]) -> T:
        """Await `switch`, which puts the disks under their filters, while the guest's file systems stand still."""
        freeze = None
        pause = Paused()
        try:
            async with AsyncExitStack() as stack:
                still = self.standstill
                freeze = await stack.enter_async_context(frozen(still.agent, mount_points=still.mount_points))
                if still.pause is Pause.ALWAYS or (still.pause is Pause.WITHOUT_AGENT and not freeze.holding):
                    pause = await stack.enter_async_context(paused(qmp, self.qmp_path, self._note_pause))
                answer = await switch()
                freeze.serve()
                self.instant = time.time()
                if self.at_instant is not None:
                    await self.at_instant(qmp)
                return answer
        finally:
            if freeze is not None:
                self.frozen_s = freeze.frozen_s or pause.seconds
                self.warnings += freeze.warnings
            if pause.seconds:
                self.on_step(f"the guest was paused for {pause.seconds:.3f} s")

    async def _note_pause(self, paused: bool) -> None:
        self.state.paused = paused
        await self.run.save(self.state)

    async def _start_server(self, qmp: Qmp) -> None:
        await start_server(qmp, self.run, self.state, disks=len(self.disks), fault=FleecingError)

    async def _read_maps(self, qmp: Qmp, maps: Iterable[DirtyMap]) -> None:
        """Read what changed. A bitmap must not stay exported: a resize of the disk would abort QEMU meanwhile."""
        maps = list(maps)
        if not maps:
            return
        await self._step("read the maps")
        async with AsyncExitStack() as stack:
            for disk, node, name in maps:
                export = f"fleece-m{disk.number}"
                stack.push_async_callback(_end_export, qmp, export)
                bitmap = {"node": node, "name": name}
                await self._export(qmp, disk, export, f"map{disk.number}", writable=False, bitmaps=[bitmap])
                address = NbdAddress.unix(self.run.socket, f"map{disk.number}")
                with self.telling_of_a_crash():
                    disk.changed = await read_dirty_map(address, name, disk.disk.size, disk.disk.device)
        await self._until_no_export(qmp)  # the maps are the only ones so far

    async def _until_no_export(self, qmp: Qmp) -> None:
        try:
            await qmp.poll("query-block-exports", none_ours, timeout_s=_MAP_TIMEOUT_S)
        except QmpTimeoutError as error:
            raise FleecingError("freeze the disks of", self.qmp_path, "QEMU does not let go of its exports") from error

    async def _export(
        self, qmp: Qmp, disk: FleecedDisk, export: str, name: str, *, writable: bool, **more: object
    ) -> None:
        options = {"type": "nbd", "id": export, "node-name": disk.view, "name": name, "writable": writable, **more}
        await qmp.execute("block-export-add", options)

    # -- the end ------------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def tear_down(self, *, success: bool) -> list[str]:
        """Undo everything and hand the bitmaps over; own NBD connections must be closed.

        Returns what a later run, or `fleece vm cleanup`, has to remove; what is harmless goes to `warnings`. Never
        raises but for cancellation from within; shielded, it takes at most `TEARDOWN_TIMEOUT_S`.
        """
        undone = Undone()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + TEARDOWN_TIMEOUT_S) as scope:
            try:
                if await self._tear_down(undone, success=success):
                    self.on_step("done")
            except (QmpError, FleecingError, ValueError) as error:
                undone.problems.append(str(error))
        if scope.cancelled_caught:
            undone.problems.append(f"not done within {TEARDOWN_TIMEOUT_S:g} s")
        self.warnings += undone.kept
        return undone.problems

    async def _tear_down(self, undone: Undone, *, success: bool) -> bool:
        """False if QEMU is gone, and everything in it."""
        if self.run.peer.alive() and await hanging([disk.image for disk in self.disks], _HANGING_TIMEOUT_S):
            undone.images = False
            undone.problems.append(HANGS)
            return True
        try:
            async with connect(self.qmp_path, timeout_s=_RECONNECT_TIMEOUT_S) as qmp:
                if qmp.peer == self.run.peer:
                    # The guest is freed even if the run folder is full: clean-up needs only QEMU.
                    with contextlib.suppress(FleecingError):
                        await self._step("undo")
                    await self._undo(qmp, undone, success=success)
                    return True
        except (QmpError, OSError) as error:
            if self.run.peer.alive():
                raise error if isinstance(error, QmpError) else _unreachable(self.qmp_path, error) from error
        undone.images = True
        await remove_files(self.run, self.state, self.scratch.folder, undone)
        return False


def _unreachable(path: str, error: OSError) -> QmpConnectError:
    return QmpConnectError("connect to QEMU at", path, os_reason(error))


async def _end_export(qmp: Qmp, export: str) -> None:
    with trio.move_on_after(_MAP_TIMEOUT_S, shield=True), contextlib.suppress(QmpError):
        await qmp.execute("block-export-del", {"id": export, "mode": "hard"})
