"""The tree of rights: which role an auth-id has on which path (spec 5.3)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from core.errors import UsageError
from server.access.auth_ids import SAFE_ID, AuthId
from server.access.roles import ALL, NO_ACCESS, NONE, ROLES, Privilege

ACL_PATH: Final = re.compile(rf"(?:/|(?:/{SAFE_ID})+)")
MAX_PATH: Final = 128
#: First component -> what may follow; None: anything.
_TREE: Final = ("access", "datastore", "remote", "system", "tape")


@dataclass(frozen=True, slots=True)
class AclEntry:
    """One right."""

    path: str
    auth_id: str  #: or a group, `@name`, of which nobody is a member
    role: str
    propagate: bool = True


def components(path: str) -> tuple[str, ...]:
    """`/datastore/main` as `("datastore", "main")`; the root is empty."""
    return tuple(part for part in path.split("/") if part)


def check_path(path: str) -> str:
    """Return `path` in its normal form if rights can be given on it.

    Raises:
        UsageError: another form, too long, too deep, or a place that does not exist.
    """
    if ACL_PATH.fullmatch(path) is None or len(path) > MAX_PATH:
        raise UsageError("use the ACL path", repr(path), "it is not of the form /datastore/NAME/...")
    parts = components(path)
    deepest = {"datastore": 9, "remote": 10}.get(parts[0], 4) if parts else 0
    if parts and (parts[0] not in _TREE or len(parts) > deepest):
        hint = "/, /access/..., /datastore/NAME/NAMESPACE..., /remote/NAME/..., /system/... and /tape/... exist"
        raise UsageError("use the ACL path", repr(path), "there is no such place", hint)
    return "/" + "/".join(parts)


@dataclass(slots=True)
class _Node:
    children: dict[str, "_Node"] = field(default_factory=dict)
    roles: dict[str, dict[str, bool]] = field(default_factory=dict)  #: auth-id -> role -> propagates


class AclTree:
    """All rights, for quick lookup; never changed once made."""

    def __init__(self, entries: Iterable[AclEntry] = ()) -> None:
        self._root = _Node()
        self.entries: Final = tuple(entries)
        for entry in self.entries:
            node = self._root
            for part in components(entry.path):
                node = node.children.setdefault(part, _Node())
            node.roles.setdefault(entry.auth_id, {})[entry.role] = entry.propagate

    def roles(self, auth_id: str, path: Iterable[str]) -> dict[str, bool]:
        """The roles that exactly this auth-id has at `path`, each with whether it goes on below."""
        node: _Node = self._root
        parts = tuple(path)
        found = _at(node, auth_id, last=not parts) or {}
        for number, part in enumerate(parts):
            child = node.children.get(part)
            if child is None:
                break
            node = child
            own = _at(node, auth_id, last=number == len(parts) - 1)
            if own is not None:
                found = own
        return found

    def privileges(self, auth_id: AuthId, path: Iterable[str]) -> Privilege:
        """What `auth_id` may do at `path`: for a token what both it and its user may."""
        return self.with_propagation(auth_id, path)[0]

    def with_propagation(self, auth_id: AuthId, path: Iterable[str]) -> tuple[Privilege, Privilege]:
        """What `auth_id` may do at `path`, and what of that goes on below."""
        if auth_id.is_root:
            return ALL, ALL
        parts = tuple(path)
        here, below = _sum(self.roles(str(auth_id), parts))
        if auth_id.token is not None:
            user_here, user_below = self.with_propagation(AuthId(auth_id.user), parts)
            return here & user_here, below & user_below
        return here, below

    def any_below(self, auth_id: AuthId, path: Iterable[str], wanted: Privilege) -> bool:
        """True if `auth_id` has one of `wanted` at `path` or anywhere below it."""
        parts = tuple(path)
        if self.privileges(auth_id, parts) & wanted:
            return True
        node = self._root
        for part in parts:
            child = node.children.get(part)
            if child is None:
                return False
            node = child
        stack = [(parts, node)]
        while stack:
            where, node = stack.pop()
            if self.privileges(auth_id, where) & wanted:
                return True
            stack += [((*where, name), child) for name, child in node.children.items()]
        return False

    def paths(self) -> list[str]:
        """Every path that has an entry, each once, and the usual first ones."""
        usual = ("/", "/access", "/datastore", "/remote", "/system", "/tape")
        return sorted({*usual, *(entry.path for entry in self.entries)})


def _at(node: _Node, auth_id: str, *, last: bool) -> dict[str, bool] | None:
    """What this node says of `auth_id`; None if nothing that counts here."""
    found = {role: propagates for role, propagates in node.roles.get(auth_id, {}).items() if propagates or last}
    if NO_ACCESS in found:
        return {NO_ACCESS: found[NO_ACCESS]}
    return found or None


def _sum(roles: Mapping[str, bool]) -> tuple[Privilege, Privilege]:
    here = below = NONE
    for role, propagates in roles.items():
        privileges = ROLES[role][0]
        here |= privileges
        if propagates:
            below |= privileges
    return here, below
