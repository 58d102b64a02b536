"""What `--repo` means: a folder, a configured name, a registered datastore, or a remote server."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.config import Config
from agent.registry import Registry
from core.errors import NotFoundError, UsageError
from repository.interface import Repository

#: `[[user@realm[!token]@]host[:port]:]store` with something before the store.
_REMOTE: Final = re.compile(r"(?:\S+@)?(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+)(?::[0-9]{1,5})?:[^\s:/]+")


def is_remote(spec: str) -> bool:
    """True if `spec` has the form of a datastore on a server."""
    return "/" not in spec and _REMOTE.fullmatch(spec) is not None


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A datastore on this host, and how it is to be used."""

    path: Path
    sync_level: str | None = None


def local_store(spec: str, config: Config, registry: Registry) -> LocalStore:
    """The local datastore that `spec` means.

    Raises:
        NotFoundError: a name that nobody knows.
        UsageError: a datastore on a server.
    """
    registered = registry.datastores()
    if "/" in spec:
        path = Path(spec).expanduser().absolute()
        known = [LocalStore(section.path, section.sync_level) for section in config.repository.values()]
        known += [LocalStore(datastore.path, datastore.sync_level) for datastore in registered.values()]
        return next((store for store in known if store.path == path), LocalStore(path))
    if (section := config.repository.get(spec)) is not None:
        return LocalStore(section.path, section.sync_level)
    if (datastore := registered.get(spec)) is not None:
        return LocalStore(datastore.path, datastore.sync_level)
    if is_remote(spec):
        raise UsageError(
            "open the repository", spec, "it names a datastore on a server, and this version knows local ones only",
            "give a folder (with a / in it) or a configured name",
        )  # fmt: skip
    known_names = sorted({*config.repository, *registered})
    hint = f"known names: {', '.join(known_names)}" if known_names else "'fleece datastore create PATH' makes one"
    if Path(spec).is_dir():
        hint = f"for the folder of that name write ./{spec}"
    raise NotFoundError("find the repository", repr(spec), "no configured or registered datastore has that name", hint)


@asynccontextmanager
async def repository_at(spec: str, config: Config, registry: Registry) -> AsyncIterator[Repository]:
    """The repository `spec`, open while the block runs.

    Raises:
        NotFoundError, UsageError: as `local_store`.
        FleeceError: the folder is no datastore, or cannot be used.
    """
    from datastore.files import SyncLevel
    from repository.local import open_local

    store = local_store(spec, config, registry)
    level = SyncLevel(store.sync_level) if store.sync_level is not None else SyncLevel.FILESYSTEM
    repository = await open_local(store.path, name=spec, sync_level=level)
    try:
        yield repository
    finally:
        repository.close()
