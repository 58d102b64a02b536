"""The stock flavour: frozen views in any QEMU, of commands that every QEMU has.

    device -> fleece-p<n> -> fleece-c<n> -> the disk's node        after the instant T; before it p leads to the node
                  fleece-s<n> -> fleece-c<n> -> fleece-f<n>        the frozen view; f holds what the guest overwrote

T is one `blockdev-reopen` that switches the pass-through nodes of all disks to their copy-before-write filters. The
steps, their order and the reasons: docs/hypervisor.md, "A backup step by step".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hypervisor import bitmaps
from hypervisor.bitmaps import Bitmap, BitmapMode, BitmapName, Choice, Finished, our_bitmaps
from hypervisor.block_graph import BlockNode, block_nodes
from hypervisor.discovery import Capabilities, Disk, Survey
from hypervisor.errors import FleecingError, QmpCommandError
from hypervisor.flavours import DiskSelection, FlavourName, Order, Settled
from hypervisor.fleecing import DirtyMap, FleecedDisk, Fleecing, run_state
from hypervisor.leftovers import GUARD, Undone, remove_files, undo
from hypervisor.libvirt_nodes import remove_orphans
from hypervisor.nbd_address import NbdAddress
from hypervisor.qmp import Qmp
from hypervisor.scratch import image_name
from hypervisor.size_marks import Marked, add_marks, remove_helpers, remove_marks, unsure
from hypervisor.state import Run


@dataclass(slots=True, kw_only=True)
class StockFleecing(Fleecing):
    """A frozen view of nodes of ours."""

    async def set_up(self, qmp: Qmp) -> None:
        """Steps 1 to 12 of docs/hypervisor.md; otherwise as `Fleecing.set_up`."""
        try:
            await self._step("add the new bitmaps")
            await self._add_bitmaps(qmp)
            await self._step("add the fleecing images")
            for disk in self.disks:
                await self._add_image(qmp, disk, f"fleece-f{disk.number}", partial(_image, disk.number))
            await self._step("add the pass-through nodes")
            for disk in self.disks:
                await qmp.execute("blockdev-add", _pass_through(disk, disk.disk.node))
            await self._step("switch the devices to them")
            for disk in self.disks:
                await qmp.qom_set(disk.disk.qom_path, "drive", f"fleece-p{disk.number}")
            await self._step("add the copy-before-write filters")
            for disk in self.disks:
                await self._add_filter(qmp, disk)
            await self._step("freeze the guest, switch to the filters")
            # One command switches all disks, at one instant and without a pause.
            options = [_pass_through(disk, f"fleece-c{disk.number}") for disk in self.disks]
            await self._set_instant(qmp, partial(qmp.execute, "blockdev-reopen", {"options": options}))
            await self._step("disable the old bitmaps")
            old = [(disk.disk.node, disk.choice.bitmap) for disk in self.disks if disk.choice.bitmap is not None]
            await qmp.transaction([bitmaps.disable(node, name) for node, name in old])
            await self._step("add the frozen views")
            for disk in self.disks:
                below = {"file": f"fleece-c{disk.number}", "discard": "unmap"}
                await qmp.execute("blockdev-add", {"driver": "snapshot-access", "node-name": disk.view, **below})
            await self._step("start the NBD server", nbd_server=True)
            await self._start_server(qmp)
            await self._mark_sizes(qmp)
            await self._read_maps(
                qmp,
                (
                    DirtyMap(disk, disk.disk.node, str(disk.choice.bitmap))
                    for disk in self.disks
                    if disk.choice.bitmap is not None
                ),
            )
            await self._step("export the frozen views")
            for disk in self.disks:
                await self._export(qmp, disk, f"fleece-e{disk.number}", disk.export, writable=True)
            await self._step("read")
        except QmpCommandError as error:
            raise FleecingError("freeze the disks of", self.qmp_path, str(error)) from error

    async def _add_bitmaps(self, qmp: Qmp) -> None:
        for disk in self.disks:
            self.warnings += await bitmaps.remove(qmp, disk.choice.remove)
        # A mark may only be as old as the bitmap beside it.
        begun = [disk.disk.node for disk in self.disks if disk.choice.bitmap is None]
        self.warnings += await remove_marks(qmp, self.state.target, begun)
        await self._make_room(qmp)
        # QEMU loads no internal snapshot into a disk that has a bitmap: it would do that past the filter.
        await qmp.transaction([_guard(disk.disk.node) for disk in self.disks if disk.new is None])
        new = [(disk, disk.new) for disk in self.disks if disk.new is not None]
        try:
            await qmp.transaction([bitmaps.add(disk.disk.node, name, persistent=disk.persistent) for disk, name in new])
        except QmpCommandError as error:
            if not any(disk.persistent for disk, _ in new):
                raise
            self.warnings.append(f"the dirty bitmaps will not outlive the VM's QEMU: {error.desc}")
            await qmp.transaction([bitmaps.add(disk.disk.node, name, persistent=False) for disk, name in new])

    async def _make_room(self, qmp: Qmp) -> None:
        """Remove the bitmaps of targets that were not backed up to for longest, where a disk has too many."""
        nodes = await block_nodes(qmp)
        for disk in self.disks:
            others = [one for one in our_bitmaps([nodes[disk.disk.node]], None) if one.name.target != self.state.target]
            for old in bitmaps.too_many(others):
                problems = await bitmaps.remove(qmp, [old]) or await remove_marks(qmp, old.name.target, [old.node])
                self.warnings += problems or [
                    f"the dirty bitmap {old.name} of another target was removed from {disk.disk.device}, which had "
                    f"{bitmaps.MAX_TARGETS} already: the next backup to that target reads everything"
                ]

    async def _mark_sizes(self, qmp: Qmp) -> None:
        """Mark the sizes of the disks whose bitmaps begin now, so that it is seen if one becomes smaller meanwhile."""
        target = self.state.target
        begun = [disk for disk in self.disks if disk.choice.bitmap is None and disk.new is not None]
        if not begun:
            return
        await self._step("mark the sizes of the disks")
        nodes = await block_nodes(qmp)
        # One that could not be removed may be used again some time, and this mark would not be its own.
        alone = [
            Marked(disk.number, disk.disk.device, disk.disk.node, disk.disk.size, disk.persistent)
            for disk in begun
            if all(bitmap.name == disk.new for bitmap in our_bitmaps([nodes[disk.disk.node]], target))
        ]
        self.warnings += await add_marks(qmp, target, alone, partial(NbdAddress.unix, self.run.socket))
        await self._until_no_export(qmp)
        await remove_helpers(qmp, alone)

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

    async def _undo(self, qmp: Qmp, undone: Undone, *, success: bool) -> None:
        result = await undo(qmp, server=self.state.nbd_server)
        undone.problems += result.problems
        undone.kept += result.kept
        if result.held:
            return  # the next run settles the bitmaps as well, as after a kill
        # The bitmaps are of the disks' own nodes: what is left in the way above them does not matter here.
        self.on_step("hand the bitmaps over")
        names = [(disk.disk.node, disk.choice.bitmap, disk.new) for disk in self.disks if disk.new is not None]
        self.warnings += await bitmaps.hand_over(qmp, names, success=success)
        if not success:
            begun = [disk.disk.node for disk in self.disks if disk.choice.bitmap is None]
            self.warnings += await remove_marks(qmp, self.state.target, begun)
        if not result.problems:
            for done in await remove_orphans(qmp, [disk.disk.node for disk in self.disks]):
                self.on_step(done)
        if result.images:
            await remove_files(self.run, self.state, self.scratch.folder, undone)


def _guard(node: str) -> Mapping[str, object]:
    data = {"node": node, "name": GUARD, "granularity": bitmaps.GRANULARITY, "disabled": True, "persistent": False}
    return {"type": "block-dirty-bitmap-add", "data": data}


def _image(number: int, filename: str) -> Mapping[str, object]:
    return {"driver": "file", "node-name": f"fleece-f{number}", "discard": "unmap", "filename": filename}


def _pass_through(disk: FleecedDisk, below: str) -> Mapping[str, object]:
    """The pass-through node over the node `below`.

    Of fixed size: QEMU refuses `block_resize` then, where it would abort while the map is exported, or as soon as
    the view is read beyond the end of a disk that became smaller.
    """
    return {"driver": "raw", "node-name": f"fleece-p{disk.number}", "file": below, "size": disk.disk.size}


class Stock:
    """The flavour that any QEMU has; see `flavours.Flavour`."""

    @property
    def name(self) -> FlavourName:
        """Which."""
        return FlavourName.STOCK

    async def survey(self, qmp: Qmp, selection: DiskSelection, *, instead: Mapping[str, str] | None = None) -> Survey:
        """As `DiskSelection.survey`."""
        return await selection.survey(qmp, instead=instead)

    async def as_settled(self, nodes: Iterable[BlockNode], target: str, finished: Finished) -> Settled:
        """The bitmaps as `settle` would leave them."""
        nodes = list(nodes)
        settled = await _as_settled(our_bitmaps(nodes, target), finished)
        return replace(settled, unsure=unsure(nodes, target))

    async def settle(self, qmp: Qmp, target: str, finished: Finished) -> Settled:
        """Finish what an interrupted backup to `target` has left; nodes and exports must be cleaned up before."""
        lost = await bitmaps.settle_interrupted(qmp, target, finished)
        nodes = (await block_nodes(qmp)).values()
        return Settled(our_bitmaps(nodes, target), lost, unsure(nodes, target))

    def bitmap_name(self, name: BitmapName) -> str:
        """Its own."""
        return str(name)

    def fleecing(
        self,
        order: Order,
        chosen: Sequence[tuple[Disk, Choice]],
        *,
        able: Capabilities,
        run: Run,
        nodes: Iterable[BlockNode],
    ) -> StockFleecing:
        """The disks with the names of everything that is added for them; numbers in use are not used."""
        disks = _fleeced(order, chosen, run, {ours.number for node in nodes if (ours := node.ours) is not None})
        return StockFleecing(
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
        )


async def _as_settled(found: Iterable[Bitmap], finished: Finished) -> Settled:
    """The bitmaps as `settle_interrupted` would leave them, and why others would be gone."""
    settled: list[Bitmap] = []
    lost = {}
    for place, group in bitmaps.by_disk(found).items():
        number = bitmaps.undecided(group)
        settlement = bitmaps.settle(group, None if number is None else await finished(number))
        if settlement.lost:
            lost[place] = settlement.lost
        for bitmap in group:
            if bitmap.busy or bitmap.name == settlement.kept:
                count = settlement.count if bitmap.name == settlement.kept else bitmap.count
                settled.append(bitmaps.recording(bitmap, count))
    return Settled(settled, lost)


def _fleeced(order: Order, chosen: Sequence[tuple[Disk, Choice]], run: Run, taken: set[int]) -> list[FleecedDisk]:
    numbers = (number for number in range(len(chosen) + len(taken) + 1) if number not in taken)
    mode = order.bitmap_mode
    return [
        FleecedDisk(
            disk,
            choice,
            number,
            None if mode is BitmapMode.NONE else BitmapName(order.target, bitmaps.disk_id(disk.name), order.new_id),
            order.scratch.folder / image_name(run.peer, number),
            export=f"drive-{number}",
            view=f"fleece-s{number}",
            persistent=mode is BitmapMode.PERSISTENT and disk.persistent_bitmaps_possible,
        )
        for (disk, choice), number in zip(chosen, numbers, strict=False)
    ]
