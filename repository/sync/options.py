"""What a sync shall do, and what who runs it may do."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from core.errors import UsageError
from datastore.filters import GroupFilter
from datastore.names import MAX_NAMESPACE_DEPTH, ROOT, Namespace
from repository.throttle import Throttle

#: Groups at a time, at most: as many as PBS's worker threads.
MAX_PARALLEL: Final = 32


class Direction(Enum):
    """Whose rules count; the data take the same way."""

    PUSH = "push"  #: the target is written as a client would: what is there is never touched again
    PULL = "pull"  #: the newest snapshot that is there is looked at again


class SyncRights(Protocol):
    """What the local user may do. The far side enforces its own rules by itself.

    Namespaces of the target are meant by their names there.
    """

    def reads(self, ns: Namespace) -> bool:
        """It sees the namespace of the source."""
        ...

    def reads_group(self, ns: Namespace, owner: str | None) -> bool:
        """It sees a group of the source with that owner."""
        ...

    def writes(self, ns: Namespace) -> bool:
        """It may write snapshots into the namespace of the target."""
        ...

    def modifies(self, ns: Namespace) -> bool:
        """It may create and remove this namespace of the target (pull: has rights on its parent)."""
        ...

    def prunes(self, ns: Namespace) -> bool:
        """It may remove groups and snapshots in the namespace of the target."""
        ...


class AllRights:
    """Everything is allowed: who runs a command owns the store."""

    def reads(self, ns: Namespace) -> bool:
        """See `SyncRights.reads`."""
        return True

    def reads_group(self, ns: Namespace, owner: str | None) -> bool:
        """See `SyncRights.reads_group`."""
        return True

    def writes(self, ns: Namespace) -> bool:
        """See `SyncRights.writes`."""
        return True

    def modifies(self, ns: Namespace) -> bool:
        """See `SyncRights.modifies`."""
        return True

    def prunes(self, ns: Namespace) -> bool:
        """See `SyncRights.prunes`."""
        return True


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """One sync."""

    direction: Direction
    owner: str  #: of what is written, unless the target is a server with a user of its own
    source_ns: Namespace = ROOT  #: anchor; what is below it keeps its place below the target's
    target_ns: Namespace = ROOT
    max_depth: int | None = None  #: levels below the anchor; None: all
    filters: tuple[GroupFilter, ...] = ()
    transfer_last: int | None = None  #: only so many of the newest snapshots of each group
    encrypted_only: bool = False
    verified_only: bool = False
    resync_corrupt: bool = False  #: pull: fetch snapshots again whose verification failed here
    remove_vanished: bool = False
    remove_anyway: bool = False  #: even if the source looks empty or parts of it are hidden
    parallel: int = 1  #: groups at a time
    rate: Throttle | None = None  #: of chunks and blobs
    rights: SyncRights = field(default_factory=AllRights)

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: options that contradict each other, or numbers out of range.
        """
        if not 1 <= self.parallel <= MAX_PARALLEL:
            raise UsageError("sync", f"{self.parallel} groups at a time", f"1 to {MAX_PARALLEL} are possible")
        if self.transfer_last is not None and self.transfer_last < 1:
            raise UsageError("sync", f"the newest {self.transfer_last} snapshots", "at least 1 is needed")
        if self.resync_corrupt and self.direction is Direction.PUSH:
            why = "a push never touches what is at the target"
            raise UsageError("use", "--resync-corrupt", why, "pull from the other side")
        if self.remove_anyway and not self.remove_vanished:
            raise UsageError("use", "--remove-anyway", "it belongs to --remove-vanished")
        if self.max_depth is not None:
            if not 0 <= self.max_depth <= MAX_NAMESPACE_DEPTH:
                raise UsageError("sync", f"{self.max_depth} levels", f"0 to {MAX_NAMESPACE_DEPTH} are possible")
            for anchor in (self.source_ns, self.target_ns):
                if len(anchor.components) + self.max_depth > MAX_NAMESPACE_DEPTH:
                    why = f"{self.max_depth} levels below it are deeper than {MAX_NAMESPACE_DEPTH}"
                    raise UsageError("sync", f"the namespace {anchor}", why, "use a smaller --max-depth, or none")
