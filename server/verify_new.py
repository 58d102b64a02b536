"""Verification of what clients have just backed up, for datastores where that is wanted (spec 8.9)."""

import logging

from core.errors import FleeceError
from datastore.codec import ChunkCodec
from datastore.names import Snapshot
from repository.local import LocalRepository
from repository.verify import VerifyOptions, verify
from server.access.auth_ids import AuthId
from server.errors import ApiError
from server.state import ServerState
from server.tasks import Task

_LOG = logging.getLogger(__name__)


async def verify_new(
    state: ServerState, store: str, repository: LocalRepository, snapshot: Snapshot, caller: AuthId
) -> None:
    """Start a task that verifies `snapshot`; the backup has ended well even if it cannot be started."""

    async def work(task: Task) -> None:
        (result,) = await verify(repository, [snapshot], ChunkCodec(), task, VerifyOptions(), upid=task.upid)
        for line in result.errors:
            task.log(f"{snapshot}: {line}")
        if result.errors:
            raise ApiError("verification failed - please check the log for details")

    group = snapshot.group
    worker = f"{store}:{group.ns.path}/{group}/{snapshot.ctime:08X}"
    try:
        await state.tasks.start("verify_snapshot", worker, str(caller), work)
    except (ApiError, FleeceError) as error:
        _LOG.warning("%s is not verified: %s", snapshot, error)
