"""The far side of a sync, and the sync itself, for commands and jobs."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.config import Config
from agent.registry import Registry
from agent.remote_hosts import RemoteRegistry, with_rates
from agent.repositories import remote_spec, repository_at
from core.errors import UsageError
from core.progress import Progress
from core.units import parse_size
from datastore.names import Namespace
from repository.interface import Repository
from repository.sync import Direction, SyncOptions, SyncReport, sync
from repository.throttle import Throttle

if TYPE_CHECKING:
    from agent.s3_use import S3Use


@dataclass(frozen=True, slots=True)
class Known:
    """What this host knows of datastores and servers."""

    config: Config
    registry: Registry
    remotes: RemoteRegistry
    s3: "Callable[[], S3Use] | None" = None


@dataclass(frozen=True, slots=True)
class FarSide:
    """The other datastore: a remote by its name, or a repository as `--repo` takes it."""

    text: str
    store: str | None = None  #: datastore of a remote; None: the remote's own
    rates: Mapping[str, str | None] = field(default_factory=dict)  #: as `agent.remote_hosts.RATES`

    def remote_store(self, known: Known) -> str | None:
        """The datastore of the remote that is meant; None if no remote is.

        Raises:
            UsageError: the remote has no datastore of its own, or a datastore is named and it is no remote.
        """
        sections = {} if "/" in self.text else known.remotes.sections()
        if self.text not in sections:
            if self.store is not None:
                names = ", ".join(sections) or "none"
                why = f"{self.text!r} is no remote (known: {names})"
                raise UsageError("use", "--remote-store", why, "'fleece remote add' makes one known")
            return None
        if self.text in known.config.repository or self.text in known.registry.datastores():
            hint = "rename one of them"
            raise UsageError("sync with", self.text, "a remote and a repository have that name", hint)
        store = self.store or sections[self.text].store
        if store is None:
            raise UsageError("sync with", self.text, "which datastore there is not said", "give --remote-store")
        return store

    def default_ns(self, known: Known) -> Namespace:
        """The namespace there when nobody names one."""
        if self.remote_store(known) is not None:
            return Namespace.parse(known.remotes.section(self.text).ns)
        section = known.config.repository.get(self.text)
        return Namespace.parse(section.ns if section is not None else "")

    @asynccontextmanager
    async def opened(self, known: Known, *, may_ask: bool) -> AsyncIterator[Repository]:
        """The repository, open while the block runs; nothing is sent to a server before it is used.

        Raises:
            NotFoundError, UsageError, FleeceError: as `remote_store` and `agent.repositories.repository_at`.
        """
        store = self.remote_store(known)
        if store is not None:
            from repository.remote.opening import open_remote

            address = known.remotes.section(self.text).address(store)
            async with open_remote(address, known.remotes.options(self.text, self.rates), name=self.text) as remote:
                yield remote
            return
        spec = remote_spec(self.text, known.config, known.registry)
        if spec is not None:
            from agent.remotes import remote_options
            from repository.remote.opening import open_remote

            options = with_rates(remote_options(spec, may_ask=may_ask), self.rates)
            async with open_remote(spec.address, options, name=self.text) as remote:
                yield remote
            return
        async with repository_at(self.text, known.config, known.registry, known.s3) as repository:
            yield repository

    def throttle(self, direction: Direction, known: Known) -> Throttle | None:
        """The limit of a sync with a datastore of this host; to servers, connections have one.

        Raises:
            UsageError: a rate of another form.
        """
        text = self.rates.get("rate_out" if direction is Direction.PUSH else "rate_in")
        if not text or self.remote_store(known) is not None or remote_spec(self.text, known.config, known.registry):
            return None
        rate = parse_size(text)
        return Throttle(rate) if rate else None


async def run_sync(
    near: Repository, far: FarSide, options: SyncOptions, known: Known, progress: Progress, *, may_ask: bool
) -> SyncReport:
    """Push from `near` to `far`, or pull the other way round.

    Raises:
        UsageError, NotFoundError, FleeceError: as `FarSide.opened` and `repository.sync.sync`.
    """
    async with far.opened(known, may_ask=may_ask) as other:
        sides = (near, other) if options.direction is Direction.PUSH else (other, near)
        return await sync(*sides, options, progress)


def failure(report: SyncReport) -> str:
    """What failed, in a sentence; empty if nothing did."""
    names = list(report.failed)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
