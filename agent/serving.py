"""The datastores and remotes of this host as a server sees them, and where the server's own files lie."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.config import Config
from agent.invocation import Invocation
from agent.places import state_dir
from agent.registry import Registry
from agent.repositories import local_store, repository_at
from agent.s3_use import S3Use
from core.errors import UsageError
from repository.local import LocalRepository
from server.remotes import RATES

if TYPE_CHECKING:
    from agent.remote_hosts import RemoteRegistry
    from repository.remote.repository import RemoteRepository

_LOG = logging.getLogger(__name__)
#: What the REST interface shows of a remote.
_SHOWN = ("host", "auth-id", "port", "fingerprint", "comment")


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

    def place(self, name: str) -> object:
        """See `StoreProvider.place`: how the datastore is registered, and which folder it is."""
        if name not in self._registry.datastores():
            return None
        store = local_store(name, self._config, self._registry)
        try:
            # Each datastore has a lock file of its own, which is made with it and never written to: its time is that.
            found = (store.path / ".lock").stat()
        except OSError:
            return store, None
        return store, (found.st_dev, found.st_ino, found.st_mtime_ns)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[LocalRepository]:
        """See `StoreProvider.open`."""
        # One per store: only one endpoint at a time goes through it.
        use = S3Use(self._invocation.endpoints, self._config.s3, warn=_LOG.warning)
        use.counters.crossed = None  # a budget is for each task, not for all since the server began
        async with repository_at(name, self._config, self._registry, lambda: use) as repository:
            if not isinstance(repository, LocalRepository):
                raise UsageError("serve the datastore", name, "it lies on another server")
            yield repository


class RegisteredRemotes:
    """See `server.remotes.Remotes`: what 'fleece remote' wrote, too."""

    def __init__(self, registry: "RemoteRegistry") -> None:
        self._registry = registry

    def listed(self) -> Mapping[str, Mapping[str, Any]]:
        """See `Remotes.listed`."""
        found = {}
        for id, section in self._registry.sections().items():
            values = section.model_dump(by_alias=True, exclude_defaults=True, mode="json")
            found[id] = {name: values[name] for name in _SHOWN if values.get(name) is not None}
        return found

    def add(self, name: str, values: Mapping[str, Any], password: str) -> None:
        """See `Remotes.add`."""
        from agent.remote_hosts import section_of

        self._registry.add(name, section_of(_without_brackets(values)), password)

    def update(self, name: str, changes: Mapping[str, Any], password: str | None) -> None:
        """See `Remotes.update`."""
        self._registry.update(name, _without_brackets(changes), password)

    def remove(self, name: str) -> None:
        """See `Remotes.remove`."""
        self._registry.remove(name)

    @asynccontextmanager
    async def open(self, name: str, store: str, rates: Mapping[str, str | None]) -> "AsyncIterator[RemoteRepository]":
        """See `Remotes.open`."""
        from repository.remote.opening import open_remote

        given = {rate.replace("-", "_"): rates.get(rate) for rate in RATES}
        section, options = self._registry.section(name), self._registry.options(name, given)
        async with open_remote(section.address(store), options, name=name) as repository:
            yield repository


def _without_brackets(values: Mapping[str, Any]) -> dict[str, Any]:
    host = values.get("host")
    if not isinstance(host, str):
        return dict(values)
    return {**values, "host": host.removeprefix("[").removesuffix("]")}
