"""What `--repo` means: a folder, a configured name, a registered datastore, or a remote server."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import Config
from agent.registry import Datastore, Registry
from core.errors import NotFoundError, UsageError
from repository.interface import Repository

if TYPE_CHECKING:
    from agent.remote_spec import RemoteSpec
    from agent.s3_use import S3Use


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A datastore of this host, and how it is to be used."""

    path: Path  #: of one in a bucket its cache
    sync_level: str | None = None
    bucket: Datastore | None = None  #: the registered datastore, if it lies in a bucket


def local_store(spec: str, config: Config, registry: Registry) -> LocalStore:
    """The datastore of this host that `spec` means: by its name, or by its folder (of one in a bucket, the cache).

    Raises:
        NotFoundError: a name that nobody knows.
        UsageError: a datastore on a server.
    """
    registered = registry.datastores()
    buckets = {datastore.path: datastore for datastore in registered.values() if datastore.s3 is not None}
    if "/" in spec:
        path = Path(spec).expanduser().absolute()
        folders = [section for section in config.repository.values() if section.path is not None]
        known = [LocalStore(section.path, section.sync_level) for section in folders if section.path is not None]
        known += [LocalStore(datastore.path, datastore.sync_level) for datastore in registered.values()]
        store = next((store for store in known if store.path == path), LocalStore(path))
        return replace(store, bucket=buckets.get(path))
    if remote_spec(spec, config, registry) is not None:
        raise UsageError(
            "use", spec, "it names a datastore on a server, and only one of this host can be used for that",
            "do it on the server itself, or name a folder (with a / in it)",
        )  # fmt: skip
    if (section := config.repository.get(spec)) is not None and section.path is not None:
        return LocalStore(section.path, section.sync_level, buckets.get(section.path))
    if (datastore := registered.get(spec)) is not None:
        return LocalStore(datastore.path, datastore.sync_level, buckets.get(datastore.path))
    known_names = sorted({*config.repository, *registered})
    hint = f"known names: {', '.join(known_names)}" if known_names else "'fleece datastore create PATH' makes one"
    if Path(spec).is_dir():
        hint = f"for the folder of that name write ./{spec}"
    raise NotFoundError("find the repository", repr(spec), "no configured or registered datastore has that name", hint)


def remote_spec(spec: str, config: Config, registry: Registry) -> "RemoteSpec | None":
    """What is known of the datastore on a server that `spec` means; None if it means one of this host.

    Raises:
        UsageError: it has the form of one, but names no user, host or datastore.
    """
    from agent.remote_spec import RemoteSpec
    from repository.remote.address import RemoteAddress, is_remote

    if "/" in spec:
        return None
    section = config.repository.get(spec)
    if section is not None:
        return None if section.server is None else RemoteSpec(RemoteAddress.parse(section.server), section)
    if not is_remote(spec) or spec in registry.datastores():
        return None
    address = RemoteAddress.parse(spec)
    # The same datastore may be configured under a name; what is said there holds.
    for one in config.repository.values():
        if one.server is not None and RemoteAddress.parse(one.server) == address:
            return RemoteSpec(address, one)
    return RemoteSpec(address)


@asynccontextmanager
async def repository_at(
    spec: str, config: Config, registry: Registry, s3: "Callable[[], S3Use] | None" = None
) -> AsyncIterator[Repository]:
    """The repository `spec`, open while the block runs.

    Args:
        spec: as `--repo` takes it.
        config: the configuration.
        registry: the datastores that commands made.
        s3: gives what datastores in buckets are used with; not called for others.

    Raises:
        NotFoundError, UsageError: as `local_store`.
        FleeceError: the folder is no datastore, or cannot be used.
    """
    from datastore.files import SyncLevel
    from repository.local import LocalRepository, open_local

    if (remote := remote_spec(spec, config, registry)) is not None:
        from agent.remotes import open_repository

        async with open_repository(remote, spec) as opened_remote:
            yield opened_remote
        return
    store = local_store(spec, config, registry)
    if store.bucket is not None and s3 is not None:
        datastore = replace(store.bucket, sync_level=store.sync_level or store.bucket.sync_level)
        async with s3().open(datastore) as opened:
            yield LocalRepository(opened, name=spec)
        return
    level = SyncLevel(store.sync_level) if store.sync_level is not None else SyncLevel.FILESYSTEM
    repository = await open_local(store.path, name=spec, sync_level=level)
    try:
        yield repository
    finally:
        repository.close()
