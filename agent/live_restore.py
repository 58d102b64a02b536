"""A machine that runs while its disks come out of a backup: serving them, starting QEMU, filling the targets.

What is needed to go on is written down in the machine's folder before QEMU starts, so that after a crash of this
process, of QEMU or of the host `fleece vm restore --resume FOLDER` goes on where the disks are. QEMU outlives this
process. docs/vm-restore.md, "Live".
"""

import fcntl
import hashlib
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from agent.cli_restore import write_small_file
from agent.live_state import STATE_NAME, LiveState
from agent.nbd_offers import ImageDisk
from agent.places import private_run_dir
from agent.snapshot_archives import OpenSnapshot
from agent.vm_restore import (
    PlannedDisk,
    RestoredVm,
    RestoreOrder,
    check_free,
    left_out,
    make_folder,
    plan_disks,
    read_small_files,
    refuse_live,
    small_files,
)
from agent.vm_script import (
    RUN_FOLDER,
    TPM_FOLDER,
    ScriptOptions,
    firmware_for,
    machine_of,
    tpm_folder,
    write_script,
)
from core.errors import BusyError, FleeceError, TargetError, UsageError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress
from datastore.names import complete_archive_name
from hypervisor.errors import NbdServerError, QmpConnectError, QmpError, VmStateError
from hypervisor.live_restore import SECTOR, LiveDisk, Look, Streaming, gone_over, stopping_at_errors
from hypervisor.machine import Channels, command_line
from hypervisor.machine_model import special_archives
from hypervisor.nbd_endpoint import Endpoint
from hypervisor.nbd_server import find_nbdkit, serve_disk
from hypervisor.qemu_tools import prepare_overlay
from hypervisor.qmp import connect
from hypervisor.target_files import look_at
from hypervisor.targets import open_target
from repository.archive import open_archive_reader
from repository.restore import restore_disk

#: In the machine's folder: what QEMU has said, and what a process in the background has to tell.
LOG_NAME: Final = "qemu.log"
RESTORE_LOG_NAME: Final = "restore.log"
#: Ranges of zeros that are marked before the start; the guest waits for it.
_MAX_ZEROS: Final = 4096
#: Seconds for QEMU to start.
START_TIMEOUT_S: Final = 120.0
#: Seconds until a server that has ended is started again.
_RESTART_S: Final = 0.5
#: Seconds between two tries to reach QEMU.
_RETRY_S: Final = 1.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOptions:
    """How the machine runs."""

    script: ScriptOptions  #: of the script that is written when the disks are whole, and for network and firmware
    with_script: bool = True
    program: str | None = None  #: QEMU; None: the one of the machine's architecture
    accel: Sequence[str] = ("kvm", "tcg")  #: accelerators, the first that works is taken
    extra: Sequence[str] = ()  #: more words for QEMU's command line


# -- before QEMU starts -----------------------------------------------------------------------------------------------


async def prepare(opened: OpenSnapshot, order: RestoreOrder, options: LiveOptions, progress: Progress) -> LiveState:
    """Make targets and files, and write down what is about to be done; failed, nothing is left but (with force) less.

    Raises:
        TargetError, DiskInUseError, BusyError, UsageError, NotFoundError: as `vm_restore.restore_vm`; also for an NBD
            target, which cannot be restored to live, and for a folder in which a machine runs.
        NbdServerError: nbdkit is missing.
    """
    folder = await in_io_thread(order.folder.absolute)
    await in_io_thread(refuse_live, folder)
    await in_io_thread(_refuse_running, folder)
    await in_io_thread(find_nbdkit, str(opened.snapshot))
    there = await in_io_thread(_there, folder)
    planned = [
        # Without links: made, and removed after a failure, is what they lead to.
        disk if disk.kind != "file" else replace(disk, target=await in_io_thread(os.path.realpath, disk.target))
        for disk in plan_disks(opened, replace(order, folder=folder))
    ]
    for disk in planned:
        if disk.kind == "nbd":
            raise UsageError("restore live to", disk.target, "an NBD export cannot be filled while the machine runs")
    contents = await read_small_files(opened, small_files(opened))
    special = special_archives(disk.archive for disk in planned)
    made_folders = await in_io_thread(make_folder, folder)
    made: list[Path] = []
    emptied: list[Path] = []
    try:
        places = {name: folder / name for name in contents}
        await in_io_thread(check_free, [*places.values(), *order.writes], order.force)
        for disk in planned:  # all of them, before the first is changed
            await in_io_thread(lambda disk=disk: look_at(Path(disk.target), disk.entry.size, force=order.force))
        sockets = await in_io_thread(_socket_folder, folder)
        state = LiveState(
            str(opened.snapshot), str(opened.snapshot.group.ns), order.name or opened.snapshot.group.id, str(folder),
            [_live_disk(number, disk, folder, sockets) for number, disk in enumerate(planned)
             if disk.archive not in special],
            [disk.restored() for disk in planned if disk.archive in special],
            {name: str(path) for name, path in places.items()},
            left_out(opened, planned),
            [],
            str(_own_socket(folder)),
            options.script.to_json() if options.with_script else None,
        )  # fmt: skip
        live = {disk.archive: disk for disk in state.disks}
        for disk in planned:
            await _make_target(opened, disk, live.get(disk.archive), order.force, made, emptied, progress)
        for name, path in places.items():
            # Those of a TPM go on into a folder of its own.
            made += [one for one in (path, folder / TPM_FOLDER / name) if not await in_io_thread(one.exists)]
            await in_io_thread(write_small_file, path, contents[name], order.force)
        state = await in_io_thread(_with_line, state, options, progress)
        await in_io_thread(_out_of_the_way, order.writes)
        await in_io_thread(state.save)
    except BaseException:
        _give_up(folder, made, emptied, made_folders, there)
        raise
    return replace(state, made=made, emptied=emptied, made_folders=made_folders, there=there)


def _refuse_running(folder: Path) -> None:
    """Refuse a folder whose sockets a machine has, which would be taken for the one to come. Blocks.

    Raises:
        BusyError: somebody listens there.
    """
    for path in (folder / RUN_FOLDER / "qmp.sock", _own_socket(folder)):
        if path.is_socket() and not _nobody_listens(path):
            raise BusyError(
                "restore to", str(folder), f"a machine runs there ({path})", "end it, or use another folder"
            )


def _own_socket(folder: Path) -> Path:
    return folder / RUN_FOLDER / "fleece.sock"


def _there(folder: Path) -> list[Path]:
    """Files that are not this restore's, although they lie where its own go. Blocks."""
    found = [path for path in (folder / LOG_NAME,) if path.exists()]
    with suppress(OSError):
        found += (folder / RUN_FOLDER).iterdir()
    return found


def _give_up(
    folder: Path, files: Iterable[Path], emptied: Iterable[Path], folders: Iterable[Path], there: Sequence[Path]
) -> None:
    """Remove what was made of a machine that could not be started; files that were empty are so again. Blocks.

    `there` is what `_there` has found before.
    """
    for path in emptied:
        with suppress(OSError):
            os.truncate(path, 0)
    run = folder / RUN_FOLDER
    paths = [*files, folder / LOG_NAME, folder / STATE_NAME]
    with suppress(OSError):
        paths += run.iterdir()
    for path in paths:
        if path not in there:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    for path in [run, folder / TPM_FOLDER, *folders]:
        with suppress(OSError):
            path.rmdir()  # only if nothing else is in it


def _socket_folder(folder: Path) -> Path:
    """Where the servers of a machine's disks listen: the same for each process that serves them, and short. Blocks."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:12]
    path = private_run_dir() / "live" / name
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _live_disk(number: int, disk: PlannedDisk, folder: Path, sockets: Path) -> LiveDisk:
    stem = disk.archive.removesuffix(".img")
    overlay = None if disk.format == "qcow2" else str(folder / f"{stem}.live.qcow2")
    socket = str(sockets / str(number))
    return LiveDisk(number, disk.archive, disk.target, disk.format, disk.entry.size, socket, overlay)


async def _make_target(
    opened: OpenSnapshot,
    disk: PlannedDisk,
    live: LiveDisk | None,
    force: bool,
    made: list[Path],
    emptied: list[Path],
    progress: Progress,
) -> None:
    """Make the target, empty, or whole if it is not to be `live`; `open_target` refuses what must not be touched."""
    path = Path(disk.target)
    if disk.kind == "file":
        if not await in_io_thread(path.exists):
            made.append(path)
        elif not await in_io_thread(lambda: path.stat().st_size):
            emptied.append(path)
    format = "raw" if live is not None else disk.format  # a qcow2 file that is to be live is made below
    async with open_target(disk.target, disk.entry.size, force=force, format=format) as target:
        if live is None:
            await restore_disk(opened.reader, opened.codec, opened.manifest, disk.entry.filename, target, progress)
    if live is None:
        return
    image = Path(live.overlay or live.target)
    if live.overlay is not None:
        await in_io_thread(check_free, [image], force)
        made.append(image)
        if disk.kind == "file":
            await in_io_thread(_fresh, path, disk.entry.size)
    await in_io_thread(_empty, image)
    identity = f"{opened.snapshot}/{disk.archive} {disk.entry.csum.hex()[:16]}"
    zeros = await _zeros(opened, disk)
    await prepare_overlay(image, disk.entry.size, identity, Path(live.socket), zeros=zeros)


async def _zeros(opened: OpenSnapshot, disk: PlannedDisk) -> list[tuple[int, int]]:
    """The largest ranges that the index says to be zeros, which then nobody has to ask the server for."""
    reader = await open_archive_reader(
        opened.reader, opened.codec, opened.manifest, disk.entry.filename, opened.cache
    )  # fmt: skip
    found: list[tuple[int, int]] = []
    for number in range(reader.archive.index.count):
        if reader.is_zero(number):
            start, length = reader.archive.index.span(number)
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((start, length))
    return sorted(sorted(found, key=lambda one: -one[1])[:_MAX_ZEROS])


def _empty(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_TRUNC | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        raise TargetError("make", str(path), os_reason(error)) from error


def _fresh(path: Path, size: int) -> None:
    """All holes, of whole sectors as QEMU wants them."""
    try:
        os.truncate(path, 0)
        os.truncate(path, -(-size // SECTOR) * SECTOR)
    except OSError as error:
        raise TargetError("write to", str(path), os_reason(error)) from error


def _out_of_the_way(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _with_line(state: LiveState, options: LiveOptions, progress: Progress) -> LiveState:
    """`state` with QEMU's command line. Blocks."""
    vm = state.vm()
    machine = machine_of(vm)
    for warning in machine.warnings:
        progress.warn(warning)
    if machine.tpm is not None:
        tpm_folder(vm)
        progress.warn("the machine runs without its TPM until it is started by its script")
    run = vm.folder / RUN_FOLDER
    run.mkdir(mode=0o700, exist_ok=True)
    line = command_line(
        machine,
        {disk.archive: disk.backing() for disk in state.disks},
        program=options.program,
        accel=options.accel,
        firmware=firmware_for(machine, vm, options.script.firmware, progress),
        network=options.script.network,
        channels=Channels(run / "qmp.sock", run / "serial.sock", run / "agent.sock"),
    )
    line, cannot = stopping_at_errors(line)
    for device in cannot:
        progress.warn(f"a {device} cannot wait for a lost server: the guest gets the error")
    line += ["-chardev", f"socket,id=fleece-live,path={state.qmp.replace(',', ',,')},server=on,wait=off"]
    line += ["-mon", "chardev=fleece-live,mode=control", "-pidfile", str(run / "qemu.pid")]
    return replace(state, line=[*line, *options.extra], files={name: str(path) for name, path in vm.files.items()})


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else fills the machine in `folder` while the block runs.

    Raises:
        BusyError: somebody does.
    """
    sockets = _socket_folder(folder)
    lock = sockets / "lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), lock.stat()):
                raise BlockingIOError  # who had it has just ended, and somebody else has the new one
        except (BlockingIOError, FileNotFoundError) as error:
            raise BusyError("restore to", str(folder), "another process fills the disks there") from error
        try:
            yield
        finally:
            if not (folder / STATE_NAME).exists():
                with suppress(OSError):
                    lock.unlink()
                    sockets.rmdir()
    finally:
        os.close(descriptor)


# -- while it runs ----------------------------------------------------------------------------------------------------


async def run(
    opened: OpenSnapshot,
    state: LiveState,
    progress: Progress,
    started: Callable[[dict[str, Any]], None],
) -> RestoredVm:
    """Serve the disks, start QEMU unless it runs, and fill the targets until all are whole; then tidy up.

    `started` is called with what there is to tell as soon as the guest runs. Cancelled or failed after that, guests
    wait at what is not there yet, and `fleece vm restore --resume` goes on.

    Raises:
        VmStateError: QEMU cannot be started, or has ended before the disks were whole.
        FleeceError: the backup cannot be read, or not be served.
    """
    folder = Path(state.folder)
    async with open_nursery() as nursery:
        try:
            for disk in state.disks:
                await nursery.start(_serve, opened, disk)
            runs = await _runs(state)
            if not runs:
                await _start_qemu(state)
        except FleeceError:
            if state.fresh:  # it has never run
                await in_io_thread(_give_up, folder, state.made, state.emptied, state.made_folders, state.there)
            raise
        started({
            "snapshot": state.snapshot,
            "name": state.name,
            "folder": state.folder,
            "qmp": str(folder / RUN_FOLDER / "qmp.sock"),
            "disks": [{"name": disk.archive, "target": disk.target, "format": disk.format, "size": disk.size}
                      for disk in state.disks],
            "pid": os.getpid(),
            "was-running": runs,
        })  # fmt: skip
        await _fill(state, progress)
        nursery.cancel_scope.cancel()
    vm = state.vm()
    if state.script is not None:
        await write_script(vm, ScriptOptions.from_json(state.script), progress)
    await in_io_thread(_tidy, state)
    return vm


async def _serve(
    opened: OpenSnapshot, disk: LiveDisk, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve one disk for ever; a server that ends is started again."""
    filename = complete_archive_name(disk.archive)
    opened.needs_key(opened.manifest.file(filename))
    reader = await open_archive_reader(opened.reader, opened.codec, opened.manifest, filename, opened.cache)
    told = False
    while True:
        try:
            async with serve_disk(
                # QEMU never ends the read of a last sector that a server without a map has a part of only.
                ImageDisk(reader, SECTOR),
                where=f"{opened.snapshot} {disk.archive}",
                at=Endpoint(Path(disk.socket), replace=True),
                extents=False,
            ):
                if not told:
                    told = True
                    task_status.started()
                await trio.sleep_forever()
        except NbdServerError as error:
            if not told:
                raise
            _LOG.warning("%s; it is started again", error)
            await trio.sleep(_RESTART_S)


async def _runs(state: LiveState) -> bool:
    """Whether the machine's QEMU is there."""
    try:
        async with connect(state.qmp):
            return True
    except QmpConnectError as error:
        if _nobody_listens(Path(state.qmp)):
            return False
        raise VmStateError("go on with the machine in", state.folder, error.why, error.hint) from error


def _nobody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            pass
    return False


async def _start_qemu(state: LiveState) -> None:
    """Start QEMU, which goes into the background by itself when its disks are open.

    Raises:
        VmStateError: it ends, or takes too long; says what it has said.
    """
    log = Path(state.folder) / LOG_NAME
    with await in_io_thread(lambda: log.open("w+b")) as said:
        try:
            with trio.fail_after(START_TIMEOUT_S):
                done = await trio.run_process(
                    [*state.line, "-daemonize"], stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            hint = "apt install qemu-system-x86"
            raise VmStateError("start", state.line[0], os_reason(error), hint) from error
        except trio.TooSlowError as error:
            raise VmStateError("start", state.line[0], f"it was not ready after {START_TIMEOUT_S:.0f} s") from error
        if done.returncode:
            said.seek(0)
            words = " ".join(bytes(said.read(2000)).decode("utf-8", "replace").split())
            raise VmStateError("start the machine in", state.folder, words or f"exit code {done.returncode}")


async def _fill(state: LiveState, progress: Progress) -> None:
    async def going_over(disk: LiveDisk) -> None:
        nonlocal state
        state = replace(state, line=gone_over(state.line, disk))
        await in_io_thread(state.save)

    streaming = Streaming(state.disks, progress.log, going_over)
    size = sum(disk.size for disk in state.disks)
    with progress.task("disks", size) as task:
        done = 0

        def told(look: Look) -> None:
            nonlocal done
            if look.done > done:
                task.advance(look.done - done)
                done = look.done

        while True:
            try:
                async with connect(state.qmp) as qmp:
                    await streaming.until_whole(qmp, told)
                    return
            except QmpError as error:
                if await in_io_thread(_nobody_listens, Path(state.qmp)):
                    raise VmStateError(
                        "restore the machine in", state.folder, "its QEMU has ended before the disks were whole",
                        f"'fleece vm restore --resume {state.folder}' starts it again and goes on",
                    ) from error  # fmt: skip
                _LOG.info("%s", error)
                await trio.sleep(_RETRY_S)


def _tidy(state: LiveState) -> None:
    """The disks are whole: remove what was needed until then."""
    paths = [Path(disk.overlay) for disk in state.disks if disk.overlay is not None]
    folder = Path(state.folder)
    with suppress(OSError):
        for path in [*paths, folder / LOG_NAME, folder / RESTORE_LOG_NAME]:
            path.unlink(missing_ok=True)
    (folder / STATE_NAME).unlink(missing_ok=True)
