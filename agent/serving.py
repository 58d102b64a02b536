"""The datastores of this host as a server sees them, and where the server's own files lie."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.config import Config
from agent.invocation import Invocation
from agent.places import state_dir
from agent.registry import Registry
from agent.repositories import repository_at
from agent.s3_use import S3Use
from core.errors import UsageError
from repository.local import LocalRepository


def server_folder() -> Path:
    """The folder of users, rights, tasks, keys and certificate."""
    return state_dir() / "server"


class RegisteredStores:
    """See `server.state.StoreProvider`: what 'fleece datastore create' made, in folders and in buckets."""

    def __init__(self, invocation: Invocation) -> None:
        self._config: Config = invocation.config
        self._registry: Registry = invocation.registry
        self._invocation = invocation

    def names(self) -> Sequence[str]:
        """See `StoreProvider.names`."""
        return list(self._registry.datastores())

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[LocalRepository]:
        """See `StoreProvider.open`."""
        # One per store: only one endpoint at a time goes through it.
        use = S3Use(self._invocation.endpoints, self._config.s3)
        async with repository_at(name, self._config, self._registry, lambda: use) as repository:
            if not isinstance(repository, LocalRepository):
                raise UsageError("serve the datastore", name, "it lies on another server")
            yield repository
