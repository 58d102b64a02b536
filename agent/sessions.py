"""Opening a backup session at a free second, waiting for who holds the group."""

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

import trio

from core.errors import FleeceError, UsageError
from core.progress import Progress
from core.units import format_duration
from datastore.errors import LockedError
from datastore.names import Group, Snapshot
from repository.interface import BackupSession, Repository

#: A newest snapshot further ahead than this is no backup of the same second, but a wrong clock.
_MAX_AHEAD_S: Final = 5
#: Seconds between two tries for a lock.
_RETRY_S: Final = 1.0


async def free_second(repository: Repository, group: Group) -> int:
    """The present second, or the next one after that of the group's newest snapshot, which is waited for.

    Raises:
        FleeceError: the newest snapshot lies in the future.
    """
    newest = await repository.latest(group)
    while True:
        now = int(time.time())
        if newest is None or newest.ctime < now:
            return now
        if newest.ctime - now > _MAX_AHEAD_S:
            raise FleeceError(
                "back up", str(group), f"its newest snapshot, {newest.time}, is of the future",
                "check the clock of this host; if it is right, forget that snapshot",
            )  # fmt: skip
        await trio.sleep(max(0.01, newest.ctime + 1 - time.time()))


@asynccontextmanager
async def new_session(
    repository: Repository,
    group: Group,
    *,
    owner: str,
    progress: Progress,
    ctime: int | None = None,
    lock_wait_s: float = 0.0,
) -> AsyncIterator[BackupSession]:
    """A new snapshot of `group`, being written while the block runs.

    Args:
        repository: where.
        group: the group; made if it is not there.
        owner: of a new group.
        progress: gets the session's warnings.
        ctime: the backup time (Unix seconds); None takes the next free second.
        lock_wait_s: how long to wait for another backup of the group to end.

    Raises:
        LockedError: another backup of the group runs for longer than that.
        FleeceError: as `Repository.backup`, or a clock that runs behind.
    """
    deadline = trio.current_time() + lock_wait_s
    async with AsyncExitStack() as stack:
        session = None
        while session is None:
            second = ctime if ctime is not None else await free_second(repository, group)
            try:
                session = await stack.enter_async_context(repository.backup(group.at(second), owner=owner))
            except LockedError:
                left = deadline - trio.current_time()
                if left <= 0:
                    raise
                progress.log(f"waiting for the lock of {group}, for at most {format_duration(left)}")
                await trio.sleep(min(_RETRY_S, left))
            except UsageError:
                # Another backup may have finished between the look at the clock and the lock.
                newest = await repository.latest(group)
                if ctime is not None or newest is None or newest.ctime < second:
                    raise
        told = 0
        try:
            for warning in session.warnings:
                progress.warn(warning)
                told += 1
            yield session
        finally:
            for warning in session.warnings[told:]:  # of its end
                progress.warn(warning)


@contextmanager
def until_listed(progress: Progress) -> Iterator[Callable[[Snapshot], None]]:
    """Heed a cancellation of the block only until the function it gets is called with the finished snapshot.

    From there on what was asked for is done, and only clean-up is left, which has deadlines of its own: the block goes
    on to its end. If it was cancelled meanwhile, `progress` gets a warning that the snapshot is listed.
    """
    finished: list[Snapshot] = []
    with trio.CancelScope() as scope:

        def listed(snapshot: Snapshot) -> None:
            finished.append(snapshot)
            scope.shield = True

        yield listed
    if finished and trio.current_effective_deadline() == -math.inf:
        progress.warn(f"interrupted when the backup was done already: the snapshot {finished[0]} is whole and listed")


def parse_backup_time(text: str) -> int:
    """Unix seconds of `--backup-time`: a number, or the form of a snapshot's name.

    Raises:
        UsageError: another form.
    """
    from datastore.names import parse_time

    if text.isascii() and text.isdigit() and 0 < int(text) < 253402300800:
        return int(text)
    return parse_time(text)
