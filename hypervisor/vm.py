"""A running VM as something to be backed up: `frozen_view` for the backup, `preview` and `cleanup` for people.

docs/hypervisor.md describes what happens in QEMU.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from core.errors import FleeceError
from core.limits import in_io_thread
from core.nursery import open_nursery
from hypervisor import access, bitmaps
from hypervisor.bitmaps import (
    BaseInfo,
    BaseOf,
    Bitmap,
    BitmapMode,
    Choice,
    Finished,
    Situation,
    choose,
    our_bitmaps,
    target_id,
)
from hypervisor.block_graph import block_nodes, children, released
from hypervisor.checked import field, of_type, printable
from hypervisor.cmdline import took_over
from hypervisor.discovery import OUR_PREFIX, Disk, capabilities, check_vm
from hypervisor.errors import FleecingError, VmStateError, VmUnsupportedError
from hypervisor.flavours import DiskSelection, Flavour, FlavourName, Order, Standstill
from hypervisor.fleecing import Fleecing
from hypervisor.guest_agent import thaw_leftover
from hypervisor.leftovers import Undone, clean_killed
from hypervisor.live_source import LiveSource
from hypervisor.nbd_client import open_nbd
from hypervisor.pause import Pause
from hypervisor.proxmox import Proxmox
from hypervisor.qmp import Qmp, connect
from hypervisor.scratch import Scratch, remove_stale
from hypervisor.size_marks import remove_marks
from hypervisor.state import Run, clean_dead, exclusive, half_disks, started
from hypervisor.stock import Stock
from hypervisor.view import FrozenView

__all__ = [
    "BaseInfo",
    "BaseOf",
    "BitmapMode",
    "DiskPreview",
    "DiskSelection",
    "Finished",
    "FrozenView",
    "Scratch",
    "check_identity",
    "cleanup",
    "frozen_view",
    "preview",
    "target_id",
]

_CLEANUP_HINT: Final = "'fleece vm cleanup' removes it, and so does the next backup"


@asynccontextmanager
async def frozen_view(
    qmp_path: str | os.PathLike[str],
    *,
    target: str,
    new_id: int,
    base_of: BaseOf,
    finished: Finished,
    scratch: Scratch,
    run_dir: Path,
    disks: DiskSelection | None = None,
    bitmap_mode: BitmapMode = BitmapMode.PERSISTENT,
    guest_agent: Path | str | None = None,
    mount_points: Sequence[str] = (),
    pause: Pause = Pause.NEVER,
    cbw_timeout_s: int = 45,
    flavour: FlavourName | None = None,
    tpm_state: Path | None = None,
    at_instant: Callable[[Qmp], Awaitable[None]] | None = None,
    on_flavour: Callable[[FlavourName], None] = lambda _flavour: None,
    on_step: Callable[[str], None] = lambda _step: None,
    on_warning: Callable[[str], None] = lambda _warning: None,
) -> AsyncIterator[FrozenView]:
    """The disks of a running VM at one instant, to be read while the block runs; the guest goes on meanwhile.

    However the block ends, the VM is as before, but for the bitmaps: with `commit` the next backup counts from
    `new_id`, without it from where this one did. What a killed run has left is removed first. If something could not be
    undone, an error says so, also instead of a cancellation, or (when the block has failed already) a note at the
    block's error.

    Args:
        qmp_path: QMP socket; connected to at the beginning and at the end only.
        target: `bitmaps.target_id` of repository, namespace and group.
        new_id: backup time of the snapshot, Unix seconds.
        base_of: what the previous snapshot has of an archive, or why there is nothing to count on.
        finished: whether a backup time is a finished snapshot of the target; asked after an interrupted backup. If it
            raises, no bitmap is touched and the backup stops.
        scratch: where fleecing images go; running short of space there ends the block with an error.
        run_dir: folder for socket, lock and state, the same for all runs on a host.
        disks: which disks; None: all.
        bitmap_mode: whether dirty bitmaps are kept, and where.
        guest_agent: socket of the guest agent, for freezing the file systems at the instant.
        mount_points: of the file systems that are frozen; empty: all.
        pause: whether the guest is paused for the instant.
        cbw_timeout_s: seconds a guest write may wait for the fleecing image before the view is given up.
        flavour: STOCK or PROXMOX; None: what this QEMU offers.
        tpm_state: file or device with the state of the VM's TPM; used by the flavour PROXMOX.
        at_instant: called right after the instant, while the guest is frozen.
        on_flavour: called as soon as the flavour is known, before any change.
        on_step: called with a few words before each change.
        on_warning: called at the end with each sentence for the report, also if the block, or the set-up, failed.

    Raises:
        VmStateError: another run works on this QEMU, or the VM's state allows no backup.
        VmUnsupportedError, DiskNameError: as `discovery.survey`, `capabilities` and `flavour_of`.
        FleecingError: QEMU refused a step, or something could not be undone.
        SourceError: the sources' own.
        QmpError, QmpAnswerError: QEMU cannot be talked to.
        FleeceError: what `finished` raises.
    """
    path = os.fspath(qmp_path)
    async with AsyncExitStack() as stack:
        untold = half_disks(await clean_dead(run_dir))  # nobody else remembers it

        @stack.callback
        def tell() -> None:
            for line in untold:
                on_warning(line)

        async with connect(path) as qmp:
            run = stack.enter_context(exclusive(run_dir, qmp.peer))
            able = await capabilities(qmp)
            undone = await clean_killed(qmp, run, scratch.folder)
            _check_clean(undone, path)
            kind = await flavour_of(qmp, flavour, tpm_state=tpm_state)
            on_flavour(kind.name)
            settled = await kind.settle(qmp, target, finished)
            found = await kind.survey(qmp, disks or DiskSelection())
            if not found.disks:
                raise FleecingError("back up the VM at", path, "it has no disk to be backed up")
            await check_vm(qmp, found.disks)
            nodes = await block_nodes(qmp)
            await scratch.prepare(qmp, nodes.values())
            situation = Situation(
                target=target,
                mode=bitmap_mode,
                disks=found.disks,
                bitmaps=settled.bitmaps,
                lost=settled.lost,
                started=started(qmp.peer),
                base_of=base_of,
                finished=finished,
                unsure=settled.unsure,
                graph=await children(qmp),
                migrated=await took_over(qmp.peer),
            )
            chosen = [(disk, await choose(disk, situation)) for disk in found.disks]
            order = Order(
                qmp_path=path,
                target=target,
                new_id=new_id,
                scratch=scratch,
                bitmap_mode=bitmap_mode,
                standstill=Standstill(agent=guest_agent, mount_points=mount_points, pause=pause),
                cbw_timeout_s=cbw_timeout_s,
                at_instant=at_instant,
                on_step=on_step,
            )
            fleecing = kind.fleecing(order, chosen, able=able, run=run, nodes=nodes.values())
            fleecing.warnings += untold
            untold = []
            if undone.actions:
                fleecing.warnings.append(f"another run was killed; done for it: {', '.join(undone.actions)}")
            teardown = _Teardown(fleecing, on_warning)
            # Armed before the first change, so that a set-up whose answer got lost is undone too.
            stack.push_async_exit(teardown)
            await fleecing.set_up(qmp)
        view = teardown.view = FrozenView(
            kind.name,
            able,
            instant=fleecing.instant,
            frozen_s=fleecing.frozen_s,
            left_out=found.left_out,
            warnings=fleecing.warnings,
        )
        for disk in fleecing.disks:
            with fleecing.telling_of_a_crash():
                pool = await stack.enter_async_context(open_nbd(fleecing.address(disk), sparse=False))
            source = LiveSource(
                disk.disk.name,
                disk.disk.size,
                disk.plan,
                changed=disk.changed,
                pool=pool,
                able=able,
                only_changed=kind.name is FlavourName.PROXMOX,
            )
            view.sources.append(source)
        async with open_nursery() as nursery:
            nursery.start_soon(scratch.watch)
            yield view
            nursery.cancel_scope.cancel()


class _Teardown:
    """The end of a frozen view, as an exit callback."""

    def __init__(self, fleecing: Fleecing, on_warning: Callable[[str], None]) -> None:
        self._fleecing, self._on_warning = fleecing, on_warning
        self.view: FrozenView | None = None

    async def __call__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        success = self.view is not None and self.view.committed
        for source in self.view.sources if self.view is not None else ():
            if source.distrusted:
                self._fleecing.distrust(source.name)
        problems = await self._fleecing.tear_down(success=success)
        for warning in self._fleecing.warnings:
            self._on_warning(warning)
        if not problems:
            return False
        text = "; ".join(problems)
        if not isinstance(error, Exception):  # none, or a cancellation, which nobody would read the note of
            raise FleecingError("take the frozen view down of", self._fleecing.qmp_path, text, _CLEANUP_HINT)
        error.add_note(f"afterwards the frozen view could not be taken down: {text}; {_CLEANUP_HINT}")
        return False


async def flavour_of(qmp: Qmp, wanted: FlavourName | None = None, *, tpm_state: Path | None = None) -> Flavour:
    """The flavour for this QEMU: PROXMOX if it has all that needs, else STOCK; or the one that is `wanted`.

    Raises:
        VmUnsupportedError: it has not what the flavour that is wanted needs.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    if wanted is FlavourName.STOCK:
        return Stock()
    lacking = await access.supported(qmp)
    if lacking and wanted is not None:
        raise VmUnsupportedError("back up the VM at", qmp.where, f"no QEMU of Proxmox VE: {lacking}", "--flavour stock")
    return Stock() if lacking else Proxmox(tpm_state)


def _check_clean(undone: Undone, path: str) -> None:
    if undone.problems:
        raise VmStateError(
            "remove what a killed run has left in the VM at",
            path,
            "; ".join(undone.problems),
            "try again; it goes with the VM's QEMU at the latest",
        )


# -- for people -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DiskPreview:
    """What the next backup would do with one disk."""

    name: str  #: of the archive, `drive-scsi0.img`
    device: str
    node: str
    size: int  #: bytes
    bitmap: str | None  #: name of the bitmap it would use
    mode: str  #: `incremental` or `full`
    reason: str  #: why it would be full, empty if not
    bytes: int  #: it would read, at most
    bitmaps: Sequence[Bitmap] = ()  #: those of all targets on the disk's root


async def preview(
    qmp: Qmp,
    disks: Sequence[Disk],
    target: str,
    base_of: BaseOf,
    finished: Finished,
    *,
    bitmap_mode: BitmapMode = BitmapMode.PERSISTENT,
    bitmaps_free: bool = False,
    flavour: Flavour | None = None,
) -> list[DiskPreview]:
    """What the next backup to `target` would read of `disks`, and why; changes nothing.

    `bitmaps_free`: as `leftovers.Left` says.

    Raises:
        FleeceError: what `finished` raises.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    nodes = await block_nodes(qmp)
    if bitmaps_free:
        nodes = {name: released(node) for name, node in nodes.items()}
    flavour = flavour or await flavour_of(qmp)
    settled = await flavour.as_settled(nodes.values(), target, finished)
    situation = Situation(
        target=target,
        mode=bitmap_mode,
        disks=disks,
        bitmaps=settled.bitmaps,
        lost=settled.lost,
        started=started(qmp.peer),
        base_of=base_of,
        finished=finished,
        unsure=settled.unsure,
        graph=await children(qmp),
        migrated=await took_over(qmp.peer),
    )
    result = []
    for disk in disks:
        if disk.node.startswith(OUR_PREFIX):
            choice = Choice(None, None, "another backup runs, or one was killed")
        else:
            choice = await choose(disk, situation)
        dirty = [
            bitmap.count for bitmap in settled.bitmaps if bitmap.node == disk.node and bitmap.name == choice.bitmap
        ]
        result.append(
            DiskPreview(
                name=disk.name,
                device=disk.device,
                node=disk.node,
                size=disk.size,
                bitmap=None if choice.bitmap is None else flavour.bitmap_name(choice.bitmap),
                mode="full" if choice.bitmap is None else "incremental",
                reason=choice.reason,
                # The last granule may reach beyond the end of the disk.
                bytes=min([*dirty, disk.size]),
                bitmaps=our_bitmaps([nodes[disk.node]], None) if disk.node in nodes else (),
            )
        )
    return result


async def cleanup(
    qmp_path: str | os.PathLike[str],
    *,
    run_dir: Path,
    scratch: Path | None = None,
    guest_agent: Path | str | None = None,
    remove_bitmaps: bool = False,
    target: str | None = None,
    before: int | None = None,
) -> list[str]:
    """Remove what killed runs have left in a VM and on this host; returns what was done, in words.

    With `remove_bitmaps` the dirty bitmaps go too, of `target` or (None) of all targets: the next backup reads
    everything. With `before` (Unix seconds) only those that count from an earlier backup.

    Raises:
        VmStateError: a backup of this VM runs, or something cannot be removed.
        QmpError, QmpAnswerError: QEMU cannot be talked to; files of QEMUs that are gone were removed all the same.
    """
    done = await clean_dead(run_dir)
    try:
        async with connect(qmp_path) as qmp:
            with exclusive(run_dir, qmp.peer) as run:
                done += await _clean(qmp, run, scratch)
                if guest_agent is not None:
                    done += await thaw_leftover(guest_agent)
                if remove_bitmaps and before is not None:
                    done += await _remove_older(qmp, target, before)
                elif remove_bitmaps:
                    found = our_bitmaps((await block_nodes(qmp)).values(), target)
                    problems = await bitmaps.remove(qmp, found)
                    removed = len(found) - len(problems) + await access.forget(qmp, target)
                    done += [f"removed {removed} dirty bitmaps"] if removed or found else []
                    done += [*problems, *await remove_marks(qmp, target)]
    except FleeceError as error:
        for line in done:
            error.add_note(line)
        raise
    return done


async def check_identity(qmp_path: str, uuid: str) -> None:
    """Make sure that the VM behind a socket is the one that is meant.

    Args:
        qmp_path: QMP socket.
        uuid: as QEMU was given it by `-uuid`.

    Raises:
        FleecingError: it is another.
        QmpError, QmpAnswerError: QEMU cannot be talked to.
    """
    async with connect(qmp_path) as qmp:
        where = f"{qmp_path}, query-uuid"
        found = field(of_type(await qmp.execute("query-uuid"), dict, where), "UUID", str, where)
        if found.lower() == uuid.lower():
            return
        named = of_type(await qmp.execute("query-name"), dict, where).get("name")
    who = f" ({printable(named)})" if isinstance(named, str) else ""
    why = f"the VM there has the UUID {printable(found)}{who}, and {uuid} is meant"
    raise FleecingError("use the VM at", qmp_path, why, "does another VM have that socket now?")


async def _remove_older(qmp: Qmp, target: str | None, before: int) -> list[str]:
    """The bitmaps of targets that nobody backs up to any more."""
    done = []
    for old in our_bitmaps((await block_nodes(qmp)).values(), target):
        if old.name.id < before:
            problems = await bitmaps.remove(qmp, [old]) or await remove_marks(qmp, old.name.target, [old.node])
            done += problems or [f"removed the dirty bitmap {old.name} on {old.node}"]
    return done


async def _clean(qmp: Qmp, run: Run, scratch: Path | None) -> list[str]:
    undone = await clean_killed(qmp, run, scratch)
    _check_clean(undone, qmp.where)
    stale = [] if scratch is None else await in_io_thread(remove_stale, scratch)
    return [*undone.actions, *undone.kept, *(f"removed the fleecing image {path}" for path in stale)]
