"""Mounting: one call from the command line to the last request.

`mount` checks, goes into the background if it shall, and serves until the mount is taken away or a signal comes.
`serve` is the part that runs under trio. pyfuse3 has one session per process, so a process has one mount.
"""

import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from core import background
from core.background import Background
from core.nursery import one_error, open_nursery
from datastore.codec import CryptKey, parse_fingerprint
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError
from datastore.keyfile import need_key
from datastore.names import MASTER_KEY_NAME, ROOT, Group, Namespace, Snapshot, complete_archive_name
from fusefs.archive_nodes import FileArchive
from fusefs.errors import MountError
from fusefs.kernel import detach, is_served, mount_options, raise_read_ahead
from fusefs.mountpoint import check_fuse, check_mountpoint
from fusefs.nodes import Folder, Shared
from fusefs.opened import OpenSnapshot, open_snapshot
from fusefs.options import MountOptions
from fusefs.pool import IDLE_S, SnapshotPool
from fusefs.tree import ArchiveFolder, NamespaceFolder, SnapshotFolder, find_parts, one_archive
from repository.archive import open_cache
from repository.interface import Repository

#: Opens the repository, for as long as the block runs.
OpenRepository = Callable[[], AbstractAsyncContextManager[Repository]]
#: Seconds that requests under way get to finish when a signal ends the mount.
GRACE_S: Final = 5.0
#: Seconds after which a request that was cut off and does not end counts as hanging.
HANGING_S: Final = 1.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OneArchive:
    """Show a single archive instead of the tree; of a group, the newest snapshot's."""

    snapshot: Snapshot | Group
    name: str  #: with or without type extension


@dataclass(frozen=True, slots=True)
class OneSnapshot:
    """Show the archives of a single snapshot instead of the tree."""

    snapshot: Snapshot


def mount(
    open_repository: OpenRepository,
    mountpoint: Path,
    *,
    key: CryptKey | None = None,
    ns: Namespace = ROOT,
    archive: OneArchive | None = None,
    options: MountOptions | None = None,
    store: Path | None = None,
    foreground: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Show a repository, or one archive of it, as a read-only file system on the folder `mountpoint`.

    In the foreground it returns when the mount ended, by `umount`, `fusermount3 -u`, SIGTERM, SIGINT or SIGHUP. Else a
    new process serves the mount, and this one returns as soon as it is usable; what goes wrong before that is raised
    here. To be called outside of trio, and in the background without other threads.

    Args:
        open_repository: called once, in the serving process.
        mountpoint: an existing, empty folder.
        key: for encrypted archives; those of other keys are not shown.
        ns: the namespace shown as the root of the tree.
        archive: show this only.
        options: what stands behind `-o`.
        store: the folder of a local datastore, which must not be mounted over.
        foreground: serve in this process.
        on_ready: called in this process once the mount is usable; if it raises, the mount ends.

    Raises:
        MountError: the mountpoint or this host is not fit for it.
        FleeceError: the repository cannot be opened, or the archive cannot be shown.
    """
    _fill_standard_streams()
    options = options or MountOptions()
    folder = check_mountpoint(mountpoint, store)
    check_fuse()

    def serve_it(ready: Callable[[], None]) -> None:
        async def work() -> None:
            async with open_repository() as repo:
                await serve(repo, folder, key=key, ns=ns, archive=archive, options=options, ready=ready)

        with one_error():
            trio.run(work)

    if foreground:
        serve_it(on_ready)
    else:
        child, _ = background.start(
            lambda ready: serve_it(lambda: ready(None)),
            Background("mount on", str(mountpoint), "fleece mount", MountError, options.log),
        )
        try:
            on_ready()
        except BaseException:
            background.end(child)  # who is told of a failure is not to find a mount
            raise


async def serve(
    repo: Repository,
    mountpoint: Path,
    *,
    key: CryptKey | None = None,
    ns: Namespace = ROOT,
    archive: OneArchive | OneSnapshot | None = None,
    options: MountOptions | None = None,
    idle_s: float = IDLE_S,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Mount `repo` on `mountpoint` and answer requests until an unmount or a signal; `mount` has the arguments.

    Cancelled, it unmounts; so it does however it ends.

    Args:
        repo: what to show.
        mountpoint: a real path that `check_mountpoint` found fit.
        key: as `mount`.
        ns: as `mount`.
        archive: show this only.
        options: as `mount`.
        idle_s: seconds a snapshot stays locked after its last use.
        ready: called once requests are answered.
    """
    # pyfuse3 and with it libfuse are not there on every host that runs `fleece`.
    import pyfuse3

    from fusefs.operations import Operations

    options = options or MountOptions()
    async with open_cache(options.cache_size) as cache, open_nursery() as nursery:
        unchecked: set[str] = set()
        pool: SnapshotPool[OpenSnapshot] = SnapshotPool(
            lambda snapshot: open_snapshot(repo, key, snapshot, cache, unchecked), repo.snapshot, nursery, idle_s=idle_s
        )
        shared = Shared(repo, key, pool, time.time_ns(), lists_images=options.images)
        operations = Operations(
            await _root(shared, ns, archive),
            uid=options.uid,
            gid=options.gid,
        )
        source = repo.name
        if archive is not None:
            source += f":{archive.snapshot}" + (f"/{archive.name}" if isinstance(archive, OneArchive) else "")
        # Before there is a mount: a signal that nobody waits for would leave it behind.
        with _signals() as signals:
            _attach(operations, mountpoint, mount_options(options.source or source, options.fuse))
            life = _Life(mountpoint)
            try:
                async with open_nursery() as serving:
                    serving.start_soon(_end_on_signal, signals, life, serving.cancel_scope)
                    serving.start_soon(_announce, mountpoint, ready)
                    try:
                        await pyfuse3.main()
                    finally:
                        life.over.set()
                    serving.cancel_scope.cancel()
            finally:
                operations.release_all()
                # Once it is gone, what is there may be somebody else's.
                pyfuse3.close(unmount=not life.detached)
        nursery.cancel_scope.cancel()


async def _root(shared: Shared, ns: Namespace, archive: OneArchive | OneSnapshot | None) -> Folder | FileArchive:
    """The root of the tree, read once so that errors come before the mount is made."""
    if isinstance(archive, OneSnapshot):
        archives = SnapshotFolder(shared, b"", await shared.repo.snapshot(archive.snapshot))
        await archives.children()
        return archives
    if archive is None:
        folder = NamespaceFolder(shared, b"", ns)
        await folder.children()
        return folder
    snapshot = archive.snapshot
    if isinstance(snapshot, Group):
        newest = await shared.repo.latest(snapshot)
        if newest is None:
            raise SnapshotNotFoundError("mount", f"{snapshot}/latest", "the group has no finished snapshot")
        snapshot = newest
    name = complete_archive_name(archive.name)
    info = await shared.repo.snapshot(snapshot)
    parts = find_parts(info, name)
    for part in parts:
        if part.crypt_mode is CryptMode.ENCRYPT and name != MASTER_KEY_NAME and not shared.has_key(info):
            needed = parse_fingerprint(info.fingerprint) if info.fingerprint else None
            raise need_key("mount", f"{snapshot}/{archive.name}", needed, shared.key)
    root = one_archive(shared, info, parts)
    await (root.file if isinstance(root, ArchiveFolder) else root).measure()
    return root


def _attach(operations: object, mountpoint: Path, fuse_options: set[str]) -> None:
    """Mount; what libfuse and fusermount3 print about a failure becomes the reason."""
    import pyfuse3

    with tempfile.TemporaryFile() as heard, _stderr_to(heard.fileno()):
        try:
            pyfuse3.init(operations, str(mountpoint), fuse_options)  # type: ignore[arg-type]
        except RuntimeError as error:
            heard.seek(0)
            why = " ".join(heard.read(4096).decode(errors="replace").split()) or str(error)
            hint = "user_allow_other has to stand in /etc/fuse.conf" if "allow_other" in why else ""
            raise MountError("mount on", str(mountpoint), why, hint) from error


@contextlib.contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


async def _announce(mountpoint: Path, ready: Callable[[], None]) -> None:
    """Say that the mount is usable once a request was answered; not if it ended before."""
    # In a thread, because the kernel sends the question to this process. An unmount leaves the thread behind.
    if await trio.to_thread.run_sync(is_served, str(mountpoint), abandon_on_cancel=True):
        raise_read_ahead(str(mountpoint))
        ready()


def _signals() -> AbstractContextManager[AsyncIterator[int]]:
    """Hears the signals that end a mount."""
    # nohup and background shells ignore a signal on purpose.
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return trio.open_signal_receiver(*(number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN))


@dataclass(slots=True)
class _Life:
    """What has become of a session."""

    mountpoint: Path
    over: trio.Event = field(default_factory=trio.Event)  #: the last request was answered
    detached: bool = False  #: taken from its mountpoint before that


async def _end_on_signal(signals: AsyncIterator[int], life: _Life, scope: trio.CancelScope) -> None:
    """End the session at the first signal, give requests under way a little time, then cut them off.

    What hangs in a system call (a file server that does not answer) cannot be cut off: it keeps the process, but not
    the mount.
    """
    import pyfuse3

    async for number in signals:
        _LOG.info("%s received, unmounting", signal.Signals(number).name)
        break
    pyfuse3.terminate()
    with trio.move_on_after(GRACE_S):
        async for _ in signals:
            break  # a second one means now
    scope.cancel()
    with trio.CancelScope(shield=True):
        with trio.move_on_after(HANGING_S):
            await life.over.wait()
            return
        life.detached = await trio.to_thread.run_sync(detach, str(life.mountpoint), abandon_on_cancel=True)
        how = "is unmounted" if life.detached else "cannot be unmounted"
        _LOG.warning("%s %s; a read that hangs is waited for", life.mountpoint, how)


def _fill_standard_streams() -> None:
    """Keep what is opened from now on from getting the number of a standard stream that the caller closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
