"""What somebody may do in a sync, and what he needs to start one (spec 6.11, 12.2, 13)."""

from dataclasses import dataclass

from datastore.names import ROOT, Namespace
from repository.sync import Direction
from server.access.auth_ids import AuthId
from server.access.roles import NAMES, Privilege
from server.errors import ApiError
from server.state import ServerState

_P = Privilege


@dataclass(frozen=True, slots=True)
class SyncSides:
    """Which datastores a sync joins."""

    direction: Direction
    store: str
    ns: Namespace
    remote: str | None  #: None: the other datastore is one of this server
    remote_store: str
    remote_ns: Namespace = ROOT

    @property
    def remote_path(self) -> tuple[str, ...]:
        """The ACL path of the far datastore."""
        assert self.remote is not None
        return ("remote", self.remote, self.remote_store)


@dataclass(frozen=True, slots=True)
class CallersRights:
    """See `repository.sync.SyncRights`: those of an auth-id, as they are at each moment."""

    state: ServerState
    who: AuthId
    sides: SyncSides

    def _near(self, ns: Namespace) -> Privilege:
        return self.state.on(self.who, self.sides.store, ns)

    def _far(self, ns: Namespace) -> Privilege:
        return self.state.privileges(self.who, (*self.sides.remote_path, *ns.components))

    def _source(self, ns: Namespace) -> Privilege:
        """Of the datastore of this server that is read."""
        pull = self.sides.direction is Direction.PULL
        return self.state.on(self.who, self.sides.remote_store, ns) if pull else self._near(ns)

    @property
    def _reads_here(self) -> bool:
        return self.sides.direction is Direction.PUSH or self.sides.remote is None

    def reads(self, ns: Namespace) -> bool:
        """See `SyncRights.reads`; what a remote shows is its own business."""
        return not self._reads_here or bool(self._source(ns) & (_P.DATASTORE_READ | _P.DATASTORE_BACKUP))

    def reads_group(self, ns: Namespace, owner: str | None) -> bool:
        """See `SyncRights.reads_group`."""
        if not self._reads_here:
            return True
        rights = self._source(ns)
        return bool(rights & _P.DATASTORE_READ) or (bool(rights & _P.DATASTORE_BACKUP) and self.who.owns(owner or ""))

    def writes(self, ns: Namespace) -> bool:
        """See `SyncRights.writes`."""
        if self.sides.direction is Direction.PUSH:
            return bool(self._far(ns) & _P.REMOTE_DATASTORE_BACKUP)
        return bool(self._near(ns) & _P.DATASTORE_BACKUP)

    def modifies(self, ns: Namespace) -> bool:
        """See `SyncRights.modifies`."""
        if self.sides.direction is Direction.PUSH:
            return bool(self._far(ns) & _P.REMOTE_DATASTORE_MODIFY)
        return bool(self._near(Namespace(ns.components[:-1])) & _P.DATASTORE_MODIFY)

    def prunes(self, ns: Namespace) -> bool:
        """See `SyncRights.prunes`."""
        if self.sides.direction is Direction.PUSH:
            return bool(self._far(ns) & _P.REMOTE_DATASTORE_PRUNE)
        return bool(self._near(ns) & _P.DATASTORE_PRUNE)


@dataclass(frozen=True, slots=True)
class Check:
    """Rights at a path of which one (or all) are needed."""

    path: tuple[str, ...]
    needed: Privilege
    every: bool = True

    def missing(self, state: ServerState, who: AuthId) -> str | None:
        """What is missing, in the words of PBS; None if nothing is."""
        has = state.privileges(who, self.path) & self.needed
        if has == self.needed or (has and not self.every):
            return None
        lacking = self.needed & ~has if self.every else self.needed
        names = "|".join(name for one, name in NAMES.items() if one & lacking)
        return f"missing permissions '{names}' on '/{'/'.join(self.path)}'"


def to_run(sides: SyncSides, *, remove_vanished: bool) -> list[Check]:
    """What who starts a sync by hand needs."""
    near = ("datastore", sides.store, *sides.ns.components)
    if sides.direction is Direction.PUSH:
        far = (*sides.remote_path, *sides.remote_ns.components)
        wanted = _P.REMOTE_DATASTORE_BACKUP | (_P.REMOTE_DATASTORE_PRUNE if remove_vanished else _P(0))
        return [Check(far, wanted), Check(near, _P.DATASTORE_READ | _P.DATASTORE_BACKUP, every=False)]
    wanted = _P.DATASTORE_BACKUP | (_P.DATASTORE_PRUNE if remove_vanished else _P(0))
    return [Check(near, wanted), _source(sides)]


def _source(sides: SyncSides) -> Check:
    if sides.remote is not None:
        return Check(sides.remote_path, _P.REMOTE_READ)
    return Check(("datastore", sides.remote_store, *sides.remote_ns.components), _P.DATASTORE_BACKUP)


def to_see(sides: SyncSides) -> list[Check]:
    """What who looks at a job needs."""
    near = Check(("datastore", sides.store, *sides.ns.components), _P.DATASTORE_AUDIT)
    if sides.direction is Direction.PUSH:
        return [near, Check((*sides.remote_path, *sides.remote_ns.components), _P.REMOTE_AUDIT)]
    if sides.remote is not None:
        return [near, Check(("remote", sides.remote), _P.REMOTE_AUDIT)]
    return [near, Check(("datastore", sides.remote_store), _P.DATASTORE_AUDIT)]


def to_change(
    state: ServerState, who: AuthId, owner: AuthId, sides: SyncSides, *, remove_vanished: bool
) -> list[Check]:
    """What who changes or runs a job of `owner` needs."""
    near = ("datastore", sides.store, *sides.ns.components)
    own = who.owns(str(owner))
    if sides.direction is Direction.PUSH:
        far = (*sides.remote_path, *sides.remote_ns.components)
        wanted = _P.REMOTE_DATASTORE_BACKUP | (_P.REMOTE_DATASTORE_PRUNE if remove_vanished else _P(0))
        checks = [Check(far, wanted), Check(near, _P.DATASTORE_AUDIT)]
        if state.privileges(who, near) & _P.DATASTORE_READ:
            return checks
        return [*checks, Check(near, _P.DATASTORE_BACKUP if own else _P.DATASTORE_BACKUP | _P.DATASTORE_MODIFY)]
    wanted = _P.DATASTORE_AUDIT | _P.DATASTORE_BACKUP | (_P.DATASTORE_PRUNE if remove_vanished else _P(0))
    checks = [Check(near, wanted if own else wanted | _P.DATASTORE_MODIFY), _source(sides)]
    if sides.remote is None and not own:
        # The job reads with the rights of its owner, in a datastore of this server what its caller may not.
        checks.append(Check(("datastore", sides.remote_store, *sides.remote_ns.components), _P.DATASTORE_READ))
    return checks


def first_missing(state: ServerState, who: AuthId, checks: list[Check]) -> str | None:
    """What is missing of all `checks`; None if nothing is."""
    return next((text for check in checks if (text := check.missing(state, who)) is not None), None)


def require(state: ServerState, who: AuthId, checks: list[Check]) -> None:
    """See to it that nothing is missing.

    Raises:
        ApiError: something is.
    """
    text = first_missing(state, who, checks)
    if text is not None:
        raise ApiError(text)
