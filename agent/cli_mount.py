"""`fleece mount`: a repository, or one archive of it, as a read-only file system."""

import logging
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fusefs.mount import OneArchive
    from repository.interface import Repository

_LOG = logging.getLogger(__name__)


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "mount",
        examples="""
fleece mount /mnt/backup                                        every snapshot, as TYPE/ID/TIME/...
fleece mount vm/100/latest drive-scsi0.img /mnt/disk            one disk image, as a file in /mnt/disk
fleece mount host/db1/latest root.pxar /mnt/root                one file archive, as the folder that it was
fleece mount /mnt/backup --foreground -o allow_other,cache=512M
fleece mount /mnt/backup --keyfile /etc/fleece/backup.key        encrypted archives too
umount /mnt/backup                                              or: fusermount3 -u /mnt/backup
""",
        keys="read",
    )(mount)


def mount(
    invocation: Invocation,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[SNAPSHOT ARCHIVE] MOUNTPOINT", help="What to show, and the empty folder to show it on."
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "-o", metavar="OPTIONS", help="Mount options: cache=SIZE, uid=N, gid=N, log=FILE, allow_other, ..."
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Serve in this process until unmounted.")
    ] = False,
) -> None:
    """Show the repository as a tree of folders, or one archive of it. Nothing can be changed through it.

    Disk images are files, file archives are folders with all metadata, small files lie decoded beside them, 'latest'
    beside the snapshots is a link to the newest. A snapshot that is being looked at cannot be removed until a minute
    later. 'umount', 'fusermount3 -u' or SIGTERM ends the mount. Encrypted archives are shown if their key is given.
    """
    from agent.repositories import local_store, remote_spec
    from core.systemd import notify
    from fusefs.mount import mount as mount_on
    from fusefs.options import MountOptions

    if len(arguments) not in (1, 3):
        raise UsageError("mount", " ".join(arguments), "either MOUNTPOINT or SNAPSHOT ARCHIVE MOUNTPOINT is needed")
    if not arguments[-1]:
        # To Path it would be the current folder.
        raise UsageError("mount", "''", "the mountpoint is empty")
    mountpoint = Path(arguments[-1])
    ns = invocation.namespace()
    named = (invocation.repository_spec(), invocation.config, invocation.registry)
    # A local datastore must not be mounted over.
    store = None if remote_spec(*named) is not None else local_store(*named).path

    def on_ready() -> None:
        if foreground:
            notify("READY=1", f"STATUS=Mounted on {mountpoint}")
        # What it costs is told at its end.
        invocation.emit({"mountpoint": str(mountpoint)}, lambda: f"mounted on {mountpoint}", cost=False)

    @asynccontextmanager
    async def repository() -> "AsyncIterator[Repository]":
        async with invocation.repository() as opened:
            try:
                yield opened
            finally:
                if not foreground and invocation.uses_bucket and invocation.s3.requests:
                    _LOG.info("%s", invocation.s3.line())  # nobody else is left who could tell it

    mount_on(
        repository,
        mountpoint,
        key=invocation.reading_key().key,
        ns=ns,
        archive=_one_archive(arguments[:-1], invocation),
        options=MountOptions.parse(*(options or [])),
        store=store,
        foreground=foreground,
        on_ready=on_ready,
    )


def _one_archive(arguments: list[str], invocation: Invocation) -> "OneArchive | None":
    if not arguments:
        return None
    from datastore.names import Group, Snapshot
    from fusefs.mount import OneArchive

    text, name = arguments
    ns = invocation.namespace()
    group, _, time = text.rpartition("/")
    return OneArchive(Group.parse(group, ns) if time == "latest" else Snapshot.parse(text, ns), name)
