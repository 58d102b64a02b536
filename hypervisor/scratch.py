"""The scratch folder: one fleecing image per disk, and a watch over the space they may take.

A fleecing image is a sparse raw file that only QEMU reads and writes. It grows with what the guest overwrites, so it
must never take the space of the guest's own disks: a folder on their file system is refused unless it is configured,
and when space runs short the backup is broken, not the guest. docs/hypervisor.md, "Scratch folder".
"""

import contextlib
import errno
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from core.errors import os_reason
from core.limits import in_io_thread, io_limiter
from core.units import GIB, format_size
from hypervisor.block_graph import BlockNode
from hypervisor.errors import FleecingError
from hypervisor.qmp import FD_SET, Qmp
from hypervisor.unix_socket import Peer

#: Seconds a fleecing image may exist before QEMU has opened (and locked) it.
_YOUNG_S: Final = 60.0
_IMAGE: Final = re.compile(r"fleece-[0-9]+-[0-9]+-[0-9]+\.raw")
#: `struct flock` of Linux on 64-bit machines: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("hh4xqqi4x")
#: QEMU's image locks are bytes 100 .. 299 of the file.
_LOCK_START, _LOCK_LENGTH = 100, 200


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where fleecing images lie, and how much space must stay free there."""

    folder: Path
    allow_shared: bool = False  #: even on the file system of one of the VM's disks
    min_free: int = 2 * GIB  #: bytes
    min_free_fraction: float = 0.05  #: of the file system; the larger of the two counts
    interval_s: float = 1.0  #: between two looks

    def _short_of(self) -> str:
        """What is wrong with the free space; empty if enough is left."""
        system = os.statvfs(self.folder)
        free = system.f_bavail * system.f_frsize
        needed = max(self.min_free, int(system.f_blocks * system.f_frsize * self.min_free_fraction))
        return "" if free >= needed else f"{format_size(free)} are free, {format_size(needed)} must stay free"

    async def prepare(self, qmp: Qmp, nodes: Iterable[BlockNode]) -> None:
        """Make the folder, remove what killed runs left there, and check that a backup of `nodes` may use it.

        Raises:
            FleecingError: it cannot be made, lies on the file system of a disk, or has too little space.
            QmpError, QmpAnswerError: as `Qmp.execute`.
        """
        images = [node.file for node in nodes if node.file is not None and node.driver == "file" and not node.read_only]
        process = Path(f"/proc/{qmp.peer.pid}")
        # QEMU takes relative paths from its own folder.
        paths = {image: [process / "cwd" / image] for image in images}
        if any(image.startswith(FD_SET) for image in images):
            for name, fds in (await qmp.fd_sets()).items():
                if name in paths:
                    paths[name] = [process / "fd" / str(fd.get("fd")) for fd in fds]
        await in_io_thread(self._prepare, paths)

    def _prepare(self, images: Mapping[str, Iterable[Path]]) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_stale(self.folder)
            device = self.folder.stat().st_dev
            short = self._short_of()
        except OSError as error:
            raise FleecingError("use the scratch folder", str(self.folder), os_reason(error)) from error
        for image, path in [(image, path) for image, paths in images.items() for path in paths]:
            with contextlib.suppress(OSError):
                if path.stat().st_dev == device and not self.allow_shared:
                    raise FleecingError(
                        "use the scratch folder",
                        str(self.folder),
                        f"it is on the file system of the disk {image}, which a growing fleecing image could fill",
                        "choose a scratch folder on another file system, or set scratch-beside-disks = true",
                    )
        if short:
            raise FleecingError("use the scratch folder", str(self.folder), short)

    async def create(self, name: str, size: int) -> Path:
        """An empty image of exactly `size` bytes; QEMU would take a smaller one without a word.

        Raises:
            FleecingError: it cannot be made.
        """
        path = self.folder / name
        try:
            await in_io_thread(_create, path, size)
        except OSError as error:
            why = os_reason(error)
            if error.errno in (errno.EFBIG, errno.EINVAL):
                why = f"its file system cannot hold a file of {format_size(size)}, the size of the disk"
            raise FleecingError("make a fleecing image in", str(self.folder), why) from error
        return path

    async def watch(self) -> None:
        """Look at the free space until cancelled.

        Raises:
            FleecingError: it has run short.
        """
        while True:
            await trio.sleep(self.interval_s)
            try:
                # On a hanging file system the thread is left behind: the end of a backup must not wait for it here.
                short = await trio.to_thread.run_sync(self._short_of, abandon_on_cancel=True, limiter=io_limiter())
            except OSError as error:
                raise FleecingError("use the scratch folder", str(self.folder), os_reason(error)) from error
            if short:
                raise FleecingError(
                    "go on with the backup in the scratch folder",
                    str(self.folder),
                    short,
                    "the guest is not affected; make room, or back up when the guest writes less",
                )


async def hanging(images: Iterable[Path], timeout_s: float) -> bool:
    """True if one of `images` cannot be changed for `timeout_s`: its file system hangs, and QEMU's writes to it do.

    As long as that lasts nothing may be taken out of QEMU's way: it would wait for those writes, and the guest with it.
    Left alone, the guest goes on.
    """
    with trio.move_on_after(timeout_s):
        # Waits for whoever writes to the file, and changes nothing that matters.
        await trio.to_thread.run_sync(_touch, tuple(images), abandon_on_cancel=True, limiter=io_limiter())
        return False
    return True


def _touch(images: Iterable[Path]) -> None:
    for path in images:
        with contextlib.suppress(OSError):
            os.utime(path, follow_symlinks=False)


def image_prefix(peer: Peer) -> str:
    """How the names of the fleecing images of that QEMU begin."""
    return f"fleece-{peer.pid}-{peer.start_time or 0}-"


def image_name(peer: Peer, number: int) -> str:
    """Name of the fleecing image of disk `number` of that QEMU."""
    return f"{image_prefix(peer)}{number}.raw"


def _create(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def remove_image(path: Path) -> None:
    """Remove a fleecing image and give its space back, even if QEMU still has it open; none is no error.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
    path.unlink(missing_ok=True)


def remove_stale(folder: Path) -> list[Path]:
    """Remove fleecing images that no QEMU has open; returns them.

    QEMU holds locks on an open image, also where `folder` is shared with another host. A young image may be about to be
    opened.
    """
    removed = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _IMAGE.fullmatch(path.name) is None:
                continue
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _YOUNG_S and not _locked(path):
                    path.unlink()
                    removed.append(path)
    return removed


def _locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_START, _LOCK_LENGTH, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)
