"""Two repositories to sync, and one that fails at a chosen call."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from core.progress import Progress
from datastore.names import Group, Snapshot
from repository.interface import Repository
from repository.sync import Direction, SyncOptions, SyncReport, sync
from tests.support.snapshots import write_snapshot

OWNER = "root@pam"
#: As servers have it: they know no other chunk size.
SERVER_CHUNK = 4 << 20


class Said(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def options(direction: Direction = Direction.PUSH, **changes: Any) -> SyncOptions:
    """A sync by root."""
    return SyncOptions(direction, **{"owner": OWNER, **changes})


async def push(source: Repository, target: Repository, said: Progress | None = None, **changes: Any) -> SyncReport:
    """Push everything."""
    return await sync(source, target, options(Direction.PUSH, **changes), said or Progress())


async def pull(source: Repository, target: Repository, said: Progress | None = None, **changes: Any) -> SyncReport:
    """Pull everything."""
    return await sync(source, target, options(Direction.PULL, **changes), said or Progress())


async def write(repo: Repository, group: str | Group, *ctimes: int, data: bytes = b"data") -> list[Snapshot]:
    """Small snapshots, each with an image of its own."""
    return [
        await write_snapshot(
            repo, group, ctime,
            {"disk.img.fidx": data + str(ctime).encode(), "vm.conf.blob": b"c"},
            chunk_size=SERVER_CHUNK,
        )
        for ctime in ctimes
    ]  # fmt: skip


async def times(repo: Repository, group: str | Group, *, unfinished: bool = False) -> list[int]:
    """When the snapshots of a group were taken."""
    group = Group.parse(group) if isinstance(group, str) else group
    return [info.snapshot.ctime for info in await repo.snapshots(group.ns, group, unfinished=unfinished)]


class PlannedError(Exception):
    """The fault that was planned."""


class Faults:
    """Counts calls, and lets one of them fail."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self.fail_at, self.error = fail_at, error

    def call(self, name: str) -> None:
        """Note a call, or raise the planned error in its place."""
        self.calls.append(name)
        if len(self.calls) == self.fail_at:
            raise self.error or PlannedError(f"call {self.fail_at}, {name}")


class Faulty:
    """A repository, session or reader whose asynchronous calls are counted and may fail, before they do anything.

    `changed` replaces methods, by name (`groups`) or by the name of what opens their object (`reader.manifest`); the
    function is given the inner object first.
    """

    def __new__(cls, inner: Any, faults: Faults, changed: Mapping[str, Any] | None = None) -> "Faulty":
        # Optional protocols are looked for in the class.
        names = [name for name in dir(inner) if not name.startswith("_")]
        members = {name: _member_of(name) for name in names}
        return object.__new__(type("Faulty", (cls,), members))

    def __init__(self, inner: Any, faults: Faults, changed: Mapping[str, Any] | None = None) -> None:
        self._inner, self._faults, self._changed = inner, faults, dict(changed or {})

    def __getattr__(self, name: str) -> Any:
        return self._member(name)

    def _member(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name in self._changed:
            found = _bound(self._changed[name], self._inner)
        if name in ("backup", "reader", "resync"):
            return lambda *given, **named: self._opened(name, found, given, named)
        if name in ("knows", "disk_order") or not callable(found):
            return found

        async def call(*given: Any, **named: Any) -> Any:
            self._faults.call(name)
            return await found(*given, **named)

        return call

    @asynccontextmanager
    async def _opened(self, name: str, found: Any, given: Any, named: Any) -> AsyncIterator[Any]:
        self._faults.call(name)
        async with found(*given, **named) as inner:
            changed = {
                key[len(name) + 1 :]: value for key, value in self._changed.items() if key.startswith(f"{name}.")
            }
            yield Faulty(inner, self._faults, changed)


def _member_of(name: str) -> property:
    return property(lambda self: self._member(name))


def _bound(value: Any, inner: Any) -> Any:
    return lambda *given, **named: value(inner, *given, **named)
