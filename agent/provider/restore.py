"""A restore by Proxmox VE through its backup provider: one session for one guest.

Disks of a VM are files of a mount, or served over NBD, each on a socket of its own; the files of a container are a
mounted folder, or a tar file. All of it ends with the session. docs/proxmox-provider.md, "What holds what".
"""

import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from agent.archive_restore import FilesWanted, restore_to_stream
from agent.places import private_run_dir
from agent.provider.calls import opened
from agent.provider.channel import Channel, ChannelProgress
from agent.provider.messages import (
    Nothing,
    OfArchive,
    RestoreContainer,
    RestoreVm,
    RestoreVolume,
    RestoreVolumeInit,
    parsed,
)
from agent.provider.storage import UsedStorage
from agent.provider.tar_file import open_tar_file
from agent.restore_options import RestoreOptions
from agent.snapshot_archives import OpenSnapshot
from core.buffers import Buffer
from core.errors import FleeceError, NotFoundError, TargetError, UsageError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from datastore.names import ArchiveKind, archive_kind, complete_archive_name
from hypervisor.nbd_server import serve_disk
from hypervisor.unix_socket import process_start_time
from repository.archive import ArchiveReader, open_archive_reader

#: The file archive of a container.
ROOT: Final = "root.pxar"
_FOLDER: Final = "restore-"


class ServedImage:
    """An image of a backup as `hypervisor.nbd_server` wants it."""

    def __init__(self, reader: ArchiveReader) -> None:
        self._reader = reader

    @property
    def size(self) -> int:
        """Bytes."""
        return self._reader.size

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range.

        Raises:
            FleeceError: a chunk of it cannot be read.
        """
        return await self._reader.read(offset, length)

    def zeros(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        """The parts of a range, and which are known to be zeros."""
        index = self._reader.archive.index
        found: list[tuple[int, bool]] = []
        end = offset + length
        while offset < end:
            number = index.find(offset)
            start, size = index.span(number)
            zero, part = self._reader.is_zero(number), min(end, start + size) - offset
            if found and found[-1][1] is zero:
                found[-1] = (found[-1][0] + part, zero)
            else:
                found.append((part, zero))
            offset += part
        return found


#: Mounts what the session restores from on a folder, until it is taken away; calls back when it is usable.
Mount = Callable[[Path, Callable[[], None]], Awaitable[None]]


async def mounted(folder: Path, nursery: trio.Nursery, mount: Mount) -> Path:
    """A mount in `folder`, as long as `nursery` lives; returns where.

    Raises:
        FleeceError: it cannot be mounted. If it is taken away, `nursery` fails.
    """
    at = folder / "root"
    at.mkdir(mode=0o700)

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await mount(at, task_status.started)
        raise TargetError("show the files in", str(at), "the mount was taken away")

    await nursery.start(serve)
    return at


class VmRestore:
    """The disks of one VM."""

    def __init__(self, snapshot: OpenSnapshot, folder: Path, nursery: trio.Nursery, mount: Mount) -> None:
        self._snapshot, self._folder, self._nursery, self._mount = snapshot, folder, nursery, mount
        self._served: dict[str, trio.CancelScope] = {}
        self._ended: dict[str, trio.Event] = {}
        self._shown: set[str] = set()
        self._mounted: Path | None = None

    @property
    def volumes(self) -> dict[str, dict[str, int]]:
        """The disks by device name."""
        return {
            name.removesuffix(".img"): {"size": file.size}
            for name, file in self._snapshot.archives.items()
            if name.endswith(".img") and archive_kind(file.filename) is ArchiveKind.FIXED
        }

    async def answer(self, call: str, parameters: object) -> dict[str, Any]:
        """Do one call.

        Raises:
            UsageError: it is unknown, or its turn has not come.
            FleeceError: it failed.
        """
        if call not in ("restore-vm-volume-init", "restore-vm-volume-cleanup"):
            raise UsageError("answer", call, "it is no call of a restore of a VM")
        if call == "restore-vm-volume-init":
            wanted = parsed(RestoreVolumeInit, parameters, call)
            if wanted.device in self._served or wanted.device in self._shown:
                raise UsageError("serve", wanted.device, "it is served already")
            if wanted.as_file:
                return {"path": str(await self._show(wanted.device))}
            return {"uri": str(await self._nursery.start(self._serve, wanted.device))}
        device = parsed(RestoreVolume, parameters, call).device
        if device in self._shown:
            self._shown.remove(device)  # the mount stays, for others
            return {}
        if device not in self._served:
            raise UsageError("end the service of", device, "it was not served")
        self._served[device].cancel()
        await self._ended[device].wait()
        return {}

    def _archive(self, device: str) -> str:
        """The archive of a disk, by its whole name.

        Raises:
            NotFoundError, KeyNeededError: there is none, or it cannot be read.
        """
        if device not in self.volumes:
            raise NotFoundError("restore", self._snapshot.where(f"{device}.img"), "the backup has no such disk")
        name = complete_archive_name(f"{device}.img")
        self._snapshot.needs_key(self._snapshot.manifest.file(name))
        return name

    async def _show(self, device: str) -> Path:
        """The disk as a file."""
        self._archive(device)
        if self._mounted is None:
            self._mounted = await mounted(self._folder, self._nursery, self._mount)
        path = self._mounted / f"{device}.img"
        try:
            # In a thread: this process answers the question.
            found = (await in_io_thread(path.stat)).st_size
        except OSError as error:
            raise TargetError("show the disk in", str(path), os_reason(error)) from error
        if found != self.volumes[device]["size"]:
            raise TargetError("show the disk in", str(path), f"it has {found} B there")
        self._shown.add(device)
        return path

    async def _serve(self, device: str, *, task_status: trio.TaskStatus[object]) -> None:
        snapshot, name = self._snapshot, self._archive(device)
        ended = trio.Event()
        try:
            with trio.CancelScope() as scope:
                reader = await open_archive_reader(
                    snapshot.reader, snapshot.codec, snapshot.manifest, name, snapshot.cache
                )
                async with serve_disk(ServedImage(reader), where=snapshot.where(f"{device}.img")) as address:
                    self._served[device], self._ended[device] = scope, ended
                    task_status.started(address)
                    await trio.sleep_forever()
        finally:
            self._served.pop(device, None)
            ended.set()


class ContainerRestore:
    """The files of one container."""

    def __init__(self, snapshot: OpenSnapshot, folder: Path, nursery: trio.Nursery, progress: ChannelProgress) -> None:
        self._snapshot, self._folder, self._nursery, self._progress = snapshot, folder, nursery, progress

    async def make_tar(self, stack: AsyncExitStack) -> Path:
        """Write a tar file, which is there as long as `stack` is; returns its path.

        Raises:
            NotFoundError: the backup has no files of a container.
            TargetError: it cannot be written, or not all entries can be read.
            FleeceError: what cannot be read.
        """
        self._check()
        snapshot = self._snapshot
        file = await stack.enter_async_context(open_tar_file(self._folder / "root.tar"))
        restored = await restore_to_stream(
            snapshot.reader,
            snapshot.codec,
            snapshot.manifest,
            FilesWanted(ROOT.removesuffix(".pxar")),
            file.write,
            RestoreOptions(),
            self._progress,
            format="tar",
            folder=b".",  # as the hypervisor's own archives have it: by such names it leaves ./dev/* out
        )
        if restored.figures.failed:
            raise TargetError("restore", snapshot.where(ROOT), f"{restored.figures.failed} entries failed")
        return await file.finish()

    def _check(self) -> None:
        entry = self._snapshot.archives.get(ROOT)
        if entry is None:
            raise NotFoundError("restore", self._snapshot.where(ROOT), "the backup has no files of a container")
        self._snapshot.needs_key(entry)

    async def begin_mount(self, mount: Mount) -> Path:
        """Show the files as a folder; returns it.

        Raises:
            NotFoundError: the backup has no files of a container.
            FleeceError: it cannot be mounted.
        """
        self._check()
        return await mounted(self._folder, self._nursery, mount)

    async def answer(self, call: str, parameters: object) -> dict[str, Any]:
        """Do one call.

        Raises:
            UsageError: it is unknown.
        """
        if call != "restore-container-cleanup":
            raise UsageError("answer", call, "it is no call of a restore of a container")
        parsed(Nothing, parameters, call)
        return {}


async def serve_restore(channel: Channel, storage: UsedStorage, request: RestoreVm | RestoreContainer) -> None:
    """Open the archive that `request` names, and answer until everything is cancelled.

    Raises:
        FleeceError: it cannot be opened, or what serves it ends.
    """
    progress = ChannelProgress(channel)
    async with AsyncExitStack() as stack:
        stack.enter_context(_told(progress))
        folder = await stack.enter_async_context(private_folder())
        snapshot = await stack.enter_async_context(opened(request, storage, progress))
        nursery = await stack.enter_async_context(open_nursery())
        answer: Callable[[str, object], Any]
        if isinstance(request, RestoreContainer):
            container = ContainerRestore(snapshot, folder, nursery, progress)
            if request.mechanism == "tar":
                path = await container.make_tar(stack)
            else:
                path = await container.begin_mount(partial(_mount, storage, request, ROOT))
            channel.answer({"path": str(path)})
            answer = container.answer
        else:
            machine = VmRestore(snapshot, folder, nursery, partial(_mount, storage, request, None))
            if not machine.volumes:
                raise NotFoundError("restore", request.archive_name, "the backup has no disks")
            channel.answer({"volumes": machine.volumes})
            answer = machine.answer
        while True:
            question = await channel.question()
            try:
                result = await answer(question.call, question.parameters)
            except FleeceError as error:
                channel.refuse(error)
            else:
                channel.answer(result)


@contextmanager
def _told(progress: ChannelProgress) -> Iterator[None]:
    """What mount and servers complain of goes into the job's log: who reads from them learns of an I/O error only."""
    token = trio.lowlevel.current_trio_token()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(progress.warn, record.getMessage())

    handler = Handler()
    loggers = [logging.getLogger(name) for name in ("fusefs", "hypervisor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)  # whatever standard error is to get
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


async def _mount(
    storage: UsedStorage, request: OfArchive, archive: str | None, folder: Path, ready: Callable[[], None]
) -> None:
    """Show an archive (None: all of the snapshot) in `folder` until it is taken away; cancelled, it is unmounted."""
    from fusefs.mount import OneArchive, OneSnapshot, serve
    from fusefs.mountpoint import check_fuse

    check_fuse()
    snapshot = request.snapshot(storage.ns)
    async with storage.open() as repository:
        await serve(
            repository,
            folder,
            key=storage.reading_key.key,
            ns=storage.ns,
            archive=OneSnapshot(snapshot) if archive is None else OneArchive(snapshot, archive),
            ready=ready,
        )


@asynccontextmanager
async def private_folder() -> AsyncIterator[Path]:
    """A folder for nobody else while the block runs; removes those of processes that were killed.

    Raises:
        FleeceError: it cannot be made.
    """
    above = private_run_dir() / "provider"
    try:
        above.mkdir(mode=0o700, exist_ok=True)
        await in_io_thread(_remove_left, above)
        begun = f"{_FOLDER}{os.getpid()}-{process_start_time(os.getpid()) or 0}-"
        folder = Path(tempfile.mkdtemp(prefix=begun, dir=above))
    except OSError as error:
        raise TargetError("use the folder", str(above), os_reason(error)) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(above: Path) -> None:
    """Remove the folders of processes that have ended, and their mounts."""
    for folder in above.glob(f"{_FOLDER}*"):
        parts = folder.name.removeprefix(_FOLDER).split("-")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts[:2]):
            continue
        if process_start_time(int(parts[0])) != int(parts[1]):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove the folder of a process that has ended, with what is mounted in it, as far as that is possible."""
    from fusefs.kernel import detach

    # What cannot be looked at is a mount whose server is gone.
    detach(str(folder / "root"))
    for entry, end in ((folder / "root", os.rmdir), (folder / "root.tar", os.unlink), (folder, os.rmdir)):
        with suppress(OSError):
            end(entry)
