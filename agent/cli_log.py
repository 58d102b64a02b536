"""`fleece upload-log`: a log beside a finished snapshot."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.names import Snapshot


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "upload-log",
        examples="""
fleece upload-log vm/100/latest /var/log/backup-100.log
fleece upload-log vm/100/2026-01-02T03:04:05Z backup.log --keyfile /etc/fleece/backup.key
""",
        keys="write",
    )(upload_log)


def upload_log(
    invocation: Invocation,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the log says, 16 MiB at most.")],
) -> None:
    """Store a file as the log of a backup, client.log.blob, beside a snapshot that has none.

    Backups to a server do this by themselves; this is for programs that keep a log of their own. With a key it is
    encrypted.
    """
    from agent.documents import find_snapshot, in_namespace
    from datastore.blob import MAX_CHUNK_SIZE
    from datastore.private_files import read_small

    data = read_small(file, what="read the log", limit=MAX_CHUNK_SIZE)
    codec = invocation.backup_keys().codec
    ns = invocation.namespace()

    async def work(progress: "Progress") -> "Snapshot":
        from core.limits import in_cpu_thread

        blob = await in_cpu_thread(codec.encode_blob, data)
        async with invocation.repository() as repository:
            found = await find_snapshot(repository, snapshot, ns)
            await repository.upload_log(found, blob)
            return found

    found = invocation.run(work, what="store the log of", where=snapshot)
    document = {"snapshot": str(found), "size": len(data)}
    invocation.emit(document, lambda: f"stored the log of {in_namespace(found)} ({len(data)} bytes)")
