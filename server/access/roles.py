"""Privileges and the roles that bundle them: docs/users-and-rights.md, "Roles"."""

from enum import IntFlag
from typing import Final


class Privilege(IntFlag):
    """What a caller may do on a path."""

    SYS_AUDIT = 1 << 0
    SYS_MODIFY = 1 << 1
    SYS_POWER_MANAGEMENT = 1 << 2
    DATASTORE_AUDIT = 1 << 3
    DATASTORE_ALLOCATE = 1 << 4
    DATASTORE_MODIFY = 1 << 5
    DATASTORE_READ = 1 << 6
    DATASTORE_VERIFY = 1 << 7
    DATASTORE_BACKUP = 1 << 8
    DATASTORE_PRUNE = 1 << 9
    PERMISSIONS_MODIFY = 1 << 10
    REMOTE_AUDIT = 1 << 11
    REMOTE_MODIFY = 1 << 12
    REMOTE_READ = 1 << 13
    REMOTE_DATASTORE_BACKUP = 1 << 14
    REMOTE_DATASTORE_MODIFY = 1 << 15
    REMOTE_DATASTORE_PRUNE = 1 << 16
    SYS_CONSOLE = 1 << 17
    TAPE_AUDIT = 1 << 18
    TAPE_MODIFY = 1 << 19
    TAPE_WRITE = 1 << 20
    TAPE_READ = 1 << 21
    REALM_ALLOCATE = 1 << 22


_SPECIAL: Final = {
    "SYS_POWER_MANAGEMENT": "Sys.PowerManagement",
    "REMOTE_DATASTORE_BACKUP": "Remote.DatastoreBackup",
    "REMOTE_DATASTORE_MODIFY": "Remote.DatastoreModify",
    "REMOTE_DATASTORE_PRUNE": "Remote.DatastorePrune",
}
#: Privilege -> name as stored and shown.
NAMES: Final[dict[Privilege, str]] = {
    one: _SPECIAL.get(one.name or "", ".".join(part.capitalize() for part in (one.name or "").split("_")))
    for one in Privilege
}
NONE: Final = Privilege(0)
ALL: Final = Privilege((1 << 23) - 1)
NO_ACCESS: Final = "NoAccess"

_P = Privilege
_STORE_READER: Final = _P.DATASTORE_AUDIT | _P.DATASTORE_VERIFY | _P.DATASTORE_READ
_STORE_USER: Final = _P.DATASTORE_BACKUP | _P.DATASTORE_PRUNE
_REMOTE_USER: Final = _P.REMOTE_AUDIT | _P.REMOTE_DATASTORE_BACKUP
#: Role -> its privileges and what it is for.
ROLES: Final[dict[str, tuple[Privilege, str]]] = {
    "Admin": (ALL, "Everything"),
    "NoAccess": (NONE, "Nothing, whatever other roles say"),
    "Audit": (_P.SYS_AUDIT | _P.DATASTORE_AUDIT, "See everything"),
    "DatastoreAdmin": (_STORE_READER | _STORE_USER | _P.DATASTORE_MODIFY, "Everything within a datastore"),
    "DatastoreReader": (_STORE_READER, "See, read and verify backups"),
    "DatastoreBackup": (_P.DATASTORE_BACKUP, "Make, read and verify own backups"),
    "DatastorePowerUser": (_STORE_USER, "Make, read, verify and prune own backups"),
    "DatastoreAudit": (_P.DATASTORE_AUDIT, "See what is in a datastore"),
    "RemoteAudit": (_P.REMOTE_AUDIT, "See remotes"),
    "RemoteAdmin": (_P.REMOTE_AUDIT | _P.REMOTE_MODIFY | _P.REMOTE_READ, "Manage remotes"),
    "RemoteSyncOperator": (_P.REMOTE_AUDIT | _P.REMOTE_READ, "Pull from remotes"),
    "RemoteSyncPushOperator": (_REMOTE_USER, "Push to remotes"),
    "RemoteDatastorePowerUser": (_REMOTE_USER | _P.REMOTE_DATASTORE_PRUNE, "Push to remotes, and prune there"),
    "RemoteDatastoreAdmin": (
        _REMOTE_USER | _P.REMOTE_DATASTORE_PRUNE | _P.REMOTE_DATASTORE_MODIFY,
        "Push to remotes, and manage what was pushed",
    ),
    "TapeAudit": (_P.TAPE_AUDIT, "See tapes"),
    "TapeAdmin": (_P.TAPE_AUDIT | _P.TAPE_MODIFY | _P.TAPE_WRITE | _P.TAPE_READ, "Manage tapes"),
    "TapeOperator": (_P.TAPE_AUDIT | _P.TAPE_READ | _P.TAPE_WRITE, "Use tapes"),
    "TapeReader": (_P.TAPE_AUDIT | _P.TAPE_READ, "Restore from tapes"),
}


def names(privileges: Privilege) -> list[str]:
    """The names of all bits set, in the order of the bits."""
    return [name for one, name in NAMES.items() if one & privileges]
