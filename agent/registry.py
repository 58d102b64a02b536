"""The datastores of this host that `fleece datastore create` made: a small TOML file that only commands write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.state_files import StateFile
from core.errors import FleeceError
from datastore.names import check_store_name

SYNC_LEVELS: Final = ("filesystem", "file", "none")


@dataclass(frozen=True, slots=True)
class S3Place:
    """Where the objects of a datastore lie."""

    endpoint: str  #: id in the list of endpoints
    bucket: str
    max_cache_size: int | None = None  #: bytes of cached chunks; None: four fifths of the free space


@dataclass(frozen=True, slots=True)
class Datastore:
    """One registered datastore."""

    name: str
    path: Path  #: its folder; of one in a bucket the local cache
    sync_level: str | None = None  #: how backups reach the disk; None: the default
    s3: S3Place | None = None  #: it lies in a bucket


class Registry:
    """The list in the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StateFile(
            path,
            "datastore",
            "the list of datastores",
            "Datastores of this host. Written by 'fleece datastore', not for editing by hand.",
            "repair or remove the file, then 'fleece datastore create ... --reuse' for each datastore",
        )

    def datastores(self) -> dict[str, Datastore]:
        """All datastores by name; none if the file is not there.

        Raises:
            FleeceError: the file cannot be read, or somebody else wrote it.
        """
        return {name: self._parse(name, table) for name, table in self._file.read().items()}

    def _parse(self, name: str, table: dict[str, Any]) -> Datastore:
        path = table.get("path")
        if not isinstance(path, str) or not path.startswith("/"):
            raise self._file.wrong(f"datastore.{name} has no path")
        level = table.get("sync-level")
        if level not in (None, *SYNC_LEVELS):
            raise self._file.wrong(f"datastore.{name}: sync-level {level!r}")
        if "endpoint" not in table:
            return Datastore(name, Path(path), level)
        endpoint, bucket, size = (table.get(key) for key in ("endpoint", "bucket", "max-cache-size"))
        if not isinstance(endpoint, str) or not isinstance(bucket, str):
            raise self._file.wrong(f"datastore.{name} has no bucket")
        if size is not None and (not isinstance(size, int) or size < 0):
            raise self._file.wrong(f"datastore.{name}: max-cache-size {size!r}")
        return Datastore(name, Path(path), level, S3Place(endpoint, bucket, size))

    def add(
        self,
        name: str,
        path: Path,
        sync_level: str | None = None,
        *,
        s3: S3Place | None = None,
    ) -> None:
        """Register the datastore in the folder `path` under `name`; the same pair again is fine.

        Raises:
            FleeceError: as `check`, or the list is unwritable.
        """
        wanted = Datastore(check_store_name(name), path.absolute(), sync_level, s3)
        with self._changing() as known:
            _check(wanted, known)
            known[name] = wanted

    def check(self, name: str, path: Path, *, s3: S3Place | None = None) -> None:
        """See to it that `add` would take the datastore.

        Raises:
            FleeceError: the name is taken by another folder or bucket, or the folder has another name.
        """
        _check(Datastore(check_store_name(name), path.absolute(), s3=s3), self.datastores())

    def remove(self, name: str) -> None:
        """Forget `name`; nothing happens if it is not there.

        Raises:
            FleeceError: the list is unwritable.
        """
        with self._changing() as known:
            known.pop(name, None)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Datastore]]:
        """The list, written back atomically at the end of the block; one change at a time."""
        with self._file.changing():
            known = self.datastores()
            yield known
            try:
                self._file.write({name: _table(datastore) for name, datastore in known.items()})
            except UnicodeEncodeError as error:
                raise FleeceError("register the datastore", repr(error.object), "its path is not UTF-8") from None


def _table(datastore: Datastore) -> dict[str, str | int | None]:
    s3 = datastore.s3
    return {
        "path": str(datastore.path),
        "sync-level": datastore.sync_level,
        "endpoint": None if s3 is None else s3.endpoint,
        "bucket": None if s3 is None else s3.bucket,
        "max-cache-size": None if s3 is None else s3.max_cache_size,
    }


def _check(wanted: Datastore, known: dict[str, Datastore]) -> None:
    taken = known.get(wanted.name)
    if taken is not None and taken.path != wanted.path:
        hint = "choose another one with --name" if wanted.s3 is None else _forget(wanted.name)
        raise FleeceError(
            "register the datastore", str(wanted.path), f"the name {wanted.name!r} belongs to {taken.path}", hint
        )
    if taken is not None and _home(taken) != _home(wanted):
        why = f"{wanted.name!r} is a datastore in {_words(taken)} already"
        raise FleeceError("register the datastore", str(wanted.path), why, _forget(wanted.name))
    for other in known.values():
        if other.path == wanted.path and other.name != wanted.name:
            raise FleeceError(
                "register the datastore",
                str(wanted.path),
                f"it is registered as {other.name!r} already",
                _forget(other.name),
            )


def _forget(name: str) -> str:
    return f"'fleece datastore remove {name}' forgets that name"


def _home(datastore: Datastore) -> tuple[str, str] | None:
    return None if datastore.s3 is None else (datastore.s3.endpoint, datastore.s3.bucket)


def _words(datastore: Datastore) -> str:
    return (
        "a folder" if datastore.s3 is None else f"bucket {datastore.s3.bucket!r} of endpoint {datastore.s3.endpoint!r}"
    )
