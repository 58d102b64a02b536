"""Fleecing: a frozen view of the disks of a running VM, set up in stock QEMU and taken down again.

    device -> fleece-p<n> -> fleece-c<n> -> the disk's node        after the instant T; before it p leads to the node
                  fleece-s<n> -> fleece-c<n> -> fleece-f<n>        the frozen view; f holds what the guest overwrote

T is one `blockdev-reopen` that switches the pass-through nodes of all disks to their copy-before-write filters. The
steps, their order and the reasons: docs/hypervisor.md, "A backup step by step". What has gone wrong at any step is
undone by `leftovers.undo`, which looks at QEMU alone.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from core.disks import Extent
from core.errors import os_reason
from core.limits import in_io_thread
from hypervisor import bitmaps
from hypervisor.bitmaps import BitmapMode, BitmapName, Choice
from hypervisor.block_graph import block_nodes
from hypervisor.discovery import Capabilities, Disk
from hypervisor.errors import FleecingError, QmpCommandError, QmpConnectError, QmpError, QmpTimeoutError
from hypervisor.guest_agent import frozen
from hypervisor.leftovers import HANGS, Undone, none_ours, remove_files, undo
from hypervisor.live_source import read_dirty_map
from hypervisor.nbd_client import NbdAddress, NbdSourceError
from hypervisor.qmp import Qmp, connect
from hypervisor.scratch import Scratch, hanging, image_name
from hypervisor.state import DiskState, Run, RunState
from hypervisor.vhost_user import Shared, queues_for
from hypervisor.vhost_user import usable as shared_memory_usable

_LOG = logging.getLogger(__name__)

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
    changed: list[Extent] | None = None  #: what the old bitmap says, None for a full read
    persistent: bool = False  #: the new bitmap is kept in the image
    shared: Shared | None = None  #: the export through shared memory, None without one

    def pass_through(self, below: str) -> Mapping[str, object]:
        """The pass-through node over the node `below`.

        Of fixed size: QEMU refuses `block_resize` then, where it would abort while the map is exported, or as soon as
        the view is read beyond the end of a disk that became smaller.
        """
        return {"driver": "raw", "node-name": f"fleece-p{self.number}", "file": below, "size": self.disk.size}

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


@dataclass(slots=True, kw_only=True)
class Fleecing:
    """One backup's changes to one QEMU: made by `set_up`, undone by `tear_down`, which is armed before it."""

    qmp_path: str
    run: Run
    able: Capabilities
    scratch: Scratch
    state: RunState
    disks: Sequence[FleecedDisk]
    guest_agent: Path | None
    cbw_timeout_s: int
    at_instant: Callable[[Qmp], Awaitable[None]] | None
    on_step: OnStep
    instant: float = 0.0  #: Unix seconds of T
    frozen_s: float = 0.0  #: seconds from freeze sent to thaw answered
    warnings: list[str] = field(default_factory=list)

    def address(self, disk: FleecedDisk) -> NbdAddress:
        """Where the data export of `disk` is."""
        return NbdAddress.unix(self.run.socket, f"drive-{disk.number}")

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

    async def set_up(self, qmp: Qmp) -> None:
        """Steps 1 to 12. After an error or cancellation `tear_down` undoes whatever was done.

        Raises:
            FleecingError: QEMU refused a step, or the state cannot be written down.
            SourceError: a map cannot be read.
            QmpError, QmpAnswerError: as `Qmp.execute`.
        """
        try:
            await self._step("add the new bitmaps")
            await self._add_bitmaps(qmp)
            await self._step("add the fleecing images")
            for disk in self.disks:
                await self._add_image(qmp, disk)
            await self._step("add the pass-through nodes")
            for disk in self.disks:
                await qmp.execute("blockdev-add", disk.pass_through(disk.disk.node))
            await self._step("switch the devices to them")
            for disk in self.disks:
                await qmp.qom_set(disk.disk.qom_path, "drive", f"fleece-p{disk.number}")
            await self._step("add the copy-before-write filters")
            for disk in self.disks:
                await self._add_filter(qmp, disk)
            await self._step("freeze the guest, switch to the filters")
            await self._set_instant(qmp)
            await self._step("disable the old bitmaps")
            old = [(disk.disk.node, disk.choice.bitmap) for disk in self.disks if disk.choice.bitmap is not None]
            await qmp.transaction([bitmaps.disable(node, name) for node, name in old])
            await self._step("add the frozen views")
            for disk in self.disks:
                await self._blockdev_add(
                    qmp,
                    driver="snapshot-access",
                    node_name=f"fleece-s{disk.number}",
                    file=f"fleece-c{disk.number}",
                    discard="unmap",
                )
            await self._step("start the NBD server", nbd_server=True)
            await self._start_server(qmp)
            await self._read_maps(qmp)
            await self._step("export the frozen views")
            for disk in self.disks:
                await self._export(qmp, disk, f"fleece-e{disk.number}", f"drive-{disk.number}", writable=True)
                await self._share(qmp, disk)
            await self._step("read")
        except QmpCommandError as error:
            raise FleecingError("freeze the disks of", self.qmp_path, str(error)) from error

    async def _step(self, phase: str, *, nbd_server: bool = False) -> None:
        self.state.phase = phase
        self.state.nbd_server |= nbd_server
        await self.run.save(self.state)
        self.on_step(phase)

    async def _add_bitmaps(self, qmp: Qmp) -> None:
        for disk in self.disks:
            self.warnings += await bitmaps.remove(qmp, disk.choice.remove)
        new = [(disk, disk.new) for disk in self.disks if disk.new is not None]
        try:
            await qmp.transaction([bitmaps.add(disk.disk.node, name, persistent=disk.persistent) for disk, name in new])
        except QmpCommandError as error:
            if not any(disk.persistent for disk, _ in new):
                raise
            self.warnings.append(f"the dirty bitmaps will not outlive the VM's QEMU: {error.desc}")
            await qmp.transaction([bitmaps.add(disk.disk.node, name, persistent=False) for disk, name in new])

    async def _add_image(self, qmp: Qmp, disk: FleecedDisk) -> None:
        path = await self.scratch.create(disk.image.name, disk.disk.size)
        options = {"driver": "file", "node_name": f"fleece-f{disk.number}", "discard": "unmap"}
        try:
            await self._blockdev_add(qmp, **options, filename=str(path))
        except QmpCommandError as refused:
            # Another user, a container, a security module: it may take an open file all the same.
            await self._add_open_image(qmp, path, options, refused)
        node = (await block_nodes(qmp)).get(f"fleece-f{disk.number}")
        if node is None or node.size != disk.disk.size:
            size = "missing" if node is None else f"{node.size} B"
            raise FleecingError("make a fleecing image for", disk.disk.device, f"it is {size}, not {disk.disk.size} B")

    async def _add_open_image(self, qmp: Qmp, path: Path, options: Mapping[str, Any], refused: QmpCommandError) -> None:
        descriptor = await in_io_thread(lambda: os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
        try:
            filename = await qmp.add_fd(descriptor)
            try:
                await self._blockdev_add(qmp, **options, filename=filename)
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

    async def _add_filter(self, qmp: Qmp, disk: FleecedDisk) -> None:
        await qmp.execute(
            "blockdev-add",
            {
                "driver": "copy-before-write",
                "node-name": f"fleece-c{disk.number}",
                "file": disk.disk.node,
                "target": f"fleece-f{disk.number}",
                # Whatever becomes of the fleecing image, the guest must not notice.
                "on-cbw-error": "break-snapshot",
                "cbw-timeout": min(self.cbw_timeout_s, self.able.cbw_timeout_s),
            },
        )

    async def _set_instant(self, qmp: Qmp) -> None:
        """Step 6: one command switches all disks, at one instant and without a pause."""
        options = [disk.pass_through(f"fleece-c{disk.number}") for disk in self.disks]
        freeze = None
        try:
            async with frozen(self.guest_agent) as freeze:
                await qmp.execute("blockdev-reopen", {"options": options})
                freeze.serve()
                self.instant = time.time()
                if self.at_instant is not None:
                    await self.at_instant(qmp)
        finally:
            if freeze is not None:
                self.frozen_s = freeze.frozen_s
                self.warnings += freeze.warnings

    async def _start_server(self, qmp: Qmp) -> None:
        arguments = {"max-connections": 16 + 4 * len(self.disks)}
        path = self.run.socket
        try:
            await qmp.execute("nbd-server-start", {"addr": _unix(path), **arguments})
        except QmpCommandError as refused:
            if "already running" in refused.desc:
                self.state.nbd_server = False
                await self.run.save(self.state)
                raise FleecingError(
                    "start the NBD server of",
                    self.qmp_path,
                    "it is running already, for somebody else",
                    "QEMU has only one; stop it with nbd-server-stop when its user is done",
                ) from refused
            await self._start_on_open_socket(qmp, path, arguments, refused)

    async def _start_on_open_socket(
        self, qmp: Qmp, path: Path, arguments: Mapping[str, object], refused: QmpCommandError
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)  # noqa: PTH108 - what QEMU's own try may have left
                listening.bind(str(path))
                listening.listen(16)
            except OSError as error:
                raise FleecingError("listen at", str(path), os_reason(error)) from error
            try:
                await qmp.get_fd(listening.fileno(), "fleece-nbd")
                address = {"type": "fd", "data": {"str": "fleece-nbd"}}
                await qmp.execute("nbd-server-start", {"addr": address, **arguments})
            except QmpCommandError as error:
                raise FleecingError("start the NBD server of", self.qmp_path, refused.desc) from error

    async def _read_maps(self, qmp: Qmp) -> None:
        """Steps 10 and 11. The bitmap must not stay exported: a resize of the disk would abort QEMU meanwhile."""
        dirty = [(disk, disk.choice.bitmap) for disk in self.disks if disk.choice.bitmap is not None]
        if not dirty:
            return
        await self._step("read the maps")
        async with AsyncExitStack() as stack:
            for disk, name in dirty:
                export = f"fleece-m{disk.number}"
                stack.push_async_callback(_end_export, qmp, export)
                bitmap = {"node": disk.disk.node, "name": str(name)}
                await self._export(qmp, disk, export, f"map{disk.number}", writable=False, bitmaps=[bitmap])
                address = NbdAddress.unix(self.run.socket, f"map{disk.number}")
                with self.telling_of_a_crash():
                    disk.changed = await read_dirty_map(address, str(name), disk.disk.size, disk.disk.device)
        try:
            # The maps are the only exports so far.
            await qmp.poll("query-block-exports", none_ours, timeout_s=_MAP_TIMEOUT_S)
        except QmpTimeoutError as error:
            raise FleecingError("freeze the disks of", self.qmp_path, "QEMU does not let go of the maps") from error

    async def _export(
        self, qmp: Qmp, disk: FleecedDisk, export: str, name: str, *, writable: bool, **more: object
    ) -> None:
        view = f"fleece-s{disk.number}"
        options = {"type": "nbd", "id": export, "node-name": view, "name": name, "writable": writable, **more}
        await qmp.execute("block-export-add", options)

    async def _share(self, qmp: Qmp, disk: FleecedDisk) -> None:
        """Export the view of `disk` once more, for reading through shared memory; without that it is read over NBD."""
        queues = queues_for(len(self.disks))
        if not queues or not self.able.shared_memory or not shared_memory_usable():
            return
        path = self.run.shared(disk.number)
        options = {
            "type": "vhost-user-blk",
            "id": f"fleece-v{disk.number}",
            "node-name": f"fleece-s{disk.number}",
            "addr": {"type": "unix", "path": str(path)},
            "num-queues": queues,
            "writable": False,
        }
        try:
            await qmp.execute("block-export-add", options)
        except QmpCommandError as error:
            _LOG.info("%s: no export through shared memory: %s", disk.disk.device, error.desc)
        else:
            disk.shared = Shared(str(path), queues)

    async def _blockdev_add(self, qmp: Qmp, *, node_name: str, **options: object) -> None:
        await qmp.execute("blockdev-add", {"node-name": node_name, **options})

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

    async def _undo(self, qmp: Qmp, undone: Undone, *, success: bool) -> None:
        result = await undo(qmp, server=self.state.nbd_server)
        undone.problems += result.problems
        undone.kept += result.kept
        # The bitmaps are of the disks' own nodes: what is left in the way above them does not matter here.
        names = [(disk.disk.node, disk.choice.bitmap, disk.new) for disk in self.disks if disk.new is not None]
        self.on_step("hand the bitmaps over")
        self.warnings += await bitmaps.hand_over(qmp, names, success=success)
        if result.images:
            await remove_files(self.run, self.state, self.scratch.folder, undone)


def _unix(path: Path) -> dict[str, object]:
    return {"type": "unix", "data": {"path": str(path)}}


def _unreachable(path: str, error: OSError) -> QmpConnectError:
    return QmpConnectError("connect to QEMU at", path, os_reason(error))


async def _end_export(qmp: Qmp, export: str) -> None:
    with trio.move_on_after(_MAP_TIMEOUT_S, shield=True), contextlib.suppress(QmpError):
        await qmp.execute("block-export-del", {"id": export, "mode": "hard"})


def fleeced(
    disks: Sequence[tuple[Disk, Choice]],
    *,
    taken: set[int],
    run: Run,
    scratch: Scratch,
    target: str,
    new_id: int,
    mode: BitmapMode,
) -> list[FleecedDisk]:
    """The disks of a backup with the names of everything that is added for them; numbers in `taken` are not used."""
    numbers = (number for number in range(len(disks) + len(taken) + 1) if number not in taken)
    result = []
    for (disk, choice), number in zip(disks, numbers, strict=False):
        new = None if mode is BitmapMode.NONE else BitmapName(target, bitmaps.disk_id(disk.name), new_id)
        result.append(
            FleecedDisk(
                disk,
                choice,
                number,
                new,
                scratch.folder / image_name(run.peer, number),
                persistent=mode is BitmapMode.PERSISTENT and disk.persistent_bitmaps_possible,
            )
        )
    return result
