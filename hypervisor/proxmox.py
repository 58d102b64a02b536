"""The flavour of Proxmox VE: its QEMU makes the frozen views by `backup-access-setup`, and keeps the bitmap.

    guest's device -> filter of QEMU's -> the disk's node            the filter is put there by QEMU, at the instant
      view of QEMU's -> filter -> <device>-fleecing -> fleece-f<n>   the last two are Fleece's, attached before

The QEMU of Proxmox VE 9 takes a node of that name, the one before it only a drive: whether it does is found by trying.
Devices are switched one after the other, so disks with I/O threads of their own are at one instant only if the guest is
frozen. The filter saves only what the bitmap calls dirty: nothing else of a view can be read. EFI variables are a disk
like any other here, and so is the state of a TPM if its file is known, which QEMU does not have open: `fleece-t<n>`.

docs/hypervisor.md, "Proxmox VE"; the commands and what becomes of bitmaps: `access.py`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor import access
from hypervisor.access import Accessed, Mark
from hypervisor.bitmaps import BitmapMode, BitmapName, Choice, Finished, disk_id
from hypervisor.block_graph import BlockNode, block_nodes, children
from hypervisor.discovery import Capabilities, Disk, LeftOut, Survey
from hypervisor.errors import FleecingError, QmpCommandError, VmStateError, VmUnsupportedError
from hypervisor.flavours import DiskSelection, FlavourName, Order, Settled
from hypervisor.fleecing import DirtyMap, FleecedDisk, Fleecing, run_state
from hypervisor.leftovers import EndOfAccess, Undone, remove_files, undo
from hypervisor.qmp import Qmp
from hypervisor.scratch import image_name
from hypervisor.state import Run

#: Characters of a node's name; QEMU looks for `<device>-fleecing`.
_MAX_NODE: Final = 31
_FLEECING: Final = "-fleecing"
#: Between a device and the node with its bitmaps: limits of the guest's speed, and the filter of an access.
_FILTERS: Final = frozenset({"throttle", "copy-before-write"})
_TPM: Final = "tpmstate0"
_SECTOR: Final = 512

_FULL: Final = frozenset({"not-used", "not-used-removed"})  #: without a bitmap
_STARTED: Final = frozenset({"new", "invalid", "missing-recreated"})  #: the bitmap starts now
_USED: Final = "used"


@dataclass(slots=True, kw_only=True)
class ProxmoxFleecing(Fleecing):
    """A frozen view of nodes of QEMU's."""

    target: str
    bitmap_mode: BitmapMode
    devices: Mapping[int, str]  #: what the disks are called in an access, by their numbers
    tpm_state: Path | None
    #: The setup may have been sent: from then on the end of an access belongs to the end.
    armed: bool = False
    distrusted: set[str] = field(default_factory=set)  #: archives whose bitmap the next backup must not use

    async def set_up(self, qmp: Qmp) -> None:
        """As `Fleecing.set_up`."""
        try:
            await self._step("add the new bitmaps")
            await self._add_marks(qmp)
            await self._step("add the fleecing images")
            for disk in self.disks:
                if _is_tpm(disk.disk):
                    await qmp.execute("blockdev-add", _tpm_node(disk.disk.node, str(self.tpm_state), disk.disk.size))
                name = self.devices[disk.number] + _FLEECING
                await self._add_image(qmp, disk, name, partial(_image, name, disk.number, disk.disk.size))
            await self._step("freeze the guest, let QEMU make the views")
            if not await self._set_up_access(qmp, last=False):
                await self._step("attach the fleecing images as drives")
                for disk in self.disks:
                    await self._add_as_drive(qmp, disk)
                await self._step("freeze the guest again, let QEMU make the views")
                await self._set_up_access(qmp, last=True)
            await self._step("start the NBD server", nbd_server=True)
            await self._start_server(qmp)
            used = (disk for disk in self.disks if disk.choice.bitmap is not None)
            await self._read_maps(qmp, (DirtyMap(disk, disk.disk.node, access.target_id(self.target)) for disk in used))
            await self._step("export the frozen views")
            for disk in self.disks:
                await self._export(qmp, disk, f"fleece-e{disk.number}", disk.export, writable=True)
            await self._step("read")
        except QmpCommandError as error:
            raise FleecingError("freeze the disks of", self.qmp_path, str(error)) from error

    async def _add_marks(self, qmp: Qmp) -> None:
        useless = [Mark(one.node, one.name) for disk in self.disks for one in disk.choice.remove]
        await qmp.transaction([access.remove_bitmap(mark.node, mark.bitmap) for mark in useless])
        await qmp.transaction([access.add_mark(mark) for mark in self._new_marks(self.disks)])

    def _new_marks(self, disks: Iterable[FleecedDisk]) -> list[Mark]:
        """Also without bitmaps: by its mark a run that was killed is found."""
        return [Mark(disk.disk.node, disk.new) for disk in disks if disk.new is not None and not _is_tpm(disk.disk)]

    def _old_marks(self, archives: Iterable[str] | None = None) -> list[Mark]:
        return [
            Mark(disk.disk.node, disk.choice.bitmap)
            for disk in self.disks
            if disk.choice.bitmap is not None and (archives is None or disk.disk.name in archives)
        ]

    async def _add_as_drive(self, qmp: Qmp, disk: FleecedDisk) -> None:
        """The fleecing image of `disk`, a node so far, as a drive."""
        name = self.devices[disk.number] + _FLEECING
        await qmp.execute("blockdev-del", {"node-name": name})
        await access.add_drive(
            qmp, name, _drive(disk.number, disk.disk.size, str(self.scratch.folder / disk.image.name))
        )

    async def _set_up_access(self, qmp: Qmp, *, last: bool) -> bool:
        """False if this QEMU does not find fleecing images that are nodes, and it is not the `last` attempt."""
        modes = {self.devices[disk.number]: self._mode(disk) for disk in self.disks}
        warned = len(self.warnings)
        self.armed = True
        try:
            found = await self._set_instant(qmp, partial(access.set_up, qmp, self.target, modes))
        except QmpCommandError as error:
            self.armed = False  # all or nothing
            if "not finished" in error.desc:
                hint = "try again when that backup has ended"
                raise VmStateError("back up the VM at", self.qmp_path, error.desc, hint) from error
            if error.error_class == "DeviceNotFound" and _FLEECING in error.desc:
                if not last:
                    del self.warnings[warned:]  # the guest is frozen once more
                    return False
                hint = "this QEMU does not find the fleecing images; choose --flavour stock"
                raise FleecingError("freeze the disks of", self.qmp_path, error.desc, hint) from error
            raise
        for disk in self.disks:
            self._take(disk, found[self.devices[disk.number]])
        for line in await access.log_lines(qmp):
            self.on_step(line)
        return True

    def _mode(self, disk: FleecedDisk) -> str:
        if self.bitmap_mode is BitmapMode.NONE or disk.disk.written_past:
            return "none"
        return "new" if disk.choice.bitmap is None else "use"

    def _take(self, disk: FleecedDisk, found: Accessed) -> None:
        """Note what QEMU has made of `disk`.

        Raises:
            FleecingError: it is not what was asked for.
        """
        problem = ""
        if found.size != disk.disk.size:
            problem = f"its size changed from {disk.disk.size} to {found.size} B at this moment"
        elif found.action == _USED and self._mode(disk) == "use":
            if (found.bitmap_node, found.bitmap) != (disk.disk.node, access.target_id(self.target)):
                problem = f"QEMU uses the bitmap {found.bitmap} of the node {found.bitmap_node}"
        elif found.action not in _FULL | _STARTED or (self._mode(disk) == "none" and found.action in _STARTED):
            problem = f"QEMU answers the bitmap mode '{self._mode(disk)}' with '{found.action[:40]}'"
        elif disk.choice.bitmap is not None:
            what = "uses no bitmap" if found.action in _FULL else "has started a new bitmap"
            disk.choice = Choice(None, None, f"QEMU {what} ({found.action})", disk.choice.remove)
        if problem:
            raise FleecingError("back up disk", disk.disk.device, problem)
        disk.view = found.node

    def distrust(self, archive: str) -> None:
        """As `Fleecing.distrust`."""
        self.distrusted.add(archive)

    async def _undo(self, qmp: Qmp, undone: Undone, *, success: bool) -> None:
        self.on_step("hand the bitmaps over")
        if success:
            # Before QEMU's bitmap counts from the new backup: see `access.py`.
            success = await self._remove_marks(qmp, self._old_marks())
        ends = EndOfAccess(self.target, success) if self.armed else None
        result = await undo(qmp, server=self.state.nbd_server, access_ends=ends)
        undone.problems += result.problems
        undone.kept += result.kept
        if result.held:
            return  # the next run settles the bitmaps as well, as after a kill
        if not success:
            await self._remove_marks(qmp, [*self._new_marks(self.disks), *self._old_marks(self.distrusted)])
        else:
            uncounted = (disk for disk in self.disks if self._mode(disk) == "none")
            await self._remove_marks(qmp, self._new_marks(uncounted))
        if not result.problems:
            await self._remove_idle(qmp)
        if result.images:
            await remove_files(self.run, self.state, self.scratch.folder, undone)

    async def _remove_marks(self, qmp: Qmp, old: Sequence[Mark]) -> bool:
        """False if one stays; what QEMU refuses is a warning. Those that are gone are no problem."""
        there = set(access.marks((await block_nodes(qmp)).values(), self.target))
        complete = True
        for mark in old:
            if mark not in there:
                continue
            try:
                # No transaction: it would wait for all requests, those of a reader that hangs as well.
                await qmp.execute("block-dirty-bitmap-remove", {"node": mark.node, "name": mark.bitmap})
            except QmpCommandError as error:
                self.warnings.append(f"the mark {mark.bitmap} on {mark.node} stays: {error.desc}")
                complete = False
        return complete

    async def _remove_idle(self, qmp: Qmp) -> None:
        """Remove QEMU's bitmaps that count from no backup: they would only cost time."""
        nodes = (await block_nodes(qmp)).values()
        marked = {mark.node for mark in access.marks(nodes, self.target)}
        for node, name in access.access_bitmaps(nodes, self.target):
            if node not in marked:
                try:
                    await qmp.transaction([access.remove_bitmap(node, name)])
                except QmpCommandError as error:
                    self.warnings.append(f"the dirty bitmap {name} on {node} stays: {error.desc}")


def _image(name: str, number: int, size: int, filename: str) -> Mapping[str, object]:
    file = {"driver": "file", "node-name": f"fleece-f{number}", "filename": filename, "discard": "unmap"}
    return {"driver": "raw", "node-name": name, "size": size, "discard": "unmap", "file": file}


def _drive(number: int, size: int, filename: str) -> Mapping[str, str]:
    file = {"driver": "file", "node-name": f"fleece-f{number}", "filename": filename, "discard": "unmap"}
    options = {"driver": "raw", "size": str(size), "discard": "unmap"}
    return options | {f"file.{key}": value for key, value in file.items()}


def _tpm_node(name: str, filename: str, size: int) -> Mapping[str, object]:
    # Never probed: what it holds is the guest's. Read-only, since its own program has it open for writing.
    driver = "host_device" if Path(filename).is_block_device() else "file"
    file = {"driver": driver, "filename": filename, "read-only": True, "locking": "off"}
    return {"driver": "raw", "node-name": name, "read-only": True, "size": size, "file": file}


@dataclass(frozen=True, slots=True)
class Proxmox:
    """The flavour of Proxmox VE; see `flavours.Flavour`."""

    tpm_state: Path | None = None  #: file or device with the state of the VM's TPM

    @property
    def name(self) -> FlavourName:
        """Which."""
        return FlavourName.PROXMOX

    async def survey(self, qmp: Qmp, selection: DiskSelection, *, instead: Mapping[str, str] | None = None) -> Survey:
        """The disks, the EFI variables, and the TPM's state; nodes are those below filters.

        Raises:
            SourceError: the file of the TPM's state cannot be looked at; and as `Flavour.survey`.
        """
        tpm = [] if self.tpm_state is None else [await in_io_thread(_tpm_disk, self.tpm_state)]
        found = await selection.survey(qmp, instead=instead, flash=True, also=tpm)
        left_out = list(found.left_out)
        if self.tpm_state is None and "query-tpm" in qmp.commands and await qmp.execute("query-tpm"):
            left_out.append(LeftOut(_TPM, "the TPM's state is not in QEMU, name its file as tpm-state"))
        nodes = await block_nodes(qmp)
        graph = await children(qmp)
        return Survey([_accessible(disk, nodes, graph) for disk in found.disks], left_out)

    async def as_settled(self, nodes: Iterable[BlockNode], target: str, finished: Finished) -> Settled:
        """The bitmaps as `settle` would leave them."""
        return Settled((await access.in_order(nodes, target, finished)).bitmaps, {})

    async def settle(self, qmp: Qmp, target: str, finished: Finished) -> Settled:
        """Remove the marks that an interrupted backup to `target` has left; its access must have ended."""
        marked = await access.in_order((await block_nodes(qmp)).values(), target, finished)
        await qmp.transaction([access.remove_bitmap(mark.node, mark.bitmap) for mark in marked.remove])
        return Settled(marked.bitmaps, {})

    def bitmap_name(self, name: BitmapName) -> str:
        """That of the target."""
        return access.target_id(name.target)

    def fleecing(
        self,
        order: Order,
        chosen: Sequence[tuple[Disk, Choice]],
        *,
        able: Capabilities,
        run: Run,
        nodes: Iterable[BlockNode],
    ) -> ProxmoxFleecing:
        """The disks with the names of everything that is added for them.

        Raises:
            VmStateError: another backup is under way: QEMU has put a filter under a device.
            VmUnsupportedError: the name of a device is too long for the node that QEMU would look for.
        """
        nodes = list(nodes)
        filters = {node.name for node in nodes if node.driver == "copy-before-write"}
        if busy := [disk.device for disk, _ in chosen if disk.backend in filters]:
            hint = "try again when it has ended"
            raise VmStateError("back up disk", busy[0], "another backup of it runs in QEMU", hint)
        taken = {ours.number for node in nodes if (ours := node.ours) is not None}
        numbers = (number for number in range(len(chosen) + len(taken) + 1) if number not in taken)
        disks = []
        for (disk, choice), number in zip(chosen, numbers, strict=False):
            if _is_tpm(disk):
                disk = replace(disk, node=f"fleece-t{number}", backend=f"fleece-t{number}")
            disks.append(
                FleecedDisk(
                    disk,
                    choice,
                    number,
                    BitmapName(order.target, disk_id(disk.name), order.new_id),
                    order.scratch.folder / image_name(run.peer, number),
                    export=disk.backend,
                    view="",
                )
            )
        for name in (one.disk.backend + _FLEECING for one in disks):
            if len(name) > _MAX_NODE:
                raise VmUnsupportedError(
                    "back up the VM at",
                    order.qmp_path,
                    f"QEMU would look for a fleecing image under {name}, too long for a node",
                    "give the disk a shorter name, or choose --flavour stock",
                )
        return ProxmoxFleecing(
            qmp_path=order.qmp_path,
            run=run,
            able=able,
            scratch=order.scratch,
            state=run_state(order, disks),
            disks=disks,
            standstill=order.standstill,
            cbw_timeout_s=order.cbw_timeout_s,
            at_instant=order.at_instant,
            on_step=order.on_step,
            target=order.target,
            bitmap_mode=order.bitmap_mode,
            devices={one.number: one.disk.backend for one in disks},
            tpm_state=self.tpm_state,
        )


def _accessible(disk: Disk, nodes: Mapping[str, BlockNode], graph: Mapping[str, Mapping[str, str]]) -> Disk:
    """`disk` with the node that has its bitmaps, and as `backend` what an access calls it."""
    node = disk.node
    while node in nodes and nodes[node].driver in _FILTERS and "file" in graph.get(node, {}):
        node = graph[node]["file"]
    return replace(disk, node=node, backend=disk.backend or disk.node)


def _is_tpm(disk: Disk) -> bool:
    """Whether it is the TPM's state, which no device of QEMU's has."""
    return not disk.qom_path


def _tpm_disk(path: Path) -> Disk:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise SourceError("read the TPM's state in", str(path), os_reason(error)) from error
    if not size:
        raise SourceError("read the TPM's state in", str(path), "it is empty")
    name = f"drive-{_TPM}-backup.img"
    return Disk(
        name=name,
        device=_TPM,
        qom_path="",
        node="",
        size=-(-size // _SECTOR) * _SECTOR,
        driver="raw",
        file=str(path),
        device_type="tpm",
        persistent_bitmaps_possible=False,
        aliases=frozenset({_TPM, f"{_TPM}-backup", name, name.removesuffix(".img"), str(path)}),
        written_past="the TPM's state is written past QEMU",
    )
