"""The log of a backup, stored beside it as `client.log.blob`: what the command said while it worked.

As the reference client does it, the log is uploaded when the snapshot is finished, encrypted if the snapshot is. Only
servers get one: of a datastore of this host, the service's journal has it.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from core.errors import FleeceError
from core.limits import in_cpu_thread
from core.progress import Progress, Task

if TYPE_CHECKING:
    from datastore.codec import ChunkCodec
    from datastore.names import Snapshot
    from repository.interface import Repository

#: Characters of a log that is kept; what comes later is lost, but for the last lines.
MAX_LOG: Final = 1 << 20


class LogProgress(Progress):
    """Hands everything on, and keeps what a log has."""

    def __init__(self, other: Progress) -> None:
        super().__init__()
        self.warnings = other.warnings
        self._other = other
        self._lines: list[str] = []
        self._size = 0

    @property
    def text(self) -> str:
        """The log so far."""
        return "".join(f"{line}\n" for line in self._lines)

    def keep(self, line: str) -> None:
        """Add a line that only the log has."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._size += len(line)
        if self._size < MAX_LOG:
            self._lines.append(f"{stamp}: {line}")

    def log(self, text: str) -> None:
        """See `Progress.log`."""
        self.keep(text)
        self._other.log(text)

    def warn(self, text: str) -> None:
        """See `Progress.warn`."""
        self.keep(f"warning: {text}")
        self._other.warn(text)

    def started(self, task: Task) -> None:
        """See `Progress.started`."""
        self.keep(f"{task.name} begins")
        self._other.started(task)

    def changed(self, task: Task) -> None:
        """See `Progress.changed`."""
        self._other.changed(task)

    def ended(self, task: Task, *, ok: bool) -> None:
        """See `Progress.ended`."""
        self.keep(f"{task.name} {'ended' if ok else 'failed'}: {task.done} {task.unit}")
        self._other.ended(task, ok=ok)


@dataclass(slots=True)
class ClientLog:
    """One backup's log."""

    progress: Progress  #: to be used by the backup
    snapshot: "Snapshot | None" = None  #: set when it is finished
    report: list[str] = field(default_factory=list)  #: lines of the closing report


@asynccontextmanager
async def client_log(repository: "Repository", progress: Progress, codec: "ChunkCodec") -> AsyncIterator[ClientLog]:
    """Keep the log of a backup that is made in the block, and store it at the end if its snapshot was finished.

    That it could not be stored is a warning: the backup is done.
    """
    from repository.local import LocalRepository

    # Asked like this round, as what servers need is not imported for nothing.
    if isinstance(repository, LocalRepository):
        yield ClientLog(progress)
        return
    keeper = LogProgress(progress)
    log = ClientLog(keeper)
    yield log
    if log.snapshot is None:
        return
    for line in log.report:
        keeper.keep(line)
    try:
        blob = await in_cpu_thread(codec.encode_blob, keeper.text.encode("utf-8", "replace"))
        await repository.upload_log(log.snapshot, blob)
    except FleeceError as error:
        progress.warn(f"the log was not stored beside the snapshot: {error}")
